"""What the pictures of the documentation are drawn with: one style, light and dark, and a few shapes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH = 560
"""Narrow, so that text of 14 pixels can still be read on a phone."""

# Blue and orange differ for people with colour blindness, too; the paper keeps the ink legible where a viewer shows the
# picture on a page of the other scheme
STYLE = """
:root { --paper: #ffffff; --ink: #24292f; --soft: #57606a; --line: #8c959f; --layer: #ffffff; --keep: #0969da;
        --work: #54aeff; --idle: #dfe4ea; --read: #bc4c00; --on: #ffffff }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --soft: #9aa4af; --line: #6e7681; --layer: #22272e; --keep: #1f6feb;
          --work: #79c0ff; --idle: #30363d; --read: #f0883e } }
text { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink) }
.soft { fill: var(--soft); font-size: 13px } .title { font-weight: 600 } .on { fill: var(--on); font-weight: 600 }
.middle { text-anchor: middle } .end { text-anchor: end } .paper { fill: var(--paper) }
.halo { paint-order: stroke; stroke: var(--paper); stroke-width: 4px }
.layer { fill: var(--layer); stroke: var(--line); stroke-width: 1.5 }
.keep { fill: var(--keep) } .work { fill: var(--work) } .idle { fill: var(--idle) }
.read { fill: none; stroke: var(--read); stroke-width: 1.8 } .head { fill: var(--read) }
.own { fill: none; stroke: var(--keep); stroke-width: 1.8 } .grid { stroke: var(--idle); fill: none }
.one, .two, .all { fill: none; stroke-width: 1.8 } .one { stroke: var(--read) } .two { stroke: var(--line) }
.two { stroke-dasharray: 5 4 } .all { stroke: var(--keep); stroke-width: 3 } .span { stroke-width: 1.8 }
.dot { stroke: none } .dot.one { fill: var(--read) } .dot.two { fill: var(--line) } .dot.all { fill: var(--keep) }
"""


def rect(x: float, y: float, width: float, height: float, kind: str, radius: float = 5) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'


def arrow(x: float, y: float, *, down: bool = False) -> str:
    """A head whose tip is at (x, y)."""
    tail = y - 8 if down else y + 8
    return f'<path class="head" d="M{x} {y}L{x - 4.5} {tail}H{x + 4.5}Z"/>'


def text(x: float, y: float, words: str, kind: str = "", turned: tuple[float, float] | None = None) -> str:
    place = (
        f'x="{x:g}" y="{y:g}"' if turned is None else f'transform="translate({turned[0]:g} {turned[1]:g})rotate(-90)"'
    )
    return f'<text {place} class="{kind}">{escape(words)}</text>'


def svg(parts: Sequence[str], height: int, title: str, *, width: int = WIDTH) -> str:
    """A picture with its style, on paper; the title is what it says in words."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f'<rect class="paper" width="{width}" height="{height}" rx="6"/>\n{body}\n</svg>\n'
    )

"""What charts are drawn of: texts and lines in SVG, which the page's style sheet colours."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import accumulate

from markupsafe import Markup

WIDTH = 400.0
"""Pixels of a chart."""
LETTER = 6.9
"""Pixels of a letter of 12.5 pixels, on average."""


def drawing(parts: Sequence[Markup], height: float, title: str, width: float = WIDTH) -> Markup:
    """The whole picture; `title` is for those who cannot see it."""
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        short(width), short(height), title, Markup("\n").join(parts)
    )


def short(value: float) -> str:
    """With one digit after the point, where it has one."""
    digits = f"{value:.1f}".removesuffix(".0")
    return "0" if digits == "-0" else digits


def text(x: float, y: float, words: str, kind: str, whole: str | None = None) -> Markup:
    """Words of some classes; `whole` is what they stand for, where they were shortened."""
    title = Markup("<title>{}</title>").format(whole) if whole is not None and whole != words else ""
    return Markup('<text class="{}" x="{}" y="{}">{}{}</text>').format(kind, short(x), short(y), words, title)


def stroke(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A line of a class."""
    line = '<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>'
    return Markup(line).format(kind, *map(short, (x1, y1, x2, y2)))


def cut(words: str, room: float) -> str:
    """Shortened to what fits."""
    letters = max(8, int(room / LETTER))
    # Chinese, Japanese and Korean ones are twice as wide
    widths = [2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in words]
    if sum(widths) <= letters:
        return words
    ends = accumulate(widths)
    return f"{words[: sum(end < letters for end in ends)].rstrip()}\u2026"

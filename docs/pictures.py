"""Draw the pictures of the documentation: `python docs/pictures.py` writes them into docs/pictures/.

SVG by hand, since each is a few rectangles and lines. Colours follow the reader's light or dark scheme. Sources, sizes
and random draws come from depthkv itself, measured figures from docs/raw, so that the pictures cannot say something
else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from depthkv import RandomCrossLayer, SharingPlan
from depthkv.memory import cache_bytes, format_bytes
from depthkv.routing import Sampler
from depthkv.samplers import default_sampler

WIDTH = 760

STYLE = """
:root { --ink: #24292f; --soft: #656d76; --line: #8c959f; --layer: #ffffff; --keep: #0969da; --work: #54aeff;
        --idle: #eaeef2; --read: #bc4c00; --on: #ffffff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4af; --line: #6e7681; --layer: #22272e; --keep: #1f6feb; --work: #79c0ff;
          --idle: #30363d; --read: #f0883e; --on: #ffffff } }
text { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink) }
.soft { fill: var(--soft); font-size: 13px } .title { font-weight: 600 } .on { fill: var(--on); font-weight: 600 }
.middle { text-anchor: middle } .end { text-anchor: end }
.layer { fill: var(--layer); stroke: var(--line); stroke-width: 1.5 }
.keep { fill: var(--keep); stroke: var(--keep); stroke-width: 1.5 }
.work { fill: var(--work) } .idle { fill: var(--idle) }
.read { fill: none; stroke: var(--read); stroke-width: 1.8 } .head { fill: var(--read) }
.own { fill: none; stroke: var(--keep); stroke-width: 1.8 }
"""


def layers() -> str:
    """Eight layers with their own caches, then under two plans: who reads whom."""
    rows = (
        ("every layer keeps its cache", SharingPlan.full(8)),
        ("every second layer is a leader", SharingPlan.every(2, num_layers=8)),
        ("the front half leads", SharingPlan.from_leaders(range(4), num_layers=8)),
    )
    parts = []
    for number, (title, plan) in enumerate(rows):
        top = 118 * number
        kept = f"{len(plan.leaders)} caches of {plan.num_layers}: retention {plan.retention:.0%}"
        parts += [_text(8, top + 42, title, "title"), _text(8, top + 62, kept, "soft")]
        parts += _plan_row(plan, 270, top + 22)
    return _svg(parts, 352, "Eight layers; followers read the keys and values in the cache of an earlier leader")


def memory() -> str:
    """The cache of one sequence of 128K tokens in a 70B model, at three retentions."""
    config = LlamaConfig(
        num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, hidden_size=8192, head_dim=128
    )
    names = {1: "every layer", 2: "every second layer", 4: "every fourth layer"}
    sizes = {k: cache_bytes(config, torch.float16, 131072, 1, SharingPlan.every(k, num_layers=80)) for k in names}
    scale = 400 / max(sizes.values())
    parts = [_text(8, 24, "KV cache of one sequence of 131,072 tokens, 80 layers, 8 KV heads of 128, fp16", "soft")]
    for row, (k, size) in enumerate(sizes.items()):
        top = 44 + 46 * row
        parts += [
            _text(8, top + 22, f"{names[k]} keeps a cache"),
            _rect(270, top, size * scale, 32, "keep"),
            _text(270 + size * scale + 10, top + 22, format_bytes(size).replace(".00", ""), "title"),
        ]
    label = ", ".join(f"{names[k]} {format_bytes(size)}" for k, size in sizes.items())
    return _svg(parts, 184, f"Cache of a 70B model at 128K tokens: {label}")


def training() -> str:
    """What two samplers draw in two steps each."""
    kinds = ["full"] * 8
    samplers: tuple[tuple[str, Sampler], ...] = (
        ("R-CLA", RandomCrossLayer(cross_layer_prob=0.6, seed=0)),
        ("leader sets", default_sampler(0, for_adapter=True)),
    )
    parts, row = [], 0
    for name, sampler in samplers:
        for step in (1, 2):
            top = 92 * row
            sources = sampler.draw(step, kinds)
            reading = sum(source != layer for layer, source in enumerate(sources))
            parts += [
                _text(8, top + 50, f"{name}, step {step}", "title"),
                _text(8, top + 70, f"{reading} of 8 layers read another's", "soft"),
            ]
            parts += _map_row(sources, 270, top + 42)
            row += 1
    return _svg(parts, 374, "Random maps of four training steps: which layer reads which earlier layer")


def prefill() -> str:
    """Which layer runs for which token of the prompt."""
    parts = []
    panels = (("every second layer leads", SharingPlan.every(2, 8)), ("the front half leads", _front_half()))
    for panel, (title, plan) in enumerate(panels):
        left = 76 + 372 * panel
        parts.append(_text(left, 22, title, "title"))
        last = plan.leaders[-1]
        cells: dict[str, str] = {}
        for layer in range(8):
            top = 36 + 22 * (7 - layer)
            parts.append(_text(left - 10, top + 14, str(layer), "soft end"))
            for token in range(12):
                runs = layer <= last or token == 11
                kind = "idle" if not runs else "keep" if layer in plan.leaders else "work"
                cells[kind] = cells.get(kind, "") + f"M{left + 24 * token} {top}h20v18h-20z"
        parts += [f'<path class="{kind}" d="{path}"/>' for kind, path in cells.items()]
        parts.append(_text(left, 230, "prompt tokens, the last one on the right", "soft"))
    parts.append(_text(0, 0, "layer", "soft middle", turned=(24, 124)))
    for i, (kind, words) in enumerate(
        (("keep", "runs, writes its keys and values"), ("work", "runs, writes none"), ("idle", "does not run"))
    ):
        x = 76 + (0, 270, 450)[i]
        parts += [_rect(x, 246, 20, 18, kind, radius=3), _text(x + 28, 260, words)]
    return _svg(parts, 276, "In prefill, layers above the last leader run for the last token only")


def largest() -> str:
    """Sequences that fit into 80 GB beside the weights of Qwen3-8B, as measured."""
    names = {"g=1": "every layer", "g=2": "every second layer", "front half": "front half"}
    names |= {"g=4": "every fourth layer", "front quarter": "front quarter", "g=8": "every eighth layer"}
    raw = (Path(__file__).parent / "raw" / "gpu.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, raw) if row["run"] == "largest" and row["stack"] == "eager"]
    found = {row["plan"]: row for row in rows if row["context"] == 8192}
    scale = 290 / max(row["batch_size"] for row in found.values())
    parts = [
        _text(8, 24, "sequences of 8,192 tokens beside the weights of Qwen3-8B in 80 GB of an NVIDIA H200", "soft")
    ]
    for i, (plan, name) in enumerate(names.items()):
        top, size = 44 + 42 * i, found[plan]["batch_size"]
        parts += [_text(8, top + 20, f"{name} keeps a cache" if plan[:2] == "g=" else f"the {name} leads")]
        parts += [
            _rect(270, top, size * scale, 28, "keep"),
            _text(270 + size * scale + 10, top + 20, str(size), "title"),
        ]
        parts.append(_text(752, top + 20, f"{found[plan]['tokens_per_s']:,.0f} tok/s eager", "soft end"))
    label = ", ".join(f"{name} {found[plan]['batch_size']}" for plan, name in names.items())
    return _svg(parts, 302, f"Largest batch of 8K tokens in 80 GB: {label}")


_LEAST = 0.003
"""Nats that the picture of losses begins with."""

_CURVES = """
.grid { stroke: var(--idle) } .one, .two, .all { fill: none; stroke-width: 1.8 } .one { stroke: var(--read) }
.two { stroke: var(--line); stroke-dasharray: 5 4 } .all { stroke: var(--keep); stroke-width: 3 }
.halo { paint-order: stroke; stroke: var(--layer); stroke-width: 4px }
.dot { stroke: none } .dot.one { fill: var(--read) } .dot.two { fill: var(--line) } .dot.all { fill: var(--keep) }
"""


def joint(lines: Sequence[Mapping[str, Any]]) -> str:
    """Excess loss against the size of the cache: one axis, two, and all three; both scales are logarithmic.

    Args:
        lines: of benchmarks/joint.py, of one label.
    """
    left, right, top, bottom = 70.0, 590.0, 40.0, 330.0
    known = [line for line in lines if line["axes"] and line["recipe"] is not None]
    losses = [max(line["loss"]["difference"], _LEAST) for line in known]
    factors = sorted({line["factor"] for line in known})
    low, high = math.log(min(losses) / 1.15), math.log(max(losses) * 1.15)
    first, last = math.log(factors[0]), math.log(factors[-1])

    def across(factor: float) -> float:
        return left + (right - left) * (math.log(factor) - first) / max(last - first, 1e-9)

    def down(loss: float) -> float:
        return bottom - (bottom - top) * (math.log(max(loss, _LEAST)) - low) / (high - low)

    parts = [f"<style>{_CURVES}</style>", _text(8, 20, "loss over the full cache, nats per token", "soft")]
    for value in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
        if low <= math.log(value) <= high:
            y = down(value)
            parts += [
                f'<path class="grid" d="M{left:g} {y:.1f}H{right:g}"/>',
                _text(left - 8, round(y + 4, 1), f"{value:g}", "soft end"),
            ]
    for factor in factors:
        parts.append(_text(round(across(factor), 1), bottom + 22, f"{factor:g}x", "soft middle"))
    parts.append(_text((left + right) / 2, bottom + 44, "times smaller than the full cache", "soft middle"))
    names: list[tuple[float, str, str]] = []
    shorter: list[str] = []
    for axes in sorted({tuple(line["axes"]) for line in known}, key=lambda found: (len(found), found)):
        kind = ("one", "two", "all")[len(axes) - 1]
        row = sorted((line["factor"], line["loss"]["difference"]) for line in known if tuple(line["axes"]) == axes)
        path = "L".join(f"{across(factor):.1f} {down(loss):.1f}" for factor, loss in row)
        parts.append(f'<path class="{kind}" d="M{path}"/>')
        parts += [
            f'<circle class="dot {kind}" cx="{across(factor):.1f}" cy="{down(loss):.1f}" r="3.5"/>'
            for factor, loss in row
        ]
        name = f"{axes[0]} alone" if len(axes) == 1 else "all three" if len(axes) == 3 else " + ".join(axes)
        style = "title" if len(axes) == 3 else "" if len(axes) == 1 else "soft"
        if row[-1][0] < factors[-1]:  # nothing smaller with these axes
            x, y = across(row[-1][0]) + 8, down(row[-1][1]) - 8
            shorter.append(_text(round(x, 1), round(y, 1), name, f"{style} halo".strip()))
        else:
            names.append((down(row[-1][1]), name, style))
    at = top - 14.0
    for y, name, kind in sorted(names):
        at = max(at + 17, y + 4)
        parts.append(_text(right + 12, round(at, 1), name, kind))
    return _svg(
        parts + shorter, 386, "Loss against the size of the cache, saved on depth, bits, tokens, and several of them"
    )


def _joint_lines(number: int) -> list[dict[str, Any]]:
    """Lines of one label of docs/raw/joint.jsonl."""
    text = (Path(__file__).parent / "raw" / "joint.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    label = list(dict.fromkeys(line["label"] for line in found))[number]
    return [line for line in found if line["label"] == label]


PICTURES: dict[str, Callable[[], str]] = {
    "joint-adapter.svg": lambda: joint(_joint_lines(0)),
    "joint-scratch.svg": lambda: joint(_joint_lines(1)),
    "layers.svg": layers,
    "memory.svg": memory,
    "training.svg": training,
    "prefill.svg": prefill,
    "largest.svg": largest,
}


def _front_half() -> SharingPlan:
    return SharingPlan.from_leaders(range(4), num_layers=8)


def _plan_row(plan: SharingPlan, left: float, top: float) -> Iterator[str]:
    """Layers on top, caches of leaders below, an arrow from each cache to whoever reads it."""
    for layer, source in enumerate(plan.kv_source_layers):
        x = left + 60 * layer
        yield _rect(x, top, 40, 28, "layer")
        yield _text(x + 20, top + 19, str(layer), "middle")
        if source == layer:
            yield _rect(x, top + 54, 40, 24, "keep")
            yield _text(x + 20, top + 71, "KV", "on middle")
            yield f'<path class="own" d="M{x + 20} {top + 54}V{top + 30}"/>'
    for layer in plan.followers:
        source = plan.kv_source_layers[layer]
        start, end = left + 60 * source + 40, left + 60 * layer + 20
        bend = top + 66
        yield f'<path class="read" d="M{start} {bend}H{end - 8}Q{end} {bend} {end} {bend - 8}V{top + 36}"/>'
        yield _arrow(end, top + 30)


def _map_row(sources: Sequence[int], left: float, top: float) -> Iterator[str]:
    """Layers in a row, an arc from each source to its reader."""
    for layer, source in enumerate(sources):
        x = left + 60 * layer
        yield _rect(x, top, 40, 28, "layer" if source != layer else "keep")
        yield _text(x + 20, top + 19, str(layer), "middle" if source != layer else "on middle")
        if source != layer:
            start, end = left + 60 * source + 26, x + 16
            height = 12 + 4 * (layer - source)
            yield f'<path class="read" d="M{start} {top}C{start} {top - height} {end} {top - height} {end} {top - 7}"/>'
            yield _arrow(end, top - 1, down=True)


def _rect(x: float, y: float, width: float, height: float, kind: str, radius: float = 5) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'


def _arrow(x: float, y: float, *, down: bool = False) -> str:
    """A head whose tip is at (x, y)."""
    tail = y - 8 if down else y + 8
    return f'<path class="head" d="M{x} {y}L{x - 4.5} {tail}H{x + 4.5}Z"/>'


def _text(x: float, y: float, words: str, kind: str = "", turned: tuple[float, float] | None = None) -> str:
    place = (
        f'x="{x:g}" y="{y:g}"' if turned is None else f'transform="translate({turned[0]:g} {turned[1]:g})rotate(-90)"'
    )
    return f'<text {place} class="{kind}">{escape(words)}</text>'


def _svg(parts: Sequence[str], height: int, title: str) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f"{body}\n</svg>\n"
    )


def main() -> None:
    """Write all of them."""
    folder = Path(__file__).parent / "pictures"
    folder.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()

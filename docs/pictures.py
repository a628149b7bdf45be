"""Draw the pictures of the documentation: `python docs/pictures.py` writes them into docs/pictures/.

SVG by hand, since each is a few rectangles and lines. Colours follow the reader's light or dark scheme. Sources, sizes
and random draws come from depthkv itself, measured figures from docs/raw, so that the pictures cannot say something
else. What a picture says in words is its title, which becomes the alternative text on the pages that show it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape, unescape
from pathlib import Path
from typing import Any

import torch
from drawing import arrow, rect, svg, text
from scale_picture import scale
from transformers import LlamaConfig

from depthkv import RandomCrossLayer, SharingPlan
from depthkv.memory import cache_bytes, format_bytes
from depthkv.routing import Sampler
from depthkv.samplers import default_sampler

DOCS = Path(__file__).resolve().parent


def hero(*, narrow: bool) -> str:
    """The retention curve and the memory picture, side by side or one above the other."""
    curve, seen = _retention_panel(8, 400 if narrow else 410)
    bars, sizes = _memory_panel(8, 372, 384) if narrow else _memory_panel(468, 0, 354, pitch=74)
    return svg(curve + bars, 602 if narrow else 350, f"{seen}. {sizes}", width=408 if narrow else 830)


def layers() -> str:
    """Eight layers with their own caches, then under two plans: who reads whom."""
    rows = (
        ("every layer keeps its cache", SharingPlan.full(8)),
        ("every second layer is a leader", SharingPlan.every(2, num_layers=8)),
        ("the front half leads", SharingPlan.from_leaders(range(4), num_layers=8)),
    )
    parts = []
    for number, (title, plan) in enumerate(rows):
        top = 136 * number
        kept = f"{len(plan.leaders)} caches of {plan.num_layers}: retention {plan.retention:.0%}"
        parts += [text(8, top + 22, title, "title"), text(552, top + 22, kept, "soft end")]
        parts += _plan_row(plan, 46, top + 36)
    parts += [rect(46, 418, 40, 24, "keep"), text(66, 435, "KV", "on middle"), text(96, 435, "cache of a leader")]
    parts += ['<path class="read" d="M268 430H296"/>', '<path class="head" d="M304 430L296 425.5V434.5Z"/>']
    parts.append(text(314, 435, "a follower reads its source"))
    plans = "; ".join(f"{title} ({len(plan.leaders)} caches)" for title, plan in rows)
    return svg(
        parts,
        456,
        f"Eight layers under three plans: {plans}. Each follower reads the cache of its source, an earlier leader",
    )


def memory() -> str:
    """The cache of one long sequence in a 70B model, at three retentions."""
    parts, seen = _memory_panel(8, 0, 544)
    return svg(parts, 226, seen)


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
            top = 108 * row
            sources = sampler.draw(step, kinds)
            reading = sum(source != layer for layer, source in enumerate(sources))
            parts += [
                text(8, top + 22, f"sampler {name}, step {step}", "title"),
                text(552, top + 22, f"{reading} of 8 layers read another's", "soft end"),
            ]
            parts += _map_row(sources, 46, top + 68)
            row += 1
    parts += [rect(46, 440, 40, 24, "keep"), text(96, 457, "reads its own")]
    parts += [rect(236, 440, 40, 24, "layer"), text(286, 457, "reads its source, along the arrow")]
    return svg(
        parts, 476, "Random maps of four training steps, two by R-CLA and two by leader sets: which layer reads which"
    )


def prefill() -> str:
    """Which layer runs for which token of the prompt."""
    parts = []
    panels = (("every second layer leads", SharingPlan.every(2, 8)), ("the front half leads", _front_half()))
    for panel, (title, plan) in enumerate(panels):
        left = 50 + 264 * panel
        parts.append(text(left, 22, title, "title"))
        last = plan.leaders[-1]
        cells: dict[str, str] = {}
        for layer in range(8):
            top = 36 + 22 * (7 - layer)
            parts.append(text(left - 8, top + 14, str(layer), "soft end"))
            for token in range(12):
                runs = layer <= last or token == 11
                kind = "idle" if not runs else "keep" if layer in plan.leaders else "work"
                cells[kind] = cells.get(kind, "") + f"M{left + 20 * token} {top}h17v18h-17z"
        parts += [f'<path class="{kind}" d="{path}"/>' for kind, path in cells.items()]
        parts.append(text(left, 230, "the prompt, last token on the right", "soft"))
    parts.append(text(0, 0, "layer", "soft middle", turned=(20, 124)))
    for x, kind, words in (
        (50, "keep", "leader runs, caches"),
        (240, "work", "follower runs"),
        (390, "idle", "does not run"),
    ):
        parts += [rect(x, 246, 20, 18, kind, radius=3), text(x + 28, 260, words)]
    stops = " and ".join(f"{sum(n > p.leaders[-1] for n in range(8))} of 8 where {title}" for title, p in panels)
    return svg(parts, 276, f"In prefill, layers above the last leader run for the last token only: {stops}")


def largest() -> str:
    """Sequences that fit into 80 GB beside the weights of Qwen3-8B, as measured."""
    names = {"g=1": "every layer", "g=2": "every second layer", "front half": "the front half"}
    names |= {"g=4": "every fourth layer", "front quarter": "the front quarter", "g=8": "every eighth layer"}
    rows = [row for row in _raw("gpu") if row["run"] == "largest" and row["stack"] == "eager"]
    found = {row["plan"]: row for row in rows if row["context"] == 8192}
    scale = 210 / max(row["batch_size"] for row in found.values())
    parts = [
        text(8, 22, "Sequences of 8,192 tokens that fit, by layers that keep a cache", "title"),
        text(8, 42, "beside the weights of Qwen3-8B in 80 GB of an NVIDIA H200", "soft"),
    ]
    for i, (plan, name) in enumerate(names.items()):
        top, size = 58 + 40 * i, found[plan]["batch_size"]
        parts += [
            text(8, top + 20, name),
            rect(160, top, size * scale, 28, "keep"),
            text(160 + size * scale + 8, top + 20, str(size), "title"),
            text(552, top + 20, f"{found[plan]['tokens_per_s']:,.0f} tok/s eager", "soft end"),
        ]
    label = ", ".join(f"{name} {found[plan]['batch_size']}" for plan, name in names.items())
    return svg(parts, 304, f"Sequences of 8K tokens in 80 GB, by layers that keep a cache: {label}")


_LEAST = 0.003
"""Nats that the picture of losses begins with."""


def joint(lines: Sequence[Mapping[str, Any]]) -> str:
    """Excess loss against the size of the cache: one axis, two, and all three; both scales are logarithmic.

    Args:
        lines: of benchmarks/joint.py, of one label.
    """
    left, right, top, bottom = 50.0, 420.0, 52.0, 330.0
    known = [line for line in lines if line["axes"] and line["recipe"] is not None]
    losses = [max(line["loss"]["difference"], _LEAST) for line in known]
    factors = sorted({line["factor"] for line in known})
    low, high = math.log(min(losses) / 1.15), math.log(max(losses) * 1.15)
    first, last = math.log(factors[0]), math.log(factors[-1])

    def across(factor: float) -> float:
        return left + (right - left) * (math.log(factor) - first) / max(last - first, 1e-9)

    def down(loss: float) -> float:
        return bottom - (bottom - top) * (math.log(max(loss, _LEAST)) - low) / (high - low)

    parts = [text(8, 22, "Loss over the full cache, nats per token", "title")]
    for value in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
        if low <= math.log(value) <= high:
            y = down(value)
            parts += [
                f'<path class="grid" d="M{left:g} {y:.1f}H{right:g}"/>',
                text(left - 8, round(y + 4, 1), f"{value:g}", "soft end"),
            ]
    for factor in factors:
        parts.append(text(round(across(factor), 1), bottom + 22, f"{factor:g}x", "soft middle"))
    parts.append(text((left + right) / 2, bottom + 44, "times smaller than the full cache", "soft middle"))
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
            x, y = across(row[-1][0]) + 8, down(row[-1][1]) + 18
            shorter.append(text(round(x, 1), round(y, 1), name, f"{style} halo".strip()))
        else:
            names.append((down(row[-1][1]), name, style))
    at = top - 14.0
    for y, name, kind in sorted(names):
        at = max(at + 17, y + 4)
        parts.append(text(right + 12, round(at, 1), name, kind))
    seen = f"Loss over the full cache of {lines[0]['label']}, by size of the cache and what is saved on"
    return svg(parts + shorter, 386, seen)


def _raw(name: str) -> list[dict[str, Any]]:
    """Lines of docs/raw/NAME.jsonl."""
    return [json.loads(line) for line in (DOCS / "raw" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _joint_lines(number: int) -> list[dict[str, Any]]:
    """Lines of one label of docs/raw/joint.jsonl."""
    found = _raw("joint")
    label = list(dict.fromkeys(line["label"] for line in found))[number]
    return [line for line in found if line["label"] == label]


PICTURES: dict[str, Callable[[], str]] = {
    "hero.svg": lambda: hero(narrow=False),
    "hero-narrow.svg": lambda: hero(narrow=True),
    "joint-adapter.svg": lambda: joint(_joint_lines(0)),
    "joint-scratch.svg": lambda: joint(_joint_lines(1)),
    "layers.svg": layers,
    "memory.svg": memory,
    "training.svg": training,
    "prefill.svg": prefill,
    "largest.svg": largest,
    "scale.svg": lambda: scale(_raw("scale")),
}


def _retention_panel(left: float, width: float) -> tuple[list[str], str]:
    """Held-out loss by share of layers that keep a cache, with 95 % intervals, and the same in words."""
    groups = {line["group"]: line for line in _raw("compare") if line["group"] in ("untrained", "default")}
    curves = {
        name: sorted(groups[group]["rows"], key=lambda row: row["retention"])
        for group, name in (("untrained", "untrained"), ("default", "adapted"))
    }
    scores = [row["loss_score"] for rows in curves.values() for row in rows]
    low = 2 * math.floor(min(score["low"] for score in scores) / 2)
    high = 2 * math.ceil(max(score["high"] for score in scores) / 2)
    shares = sorted({row["retention"] for rows in curves.values() for row in rows})
    start, right, top, bottom = left + 34, left + width - 30, 64.0, 296.0

    def across(share: float) -> float:  # a factor of two is as wide everywhere
        return right - (right - start - 24) * math.log(share) / math.log(shares[0])

    def down(loss: float) -> float:
        return bottom - (bottom - top) * (loss - low) / (high - low)

    model = groups["untrained"]["model"].rpartition(":")[2]
    data = [name.rpartition(":")[2] for name in groups["default"]["data"]]
    texts = ", ".join(data) if len(data) < 4 else f"{len(data)} kinds of text"
    parts = [
        text(left, 22, "Held-out loss, nats per token", "title"),
        text(left, 42, f"{model} on {texts}", "soft"),
    ]
    for loss in range(low, high + 1, 2):
        parts += [
            f'<path class="grid" d="M{start:g} {down(loss):.1f}H{right + 12:g}"/>',
            text(start - 8, round(down(loss) + 4, 1), str(loss), "soft end"),
        ]
    parts += [text(round(across(share), 1), bottom + 22, f"{share:.0%}", "soft middle") for share in shares]
    parts.append(
        text((start + right) / 2, bottom + 43, "layers that keep a cache; whiskers: 95% intervals", "soft middle")
    )
    for (name, rows), kind in zip(curves.items(), ("one", "all"), strict=True):
        points = [(across(row["retention"]), row["loss_score"]) for row in rows]
        path = "L".join(f"{x:.1f} {down(score['value']):.1f}" for x, score in points)
        parts.append(f'<path class="{kind}" d="M{path}"/>')
        for x, score in points:
            y, upper, lower = (round(down(score[end]), 1) for end in ("value", "high", "low"))
            bar = f"M{x:.1f} {upper}V{lower}M{x - 5:.1f} {upper}h10M{x - 5:.1f} {lower}h10"
            parts += [f'<path class="{kind} span" d="{bar}"/>']
            parts += [f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y}" r="4"/>']
            # with every layer's cache the curves nearly meet: one figure above, one below
            if score is not points[-1][1] or kind == "one":
                parts.append(text(round(x, 1), upper - 7, f"{score['value']:.2f}", "title middle halo"))
            else:
                parts.append(text(round(x, 1), lower + 18, f"{score['value']:.2f}", "title middle halo"))
        lowest, highest = (
            pick(down(score[end]) for _, score in points[:-1]) for pick, end in ((max, "low"), (min, "high"))
        )
        y = lowest + 24 if kind == "one" else highest - 28
        parts.append(text(round(points[0][0] - 8, 1), round(y, 1), name, "halo"))
    seen = "; ".join(
        f"{name} " + ", ".join(f"{row['loss']:.2f} at {row['retention']:.0%}" for row in reversed(rows))
        for name, rows in curves.items()
    )
    return parts, f"Held-out loss of {model} by layers that keep a cache: {seen}"


def _memory_panel(left: float, top: float, width: float, pitch: float = 56) -> tuple[list[str], str]:
    """Cache of one sequence in Llama 3.1 70B at its full context, one bar per retention, and the same in words."""
    config = LlamaConfig(
        num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, hidden_size=8192, head_dim=128
    )
    tokens, dtype = 131072, torch.bfloat16
    count = config.num_hidden_layers
    plans = {
        f"{words} layer": SharingPlan.every(every, num_layers=count)
        for every, words in ((1, "every"), (2, "every second"), (4, "every fourth"))
    }
    sizes = {name: cache_bytes(config, dtype, tokens, 1, plan) for name, plan in plans.items()}
    scale = (width - 70) / max(sizes.values())
    of = f"{tokens // 1024}K tokens"
    shape = f"{count} layers, {config.num_key_value_heads} KV heads of {config.head_dim}"
    parts = [
        text(left, top + 22, f"KV cache of {of} in a 70B model", "title"),
        text(left, top + 42, f"one sequence; {shape}; {str(dtype).removeprefix('torch.')}", "soft"),
    ]
    shown = {name: format_bytes(size).replace(".00", "") for name, size in sizes.items()}
    for row, (name, size) in enumerate(sizes.items()):
        y = top + pitch + pitch * row
        parts += [
            text(left, y + 14, f"{name} keeps a cache, {plans[name].retention:.0%}"),
            rect(left, y + 22, size * scale, 26, "keep"),
            text(left + size * scale + 8, y + 40, shown[name], "title"),
        ]
    return parts, f"KV cache of {of} in a 70B model: " + ", ".join(f"{name} {size}" for name, size in shown.items())


def _front_half() -> SharingPlan:
    return SharingPlan.from_leaders(range(4), num_layers=8)


def _plan_row(plan: SharingPlan, left: float, top: float) -> Iterator[str]:
    """Layers on top, caches of leaders below, an arrow from each cache to whoever reads it."""
    for layer, source in enumerate(plan.kv_source_layers):
        x = left + 60 * layer
        yield rect(x, top, 40, 28, "layer")
        yield text(x + 20, top + 19, str(layer), "middle")
        if source == layer:
            yield rect(x, top + 54, 40, 24, "keep")
            yield text(x + 20, top + 71, "KV", "on middle")
            yield f'<path class="own" d="M{x + 20} {top + 54}V{top + 30}"/>'
    for layer in plan.followers:
        source = plan.kv_source_layers[layer]
        start, end = left + 60 * source + 40, left + 60 * layer + 20
        bend = top + 66
        yield f'<path class="read" d="M{start} {bend}H{end - 8}Q{end} {bend} {end} {bend - 8}V{top + 36}"/>'
        yield arrow(end, top + 30)


def _map_row(sources: Sequence[int], left: float, top: float) -> Iterator[str]:
    """Layers in a row, an arc from each source to its reader."""
    for layer, source in enumerate(sources):
        x = left + 60 * layer
        yield rect(x, top, 40, 28, "layer" if source != layer else "keep")
        yield text(x + 20, top + 19, str(layer), "middle" if source != layer else "on middle")
        if source != layer:
            start, end = left + 60 * source + 26, x + 16
            height = 12 + 4 * (layer - source)
            yield f'<path class="read" d="M{start} {top}C{start} {top - height} {end} {top - height} {end} {top - 7}"/>'
            yield arrow(end, top - 1, down=True)


def with_titles(page: str, pictures: Mapping[str, str]) -> str:
    """The page with the title of each picture as the alternative text where it is shown."""
    said = {name: unescape(drawn.partition("<title>")[2].partition("</title>")[0]) for name, drawn in pictures.items()}
    file = r"[^\s\")]*pictures/([\w-]+\.svg)"
    page = re.sub(rf"!\[[^\]]*\](?=\({file}\))", lambda found: f"![{said[found[1]]}]", page)
    return re.sub(rf'<img alt="[^"]*"(?= src="{file}")', lambda found: f'<img alt="{escape(said[found[1]])}"', page)


def main() -> None:
    """Write all of them, and what they say into the pages that show them."""
    pictures = {name: draw() for name, draw in PICTURES.items()}
    for name, drawn in pictures.items():
        (DOCS / "pictures" / name).write_text(drawn, encoding="utf-8")
    for page in (DOCS.with_name("README.md"), *DOCS.rglob("*.md")):
        page.write_text(with_titles(page.read_text(encoding="utf-8"), pictures), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Pictures: the retention curve, the training loss, and a plan. matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthkv.errors import DepthKVError
from depthkv.files import replacing
from depthkv.memory import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from depthkv.evaluate.perplexity import CurveRow
    from depthkv.plan import SharingPlan

__all__ = ["plot_loss", "plot_plan", "plot_retention"]

# Okabe and Ito's colours, which people with colour blindness can tell apart, darkest first
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_INK, _MUTED, _GRID = "#222222", "#6b6b6b", "#e3e3e3"
_WIDTH = 8.0
"""Inches. At 800 pixels that is 100 pixels an inch, so 12 points are 17 pixels."""
_LAYERS_PER_ROW = 32

_Path = str | os.PathLike[str]


def plot_retention(curves: Mapping[str, Sequence[CurveRow]], path: _Path, *, title: str | None = None) -> None:
    """Held-out loss against the share of layers that keep a cache, one labelled line per entry of `curves`.

    Args:
        curves: label to rows, for example {"before": [...], "after": [...]}. Where the last of several is the result,
            it stands out and the others are grey.
        path: where to, .png or another type that matplotlib writes.
        title: above the picture.

    Raises:
        DepthKVError: no rows, or a file that cannot be written.
    """
    if not curves or not all(curves.values()):
        raise DepthKVError("expected at least one row for each curve, got none")
    figure, axes = _figure(4.8)
    lines = {label: sorted(rows, key=lambda row: row.retention) for label, rows in curves.items()}
    bytes_at = {row.retention: row.kv_bytes_per_token for rows in lines.values() for row in rows}
    losses = [row.loss for rows in lines.values() for row in rows]
    span = max(max(losses) - min(losses), 0.05 * max(losses), 0.1)
    gap = 0.035 * span
    # of two points at one retention, the upper one's figure goes above and the lower one's below
    mean_at = {x: _mean([r.loss for rows in lines.values() for r in rows if r.retention == x]) for x in bytes_at}
    for number, (label, rows) in enumerate(lines.items()):
        last = number == len(lines) - 1
        colour = _COLOURS[0] if last else _MUTED if len(lines) <= 2 else _COLOURS[1 + number % (len(_COLOURS) - 1)]
        x, y = [100 * row.retention for row in rows], [row.loss for row in rows]
        axes.plot(x, y, "-o" if last else "--o", color=colour, linewidth=2.6 if last else 1.8, markersize=7, zorder=3)
        for row in rows:
            above = row.loss >= mean_at[row.retention] and (len(lines) > 1 or row.retention < 1)
            axes.text(
                100 * row.retention,
                row.loss + (gap if above else -gap),
                f"{row.loss:.2f}",
                color=colour,
                fontsize=11.5,
                ha="center",
                va="bottom" if above else "top",
            )
        _label_line(axes, label, x, y, colour, span)
    # a factor of two is as wide everywhere: small retentions, where losses differ most, would crowd otherwise
    axes.set_xscale("log")
    lowest = min(bytes_at)
    axes.set_xlim(100 * min(0.8, lowest * 0.88), 113)
    axes.set_ylim(min(losses) - 0.16 * span, max(losses) + 0.16 * span)
    shown = _spaced(sorted(bytes_at), 1.13 if lowest > 0.2 else lowest**-0.1)
    axes.set_xticks([], minor=True)
    axes.set_xticks([100 * x for x in shown], [f"{100 * x:.0f} %\n{_short_bytes(bytes_at[x])}" for x in shown])
    axes.set_xlabel("layers that keep a KV cache, and what a token costs in it")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title(title or "Loss when fewer layers keep a cache", loc="left", fontweight="bold", pad=12)
    _save(figure, path)


def plot_loss(
    steps: Sequence[float],
    losses: Sequence[float],
    path: _Path,
    smoothed: Sequence[float] | None = None,
    *,
    title: str | None = None,
    xlabel: str = "training tokens",
) -> None:
    """Training loss: faint as it was, and smoothed.

    Args:
        steps: x of each loss.
        losses: nats per token.
        path: where to.
        smoothed: as many as `losses`; None takes a moving average.
        title: above the picture.
        xlabel: what `steps` are.

    Raises:
        DepthKVError: no losses, another number of steps, or a file that cannot be written.
    """
    smoothed = smooth(losses) if smoothed is None else smoothed
    if not losses or not len(steps) == len(losses) == len(smoothed):
        got = f"{len(steps)}, {len(losses)} and {len(smoothed)}"
        raise DepthKVError(f"expected as many steps as losses and smoothed losses, at least one, got {got}")
    figure, axes = _figure(4.2)
    axes.plot(steps, losses, color=_COLOURS[0], alpha=0.28, linewidth=1.0, marker="o" if len(losses) < 3 else None)
    axes.plot(steps, smoothed, color=_COLOURS[0], linewidth=2.6, solid_capstyle="round")
    axes.annotate(
        f"{smoothed[-1]:.2f}",
        (steps[-1], smoothed[-1]),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=12.5,
        fontweight="bold",
        color=_COLOURS[0],
        annotation_clip=False,
    )
    axes.text(
        0.985, 0.96, "line: moving average\nfaint: every step", transform=axes.transAxes, ha="right", va="top",
        color=_MUTED, fontsize=11.5, linespacing=1.4,
    )  # fmt: skip
    axes.margins(x=0.02)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title(title or "Training with random routing", loc="left", fontweight="bold", pad=12)
    _save(figure, path)


def smooth(losses: Sequence[float]) -> list[float]:
    """A centred moving average over about a twentieth of the run; narrower at both ends, where less is known."""
    half = max(1, len(losses) // 40)
    averages = []
    for i in range(len(losses)):
        reach = min(half, i, len(losses) - 1 - i)
        # at the ends a symmetric window would be a single noisy step: reach inwards instead
        low, high = max(0, i - max(reach, half // 2)), min(len(losses), i + max(reach, half // 2) + 1)
        averages.append(_mean(losses[low:high]))
    return averages


def plot_plan(
    plan: SharingPlan, path: _Path, kinds: Sequence[Hashable] | None = None, *, title: str | None = None
) -> None:
    """A box for each layer, coloured by group: leaders filled, followers light, a bracket from leader to followers.

    Args:
        plan: what to draw.
        path: where to.
        kinds: one per layer (`depthkv.architectures.layer_kinds`); a letter above the boxes tells them apart, where
            there are several.
        title: above the picture.

    Raises:
        DepthKVError: another number of kinds than layers, or a file that cannot be written.
    """
    if kinds is not None and len(kinds) != plan.num_layers:
        raise DepthKVError(f"expected one kind for each of the {plan.num_layers} layers, got {len(kinds)}")
    letters = _kind_letters(kinds)
    columns = min(_LAYERS_PER_ROW, plan.num_layers)
    rows = [range(start, min(start + columns, plan.num_layers)) for start in range(0, plan.num_layers, columns)]
    levels = [_levels(plan, row) for row in rows]
    heights = [1.0 + (0.5 if letters else 0.0) + 0.36 * (1 + max(level.values(), default=0)) + 0.5 for level in levels]
    legend_lines = 1 + len(set(letters.values()) if letters else ())
    # leaders of a row above are named to the left of a row
    margin = 2.2 if any(leader not in row for row, level in zip(rows, levels, strict=True) for leader in level) else 0.1
    width = max(columns, 16) + 0.1 + margin
    per_unit = 0.94 * _WIDTH / width  # inches of one box
    title_inches, legend_inches = 0.5, 0.25 + 0.27 * legend_lines
    drawing_inches = per_unit * (sum(heights) + 0.2)
    height = title_inches + drawing_inches + legend_inches
    figure, axes = _figure(height)
    axes.set_axis_off()
    axes.set_position((0.03, legend_inches / height, 0.94, drawing_inches / height))
    leaders = {leader: _COLOURS[i % len(_COLOURS)] for i, leader in enumerate(plan.leaders)}
    top = 0.0
    for row, level, height in zip(rows, levels, heights, strict=True):
        base = top - 1.0 - (0.5 if letters else 0.0)
        for layer in row:
            _draw_layer(axes, layer, layer - row[0], base, plan, leaders, letters.get(layer, ""))
        for leader, depth in level.items():
            _draw_bracket(axes, leader, base - 0.14 - 0.36 * depth, base, row, plan, leaders[leader])
        top -= height
    axes.set_xlim(-margin, width - margin)
    axes.set_ylim(top - 0.1, 0.1)
    axes.set_aspect("equal", anchor="NW")
    share_kept = f"{len(plan.leaders)} of {plan.num_layers} layers keep a KV cache"
    top_line = 1 - 0.14 / height
    figure.text(0.03, top_line, title or share_kept, fontsize=14.5, fontweight="bold", color=_INK, va="top")
    legend = ["Filled: keeps its cache. Light: keeps none, reads the cache at the bracket's other end."]
    if letters and kinds is not None:
        names = {letter: kinds[layer] for layer, letter in reversed(letters.items())}
        legend += [f"{letter}: {names[letter]}" for letter in sorted(names)]
    figure.text(0.03, 0.12 / height, "\n".join(legend), fontsize=11, color=_MUTED, va="bottom", linespacing=1.5)
    _save(figure, path, tight=False)


def _draw_layer(
    axes: Axes, layer: int, x: float, y: float, plan: SharingPlan, leaders: Mapping[int, str], letter: str
) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import FancyBboxPatch

    source = plan.kv_source_layers[layer]
    colour, leads = leaders[source], source == layer
    light = tuple(0.82 + 0.18 * part for part in to_rgb(colour))
    box = FancyBboxPatch(
        (x + 0.08, y + 0.06),
        0.84,
        0.88,
        boxstyle="round,pad=0,rounding_size=0.14",
        facecolor=colour if leads else light,
        edgecolor=colour,
        linewidth=1.4 if leads else 0.9,
    )
    axes.add_patch(box)
    axes.text(
        x + 0.5, y + 0.48, str(layer), ha="center", va="center", fontsize=_box_font(plan.num_layers),
        color="white" if leads else _INK, fontweight="bold" if leads else "normal",
    )  # fmt: skip
    if letter:
        axes.text(x + 0.5, y + 1.2, letter, ha="center", va="center", fontsize=10, color=_MUTED)


def _draw_bracket(axes: Axes, leader: int, y: float, base: float, row: range, plan: SharingPlan, colour: str) -> None:
    """From a leader down, along, and up into each of its followers in this row of boxes."""
    readers = [layer for layer in plan.readers(leader) if layer in row and layer != leader]
    inside = leader in row
    left = leader - row[0] + 0.5 if inside else 0.05
    right = readers[-1] - row[0] + 0.5
    style: dict[str, Any] = {"color": colour, "linewidth": 1.6, "solid_capstyle": "round", "zorder": 2}
    axes.plot([left, right], [y, y], **style)
    if inside:
        axes.plot([left, left], [y, base + 0.04], **style)
    else:
        axes.text(-0.1, y, f"from {leader}", fontsize=9, color=colour, va="center", ha="right")
    for reader in readers:
        x = reader - row[0] + 0.5
        axes.annotate(
            "", (x, base + 0.1), (x, y), zorder=2,
            arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0,
                        "mutation_scale": 7},
        )  # fmt: skip


def _levels(plan: SharingPlan, row: range) -> dict[int, int]:
    """For each leader with followers in this row, how deep its bracket runs, so that no two overlap."""
    ends: list[float] = []
    levels: dict[int, int] = {}
    for leader in plan.leaders:
        readers = [layer for layer in plan.readers(leader) if layer in row and layer != leader]
        if not readers:
            continue
        start = leader if leader in row else row[0] - 0.5
        depth = next((i for i, end in enumerate(ends) if end < start), len(ends))
        ends[depth : depth + 1] = [readers[-1]]
        levels[leader] = depth
    return levels


def _kind_letters(kinds: Sequence[Hashable] | None) -> dict[int, str]:
    """A, B, ... for each layer, by kind; empty where there is only one kind."""
    if kinds is None or len(set(kinds)) < 2:
        return {}
    names = {kind: chr(ord("A") + i) for i, kind in enumerate(dict.fromkeys(kinds))}
    return {layer: names[kind] for layer, kind in enumerate(kinds)}


def _box_font(num_layers: int) -> float:
    return 12.0 if num_layers <= 16 else 10.5 if num_layers <= 24 else 9.5


def _label_line(axes: Axes, label: str, x: Sequence[float], y: Sequence[float], colour: str, span: float) -> None:
    """The label on the line itself, in the widest gap between two points."""
    if len(x) < 2:
        at, height = x[0], y[0] + 0.1 * span
    else:
        i = max(range(len(x) - 1), key=lambda j: x[j + 1] / x[j])
        at, height = math.sqrt(x[i] * x[i + 1]), (y[i] + y[i + 1]) / 2
    axes.text(
        at, height, label, color=colour, fontsize=13, fontweight="bold", ha="center", va="center", zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 3},
    )  # fmt: skip


def _spaced(values: Sequence[float], least_ratio: float) -> list[float]:
    """Drop ticks that would print over their right neighbour."""
    kept: list[float] = []
    for value in reversed(values):
        if not kept or kept[-1] / value >= least_ratio:
            kept.append(value)
    return kept[::-1]


def _short_bytes(num_bytes: int) -> str:
    number, _, unit = format_bytes(num_bytes).partition(" ")
    return f"{float(number):.3g} {unit}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _figure(height: float) -> tuple[Figure, Axes]:
    # not pyplot: it keeps every figure alive and picks a backend by itself
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=200, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9a9a9a")
    axes.tick_params(labelsize=11.5, colors=_INK, length=3)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(fontsize=12.5, color=_INK)
    axes.yaxis.label.set(fontsize=12.5, color=_INK)
    axes.title.set(fontsize=14.5, color=_INK)
    axes._left_title.set(fontsize=14.5, color=_INK)  # type: ignore[attr-defined]
    return figure, axes


def _save(figure: Figure, path: _Path, *, tight: bool = True) -> None:
    """Write beside the target, then rename."""
    options: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.15} if tight else {}
    suffix = Path(path).suffix or ".png"
    if suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise DepthKVError(f"expected to write a picture as .png, .svg or .pdf, got {Path(path)}")
    with replacing(path, "a picture") as temporary:
        figure.savefig(temporary, format=suffix[1:], **options)

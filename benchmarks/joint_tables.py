"""Tables of benchmarks/joint.py for docs/results.md: what is saved on depth, bits, tokens, and on several of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Lines = Sequence[dict[str, Any]]
Table = tuple[list[str], list[list[str]]]
"""Headings and rows."""


def by_size(lines: Lines) -> dict[tuple[str, tuple[str, ...], float], dict[str, Any]]:
    """By label, axes and size, the full cache with no axes; of several the last."""
    return {(line["label"], tuple(line["axes"]), line["factor"]): line for line in lines}


def name(axes: tuple[str, ...]) -> str:
    """Of a row."""
    return f"{axes[0]} alone" if len(axes) == 1 else "all three" if len(axes) == 3 else " and ".join(axes)


def excess(lines: Lines) -> Table:
    """Excess held-out loss of each subset of the axes at each size, and that of all three by the best single one's."""
    runs = by_size(lines)
    factors = sorted({factor for _, axes, factor in runs if axes})
    rows = []
    for label in dict.fromkeys(label for label, _, _ in runs):
        subsets = list(dict.fromkeys(axes for other, axes, _ in runs if other == label and axes))
        for axes in subsets:
            found = [runs.get((label, axes, factor)) for factor in factors]
            cells = [_cell(line["loss"]) if line is not None and line["recipe"] is not None else "-" for line in found]
            rows.append([label, name(axes), *cells])
        shares = []
        for factor in factors:
            own, singles = runs.get((label, ("depth", "bits", "tokens"), factor)), []
            for axes in subsets:
                line = runs.get((label, axes, factor))
                if len(axes) == 1 and line is not None and line["recipe"] is not None:
                    singles.append(line["loss"]["difference"])
            shares.append(f"{own['loss']['difference'] / min(singles):.0%}" if own and singles else "")
        rows.append([label, "all three, of the best single", *shares])
    return ["model", "saved on", *(f"{factor:g}x smaller" for factor in factors)], rows


def _cell(loss: dict[str, Any]) -> str:
    cell = f"{loss['difference']:+.3f}"
    if loss["difference_low"] is not None:
        cell += f" ({loss['difference_low']:+.3f} to {loss['difference_high']:+.3f})"
    return cell


def tasks(lines: Lines) -> Table:
    """F1 of answers and share of needles found, where they were measured."""
    runs = {key: line for key, line in by_size(lines).items() if "f1" in line}
    factors = sorted({factor for _, axes, factor in runs if axes})
    rows = []
    for label, axes in dict.fromkeys((label, axes) for label, axes, _ in runs):
        if axes:
            found = [runs.get((label, axes, factor)) for factor in factors]
        else:
            found = [runs[label, axes, 1.0]] + [None] * (len(factors) - 1)
        cells = ["-" if line is None else f"{_score(line['f1'])}; {_score(line['retrieval'])}" for line in found]
        rows.append([label, name(axes) if axes else "nothing: the full cache", *cells])
    return ["model", "saved on", *(f"{factor:g}x smaller: F1; needles" for factor in factors)], rows


def _score(score: dict[str, Any]) -> str:
    return f"{score['value']:.1f} ({score['low']:.0f} to {score['high']:.0f})"


def recipes(lines: Lines) -> Table:
    """What the planner chose with all three axes, and how well it was predicted."""
    rows = []
    runs = by_size(lines)
    labels = list(dict.fromkeys(label for label, _, _ in runs))
    for (label, axes, _), line in sorted(runs.items(), key=lambda run: (labels.index(run[0][0]), run[0][2])):
        if len(axes) != 3 or line["recipe"] is None:
            continue
        recipe, predicted = line["recipe"], line["prediction"]
        sources = recipe["kv_source_layers"]
        kept = sum(source == layer for layer, source in enumerate(sources))
        bits = []
        for which in ("key_bits", "value_bits"):
            widths = set(recipe[which]) if isinstance(recipe[which], list) else {recipe[which]}
            bits.append("-".join(map(str, sorted(widths, key=lambda width: int(str(width).removeprefix("fp"))))))
        tokens = "all" if recipe["tokens"] is None else f"{recipe['tokens']:,} by {recipe['rule']}"
        error = predicted["mean_absolute_error"]
        cells = [label, f"{line['full_bytes'] / line['bytes']:.1f}x", f"{kept} of {len(sources)}", " / ".join(bits)]
        cells += [tokens, f"{line['train_excess']:+.3f}", f"{line['loss']['difference']:+.3f}"]
        cells.append("" if error is None else f"{error:.3f} ({predicted['recipes']})")
        rows.append(cells)
    headings = ["model", "smaller", "layers", "bits of keys / values", "tokens", "where it was chosen", "held out"]
    return [*headings, "predictions off by (recipes)"], rows


TABLES = {"joint": excess, "joint-tasks": tasks, "joint-recipes": recipes}

"""The picture of benchmarks/scale.py: what sharing costs after more and more tokens."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from drawing import svg, text

PANELS = (("every second layer keeps a cache", "every 2", "2"), ("every fourth layer keeps a cache", "every 4", "4"))
LINES = (
    ("cla@{k}", "CLA@{k}", "one"),
    ("rd-cla@{k}", "RD-CLA@{k}", "two"),
    ("even leader-subset", "leader subsets", "all"),
    ("default recipe", "default recipe", "own"),
)
"""Method, name and style, the group size of the panel in place of {k}."""
UNSEEN = "brown"


def scale(rows: Sequence[Mapping[str, Any]]) -> str:
    """Loss over the fine-tuned full cache at equal tokens, in per cent, by tokens of training: two panels."""
    arms = [row for row in rows if row["run"] == "scale"]
    bases = {row["tokens"]: _loss(row, "every 1") for row in arms if row["method"] == "base"}
    curves = {}
    for panel, (_, plan, k) in enumerate(PANELS):
        for method, name, kind in LINES:
            found = [row for row in arms if row["method"] == method.format(k=k) and row["tokens"] in bases]
            points = sorted((row["tokens"] / 1e6, 100 * (_loss(row, plan) / bases[row["tokens"]] - 1)) for row in found)
            curves[panel, name.format(k=k)] = (points, kind)
    tokens = sorted(count / 1e6 for count in bases)
    highest = 10 * -(-max(cost for points, _ in curves.values() for _, cost in points) // 10)
    top, bottom, width = 66.0, 290.0, 120.0

    def down(cost: float) -> float:
        return bottom - (bottom - top) * cost / highest

    parts = [text(8, 22, "Loss over the fine-tuned full cache, %", "title")]
    said = []
    for panel, (title, _, _) in enumerate(PANELS):
        left = 40.0 + 274 * panel
        right = left + width
        parts.append(text(left, 48, title, "soft"))
        for cost in range(0, int(highest) + 1, 10):
            parts.append(f'<path class="grid" d="M{left:g} {down(cost):.1f}H{right:g}"/>')
            parts.append(text(left - 8, round(down(cost) + 4, 1), str(cost), "soft end"))

        def across(count: float, left: float = left, right: float = right) -> float:
            return left + 12 + (right - left - 24) * (count - tokens[0]) / (tokens[-1] - tokens[0])

        parts += [text(round(across(count), 1), bottom + 22, f"{count:.0f}M", "soft middle") for count in tokens]
        at, here = top - 17.0, []
        for (number, name), (points, kind) in sorted(curves.items(), key=lambda curve: -curve[1][0][-1][1]):
            if number != panel:
                continue
            path = "L".join(f"{across(count):.1f} {down(cost):.1f}" for count, cost in points)
            parts.append(f'<path class="{kind}" d="M{path}"/>')
            if kind != "own":
                at_points = (f'cx="{across(count):.1f}" cy="{down(cost):.1f}"' for count, cost in points)
                parts += [f'<circle class="dot {kind}" {place} r="3.5"/>' for place in at_points]
            at = max(at + 17, down(points[-1][1]) + 4)
            parts.append(text(right, round(at, 1), name, "title" if kind == "all" else ""))
            here.append(f"{name} {points[-1][1]:.0f} %")
        said.append(f"{title}, {', '.join(here)}")
    parts.append(text(280, bottom + 44, "tokens of training", "soft middle"))
    seen = f"Loss over the fine-tuned full cache after {tokens[-1]:.0f}M tokens: {'; '.join(said)}"
    return svg(parts, 348, seen)


def _loss(row: Mapping[str, Any], plan: str) -> float:
    return statistics.fmean(found[plan] for name, found in row["test"].items() if name != UNSEEN)

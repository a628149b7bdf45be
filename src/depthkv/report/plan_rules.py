"""Section of the page that compares a plan with those of other rules of choice."""

from __future__ import annotations

import math
from collections.abc import Sequence

from depthkv.memory import format_bytes
from depthkv.planner.explain import EVEN
from depthkv.report.charts import Item, item_chart, swatch
from depthkv.report.parts import Cell, Chart, Grid, Row, Section, Table, fixed, headings, interval, score_cell, signed
from depthkv.report.plan_reading import Difference, PlanFigures, Rule

_PREDICTED, _MEASURED, _HELD_OUT = 0, 1, 2
"""Styles of marks."""


def rule_section(found: PlanFigures) -> Section:
    """The loss that each rule's plan has, and how far it is from the evenly spaced one's."""
    charts: list[Chart | None] = [_rule_chart(found, found.rules, "Loss of each rule's plan.")]
    near = _near(found)
    if near:
        charts.append(_rule_chart(found, near, f"The same, closer: the best {len(near)}."))
    compared = [rule for rule in found.rules if rule.label != EVEN]
    charts.append(_difference_chart(compared, "Held-out loss less the evenly spaced plan's, on the same items."))
    if near:
        closer = [rule for rule in near if rule.label != EVEN]
        charts.append(_difference_chart(closer, f"The same, closer: the best {len(closer)}."))
    rows = []
    for rule in found.rules:
        share = rule.bytes_per_token / found.full_bytes_per_token
        cells = [
            Cell(text=f"{len(rule.plan.leaders)} of {found.num_layers}"),
            Cell(text=format_bytes(rule.bytes_per_token), notes=(f"{share:.3g}x",)),
            Cell(text=fixed(rule.predicted, 3)),
            Cell(text=fixed(rule.measured, 3)),
            score_cell(rule.loss, 3),
            _difference_cell(rule.against_even),
        ]
        rows.append(Row(heading=rule.label, cells=tuple(cells)))
    names = ("rule", "layers with a cache", "cache per token", "predicted", "measured", "held-out loss")
    table = Table(caption="Rules of choice", headings=headings(*names, "less evenly spaced"), rows=tuple(rows))
    return Section(
        anchor="plan-rules",
        title="Beside other rules",
        intro="What other ways to choose the layers give. Lower is better. Whiskers and small figures in brackets are "
        "95 % intervals over documents; the line is this plan's held-out loss. Held-out figures with a sign are the "
        "difference from the full cache.",
        parts=(Grid(parts=tuple(chart for chart in charts if chart is not None)), table),
    )


def _near(found: PlanFigures) -> list[Rule]:
    """Rules that lie close together beside others that are far off; none where all can be read."""
    full = found.held_out_full.value
    limit = 2.5 * max(rule.loss.value - full for rule in found.rules if rule in (found.rules[0], found.even))
    near = [rule for rule in found.rules if rule.loss.value - full <= limit]
    worst = max(rule.loss.value for rule in found.rules) - full
    return near if worst > 1.5 * limit > 0 and len(near) > 1 else []


def _rule_chart(found: PlanFigures, rules: Sequence[Rule], caption: str) -> Chart:
    svg = item_chart(
        [_rule_item(rule) for rule in rules],
        title=f"{caption} {', '.join(rule.label for rule in rules)}",
        reference=found.rules[0].loss.value,
        x_label="loss (nats per token)",
    )
    legend = (
        (swatch(_HELD_OUT, connected=False), "held out, with its 95 % interval"),
        (swatch(_MEASURED, connected=False), "calibration text, measured"),
        (swatch(_PREDICTED, connected=False), "calibration text, predicted"),
    )
    return Chart(svg=svg, caption=caption, legend=legend)


def _difference_chart(rules: Sequence[Rule], caption: str) -> Chart | None:
    items = [
        Item(
            label=rule.label,
            value=found.value,
            low=_or_nan(found.low),
            high=_or_nan(found.high),
            text=_difference(found),
            style=_HELD_OUT,
        )
        for rule, found in ((rule, rule.against_even) for rule in rules)
        if found is not None
    ]
    if not items:
        return None
    svg = item_chart(items, title=caption, reference=0.0, x_label="nats per token; to the left is better")
    return Chart(svg=svg, caption=caption)


def _rule_item(rule: Rule) -> Item:
    return Item(
        label=rule.label,
        value=rule.loss.value,
        low=rule.loss.low,
        high=rule.loss.high,
        text=f"{fixed(rule.loss.value, 3)} {interval(rule.loss.low, rule.loss.high, 3)}".strip(),
        style=_HELD_OUT,
        beside=(
            (rule.predicted, _PREDICTED, f"{rule.label}: {fixed(rule.predicted, 3)} predicted"),
            (rule.measured, _MEASURED, f"{rule.label}: {fixed(rule.measured, 3)} measured"),
        ),
    )


def _difference(found: Difference) -> str:
    return f"{signed(found.value, 3)} {interval(found.low, found.high, 3, sign=True)}".strip()


def _difference_cell(found: Difference | None) -> Cell:
    if found is None:
        return Cell(text="")
    around = interval(found.low, found.high, 3, sign=True)
    return Cell(text=signed(found.value, 3), notes=(around,) if around else (), faint=not found.is_clear)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value

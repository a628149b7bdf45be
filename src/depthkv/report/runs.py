"""What sections about evaluations have in common: the arms of one or several files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from depthkv.evaluate.intervals import Score
from depthkv.report.charts import Item, item_chart
from depthkv.report.parts import Cell, Chart, Row, fixed, interval
from depthkv.report.reading import ArmFigures, EvaluationFigures

Runs = Mapping[str, EvaluationFigures]
"""Files of `depthkv evaluate` by their labels."""


def arm_name(runs: Runs, label: str, arm: ArmFigures) -> str:
    """With its file's label where there are several."""
    return arm.label if len(runs) == 1 else f"{label}: {arm.label}"


def arm_rows(runs: Runs, cells: Callable[[ArmFigures, EvaluationFigures], Sequence[Cell]]) -> tuple[Row, ...]:
    """A row for each arm that has anything to show, below its file's label where there are several."""
    rows = []
    for label, run in runs.items():
        own = [Row(heading=arm.label, cells=tuple(cells(arm, run))) for arm in run.arms]
        own = [row for row in own if any(cell.text for cell in row.cells)]
        if own and len(runs) > 1:
            rows.append(Row(heading=label))
        rows += own
    return tuple(rows)


def score_item(label: str, score: Score, digits: int, style: int, unit: str = "") -> Item:
    """A dot with its interval, the figures in words beside it."""
    words = f"{fixed(score.value, digits)}{unit} {interval(score.low, score.high, digits)}".strip()
    return Item(label=label, value=score.value, low=score.low, high=score.high, text=words, style=style)


def measure_chart(runs: Runs, key: str, caption: str, digits: int, *, full: bool = False) -> Chart | None:
    """Dots of one measure, the arms below each other; None where no file has it.

    Args:
        runs: the files.
        key: of `ArmFigures.scores`.
        caption: what it is, with its unit.
        digits: of the figures.
        full: with the full cache, which is left out where its figure is given.
    """
    items: list[Item] = []
    for number, (label, run) in enumerate(runs.items()):
        arms = [arm for i, arm in enumerate(run.arms) if key in arm.scores and (full or i > 0)]
        if arms and len(runs) > 1:
            items.append(Item(label=label))
        items += [score_item(arm.label, arm.scores[key], digits, number) for arm in arms]
    return Chart(svg=item_chart(items, title=caption), caption=caption) if items else None

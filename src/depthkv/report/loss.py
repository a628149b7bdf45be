"""Sections of the page about the loss, and the table of all results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from depthkv.memory import format_bytes
from depthkv.report.charts import Item, Line, Point, item_chart, line_chart, swatch
from depthkv.report.parts import (
    Cell,
    Chart,
    Grid,
    Row,
    Section,
    Table,
    fixed,
    headings,
    interval,
    listed,
    per_cent,
    score_cell,
    signed,
)
from depthkv.report.reading import ArmFigures, EvaluationFigures, Part, TextFigures
from depthkv.report.runs import Runs, arm_rows, score_item

_INTERVALS = (
    "Small figures are 95 % intervals from a bootstrap over documents; those with a sign are the difference from the "
    "same model's full cache on the same items, grey where its interval includes zero."
)
_MEASURES = (
    ("loss", "loss, nats per token", 3, ""),
    ("f1", "answers, F1", 1, " %"),
    ("retrieval", "retrieval", 1, " %"),
    ("top1", "same next token", 1, " %"),
    ("kl", "KL from the full cache, nats", 3, ""),
    ("exact_match", "answers, exact", 1, " %"),
    ("rouge_l", "answers, ROUGE-L", 1, " %"),
    ("perplexity", "perplexity", 0, ""),
    ("repetition", "repetition", 1, " %"),
)
"""Key, heading, digits and unit of the main table's columns."""


def loss_sections(runs: Runs) -> list[Section]:
    """Curve, results, loss by place and by kind of text, where the files have figures for them."""
    found = [maker(runs) for maker in (_curve, _results, _positions, _kinds)]
    return [section for section in found if section is not None and section.parts]


def _curve(runs: Runs) -> Section | None:
    having = {label: run for label, run in runs.items() if all("loss" in arm.scores for arm in run.arms)}
    lines = {label: _curve_line(label, run) for label, run in having.items()}
    if not lines or max(len(line.points) for line in lines.values()) < 2:
        return None
    ticks: dict[float, str] = {}
    for label, run in having.items():
        # points of several methods crowd around a size: the curves' own sizes are marked, where there are curves
        if not lines[label].connected and any(line.connected for line in lines.values()):
            continue
        for arm in run.arms:
            size = "" if arm.bytes_per_token is None else f"\n{_short_bytes(arm.bytes_per_token)}"
            ticks[100 * arm.cache_share] = max(ticks.get(100 * arm.cache_share, ""), per_cent(arm.cache_share) + size)
    parts: list[Grid] = []
    everything = list(lines.values())
    numbers = {label: i for i, label in enumerate(lines)}
    charts = [_curve_chart(everything, ticks, "Loss at each size of the cache.", numbers)]
    near = _near(everything)
    if near:
        caption = f"The same, closer: {listed([line.label for line in near])} alone."
        charts.append(_curve_chart(near, ticks, caption, numbers))
    parts.append(Grid(parts=tuple(charts)))
    aside = any(point.aside for line in everything for point in line.points)
    chosen = any(point.aside for line in everything for point in line.points if line.connected)
    if aside:
        items: list[Item] = []
        for number, (label, run) in enumerate(having.items()):
            items += [Item(label=label)] if len(having) > 1 else []
            items += [score_item(arm.label, arm.scores["loss"], 3, number) for arm in run.arms]
        svg = item_chart(items, title="Loss of each arm", x_label="loss (nats per token)")
        parts.append(Grid(parts=(Chart(svg=svg, caption="Each arm by its name."),)))
    return Section(
        anchor="curve",
        title="Loss against the size of the cache",
        intro="Lower is better. Whiskers are 95 % intervals over documents."
        + " Of several plans of one size, the line goes through the best." * chosen,
        parts=tuple(parts),
    )


def _curve_line(label: str, run: EvaluationFigures) -> Line:
    arms = sorted(run.arms, key=lambda arm: arm.cache_share)
    sizes = [round(arm.cache_share, 2) for arm in arms]
    # several methods at one size are no curve; of several plans the best one is on it
    connected = len(set(sizes)) == len(sizes) or all(arm.bytes_per_token is not None for arm in arms)
    points = []
    for arm, size in zip(arms, sizes, strict=True):
        loss = arm.scores["loss"]
        rivals = [other for other, own in zip(arms, sizes, strict=True) if own == size]
        best = min(rivals, key=lambda other: other.scores["loss"].value)
        words = f"{label}, {arm.label}: {fixed(loss.value, 3)} {interval(loss.low, loss.high, 3)}".strip()
        points.append(
            Point(
                x=100 * arm.cache_share, y=loss.value, low=loss.low, high=loss.high, words=words, aside=arm is not best
            )
        )
    return Line(label=label, points=tuple(points), connected=connected)


def _near(lines: Sequence[Line]) -> list[Line]:
    """Lines that lie so close together that they are flat beside the others; none where all can be read."""
    values = [point.y for line in lines for point in line.points]
    limit = min(values) + (max(values) - min(values)) / 4
    near = [line for line in lines if max(point.y for point in line.points) <= limit]
    return near if len(near) < len(lines) else []


def _curve_chart(lines: Sequence[Line], ticks: Mapping[float, str], caption: str, numbers: Mapping[str, int]) -> Chart:
    shown = {point.x for line in lines for point in line.points}
    svg = line_chart(
        lines,
        [(x, words) for x, words in ticks.items() if x in shown],
        title=f"{caption} {listed([line.label for line in lines])}",
        x_label="size of the cache, and what a token costs in it",
        y_label="loss (nats per token)",
        log_x=True,
        labelled=True,
        styles=[numbers[line.label] for line in lines],
    )
    legend = [(swatch(numbers[line.label], connected=line.connected), line.label) for line in lines]
    return Chart(svg=svg, caption=caption, legend=tuple(legend) if len(numbers) > 1 else ())


def _results(runs: Runs) -> Section | None:
    arms = [arm for run in runs.values() for arm in run.arms]
    columns = [
        measure
        for measure in _MEASURES
        if any(measure[0] in arm.scores for arm in arms)
        or (measure[0] == "perplexity" and any(arm.perplexity is not None for arm in arms))
    ]
    if not columns:
        return None

    def cells(arm: ArmFigures, run: EvaluationFigures) -> list[Cell]:
        made = [Cell(text=f"{len(arm.plan.leaders)} of {run.num_layers}"), _size_cell(arm)]
        for key, _, digits, unit in columns:
            if key == "perplexity":
                made.append(Cell(text="" if arm.perplexity is None else _perplexity(arm.perplexity)))
            else:
                made.append(score_cell(arm.scores.get(key), digits, unit))
        return made

    names = ["arm", "layers with a cache", "cache per token", *(name for _, name, _, _ in columns)]
    table = Table(caption="Results of every arm", headings=headings(*names), rows=arm_rows(runs, cells))
    return Section(anchor="results", title="Results", intro=_INTERVALS, parts=(table,))


def _positions(runs: Runs) -> Section | None:
    parts: list[Table | Chart] = []
    tables = []
    for label, texts in _by_text(runs):
        arms = [(arm, text) for arm, text in texts if text.positions]
        if not arms:
            continue
        name = arms[0][1].name if len(runs) == 1 else f"{label}: {arms[0][1].name}"
        compared = [(arm, text) for arm, text in arms if all(p.score.difference is not None for p in text.positions)]
        if compared and len(compared[0][1].positions) > 1:
            parts.append(_position_chart(name, compared))
        ranges = [_range(part) for part in arms[0][1].positions]
        rows = [
            Row(heading=arm.label, cells=tuple(score_cell(part.score, 3) for part in text.positions))
            for arm, text in arms
        ]
        caption = f"Figures: loss by place in the text, {name}"
        tables.append(Table(caption=caption, headings=headings("tokens", *ranges), rows=tuple(rows), folded=True))
    intro = (
        "How much more a token costs than with the full cache, by its place in the text. A line that rises says that "
        "sharing hurts late tokens more than early ones."
    )
    return Section(
        anchor="positions",
        title="Loss by place in the text",
        intro=intro,
        parts=((Grid(parts=tuple(parts)),) if parts else ()) + tuple(tables),
    )


def _position_chart(name: str, compared: Sequence[tuple[ArmFigures, TextFigures]]) -> Chart:
    lines = []
    for arm, text in compared:
        points = []
        for i, part in enumerate(text.positions):
            found = part.score
            around = interval(found.difference_low, found.difference_high, 3, sign=True)
            words = f"{arm.label}, tokens {_range(part)}: {signed(found.difference or 0.0, 3)} {around}".strip()
            points.append(
                Point(
                    x=float(i),
                    y=found.difference or 0.0,
                    low=_or_nan(found.difference_low),
                    high=_or_nan(found.difference_high),
                    words=words,
                )
            )
        lines.append(Line(label=arm.label, points=tuple(points)))
    svg = line_chart(
        lines,
        [(float(i), _range(part)) for i, part in enumerate(compared[0][1].positions)],
        title=f"Loss above the full cache by place in the text, {name}",
        x_label="tokens of the text",
        y_label="loss above the full cache (nats per token)",
        zero=True,
    )
    legend = tuple((swatch(i), line.label) for i, line in enumerate(lines))
    return Chart(svg=svg, caption=name, legend=legend)


def _kinds(runs: Runs) -> Section | None:
    names = {text.name: text.documents for run in runs.values() for arm in run.arms for text in arm.texts}
    if len(names) < 2:
        return None  # the main table says it

    def cells(arm: ArmFigures, run: EvaluationFigures) -> list[Cell]:
        found = {text.name: text.loss for text in arm.texts}
        return [score_cell(found.get(name), 3) for name in names]

    columns = [f"{name} ({count:,} document{'s' * (count != 1)})" for name, count in names.items()]
    table = Table(caption="Loss by kind of text", headings=headings("arm", *columns), rows=arm_rows(runs, cells))
    return Section(anchor="kinds", title="Loss by kind of text", intro="Nats per token.", parts=(table,))


def _by_text(runs: Runs) -> list[tuple[str, list[tuple[ArmFigures, TextFigures]]]]:
    """For each run and kind of text the arms that have it."""
    found = []
    for label, run in runs.items():
        for name in dict.fromkeys(text.name for arm in run.arms for text in arm.texts):
            pairs = [(arm, text) for arm in run.arms for text in arm.texts if text.name == name]
            found.append((label, pairs))
    return found


def _range(part: Part) -> str:
    return f"{part.first:,}\u2013{part.tokens:,}"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _size_cell(arm: ArmFigures) -> Cell:
    share = f"{arm.cache_share:.3g}x"
    if arm.bytes_per_token is None:
        return Cell(text=share)
    return Cell(text=format_bytes(arm.bytes_per_token), notes=(share,))


def _short_bytes(num_bytes: int) -> str:
    number, _, unit = format_bytes(num_bytes).partition(" ")
    return f"{float(number):.3g} {unit}"


def _perplexity(value: float) -> str:
    return fixed(value, 2 if value < 100 else 0) if value < 1e6 else f"{value:.1e}"

"""Sections of the page about agreement, answers, retrieval and text that is written, and the plans."""

from __future__ import annotations

from collections.abc import Sequence

from depthkv.plan import SharingPlan
from depthkv.report.charts import COLOURS
from depthkv.report.parts import (
    Cell,
    Chart,
    Grid,
    Heading,
    PlanPart,
    Row,
    Section,
    Table,
    Texts,
    fixed,
    headings,
    per_cent,
    score_cell,
)
from depthkv.report.reading import ArmFigures, EvaluationFigures, Part
from depthkv.report.runs import Runs, arm_name, arm_rows, measure_chart


def suite_sections(runs: Runs) -> list[Section]:
    """Agreement, answers, retrieval, health, samples and plans, where the files have figures for them."""
    found = [maker(runs) for maker in (_agreement, _answers, _retrieval, _health, _samples, _plans)]
    return [section for section in found if section is not None and section.parts]


def _agreement(runs: Runs) -> Section | None:
    charts = [
        measure_chart(runs, "top1", "Tokens of the text at which the likeliest next token is the full cache's, %", 1),
        measure_chart(runs, "kl", "Kullback-Leibler divergence from the full cache's distribution, nats", 3),
    ]
    return Section(
        anchor="agreement",
        title="Agreement with the full cache",
        intro="How much of what the model itself would say is left, whatever the text says. A model that was trained "
        "is compared with its own full cache.",
        parts=_grid(charts),
    )


def _answers(runs: Runs) -> Section | None:
    found = [arm.scores["f1"] for run in runs.values() for arm in run.arms if "f1" in arm.scores]
    if not found:
        return None
    charts = [
        measure_chart(runs, "f1", "F1 of the words, %", 1, full=True),
        measure_chart(runs, "exact_match", "Exact match, %", 1, full=True),
    ]
    intro = f"{found[0].count:,} questions about a passage, answered greedily. Higher is better."
    return Section(anchor="answers", title="Answers to questions", intro=intro, parts=_grid(charts))


def _retrieval(runs: Runs) -> Section | None:
    places: dict[str, dict[int, None]] = {}
    for run in runs.values():
        for arm in run.arms:
            for part in arm.tasks:
                places.setdefault(part.name, {})[part.tokens] = None
    if not places:
        return None
    columns = [(task, tokens) for task, lengths in places.items() for tokens in sorted(lengths)]

    def cells(arm: ArmFigures, run: EvaluationFigures) -> list[Cell]:
        found = {(part.name, part.tokens): part.score for part in arm.tasks}
        return [score_cell(found.get(column), 0) for column in columns]

    upper = (Heading(text="task"), *(Heading(text=task, span=len(lengths)) for task, lengths in places.items()))
    lower = (Heading(text="tokens"), *(Heading(text=f"{tokens:,}") for _, tokens in columns))
    table = Table(caption="Retrieval by task and length, %", headings=(upper, lower), rows=arm_rows(runs, cells))
    maps = [
        _heat_map(arm_name(runs, label, arm), arm.depths)
        for label, run in runs.items()
        for arm in run.arms
        if arm.depths
    ]
    intro = (
        "What was hidden in a long text and found again, per cent of the items. "
        + ("The maps are of the single needle: how long the text was, and how deep in it the needle lay. " * bool(maps))
        + "Higher is better."
    )
    return Section(
        anchor="retrieval", title="Retrieval", intro=intro, parts=(table, *((Grid(parts=tuple(maps)),) if maps else ()))
    )


def _heat_map(caption: str, depths: Sequence[Part]) -> Table:
    lengths = sorted({part.tokens for part in depths})
    found = {(part.depth, part.tokens): part.score for part in depths}
    rows = []
    for depth in sorted({part.depth for part in depths}):
        cells = []
        for tokens in lengths:
            score = found.get((depth, tokens))
            heat = None if score is None else min(1.0, max(0.0, score.value / 100))
            cells.append(Cell(text="" if score is None else fixed(score.value, 0), heat=heat))
        rows.append(Row(heading=per_cent(depth), cells=tuple(cells)))
    names = headings("depth \\ tokens", *(f"{tokens:,}" for tokens in lengths))
    return Table(caption=caption, headings=names, rows=tuple(rows), kind="heat")


def _health(runs: Runs) -> Section | None:
    measures = (
        ("repetition", "repeated runs of words", " %"),
        ("length", "length, tokens", ""),
        ("ended", "ended by itself", " %"),
        ("same_prefix", "tokens like the full cache's", ""),
    )
    if not any("repetition" in arm.scores for run in runs.values() for arm in run.arms):
        return None

    def cells(arm: ArmFigures, run: EvaluationFigures) -> list[Cell]:
        return [score_cell(arm.scores.get(key), 1, unit) for key, _, unit in measures]

    names = headings("arm", *(name for _, name, _ in measures))
    table = Table(caption="Health of what the model writes", headings=names, rows=arm_rows(runs, cells))
    intro = (
        "Of text written greedily. Runs of four tokens that occurred before: some are normal, nearly all of them are a "
        "loop. The last column is how far a text goes before it first differs from the full cache's."
    )
    return Section(anchor="health", title="What the model writes", intro=intro, parts=(table,))


def _samples(runs: Runs) -> Section | None:
    columns: dict[str, list[tuple[str, str]]] = {}
    for label, run in runs.items():
        for arm in run.arms:
            for prompt, text in arm.samples:
                name = arm_name(runs, label, arm)
                columns.setdefault(prompt, []).append((name, text.strip()))
    parts = tuple(Texts(prompt=prompt, columns=tuple(found)) for prompt, found in columns.items())
    return Section(anchor="samples", title="Sample texts", intro="What each arm wrote after a prompt.", parts=parts)


def _plans(runs: Runs) -> Section | None:
    owners: dict[SharingPlan, list[str]] = {}
    for label, run in runs.items():
        # where every layer keeps its own there is nothing to see: the full cache, or another method's arm
        for arm in run.arms:
            if not arm.plan.is_full:
                owners.setdefault(arm.plan, []).append(arm_name(runs, label, arm))
    parts = []
    for plan, names in owners.items():
        colours = {leader: i % COLOURS + 1 for i, leader in enumerate(plan.leaders)}
        layers = tuple((layer, source, colours[source]) for layer, source in enumerate(plan.kv_source_layers))
        summary = f"{len(plan.leaders)} of {plan.num_layers} layers keep a cache"
        parts.append(PlanPart(labels="; ".join(names), summary=summary, layers=layers))
    return Section(
        anchor="plans",
        title="Plans",
        intro="Filled: a layer that keeps its cache. Outlined: one that keeps none and reads that of the layer at the "
        "arrow. Arms whose layers all keep their own are left out.",
        parts=tuple(parts),
    )


def _grid(charts: Sequence[Chart | None]) -> tuple[Grid, ...]:
    """One, or none where there is nothing to show."""
    found = tuple(chart for chart in charts if chart is not None)
    return (Grid(parts=found),) if found else ()

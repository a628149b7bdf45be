"""One HTML page of what was measured: no script, no network, light and dark."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from depthkv.errors import DepthKVError
from depthkv.evaluate.intervals import BETTER_THAN_FULL, Score
from depthkv.report.generation_reading import GenerationFigures
from depthkv.report.generation_sections import (
    Generations,
    generation_sections,
    generation_warnings,
    generation_words,
)
from depthkv.report.loss import loss_sections
from depthkv.report.parts import (
    Cell,
    Code,
    Row,
    Section,
    Table,
    change_words,
    fixed,
    headings,
    interval,
    per_cent,
    signed,
)
from depthkv.report.plan_reading import PlanFigures
from depthkv.report.plan_sections import Plans, plan_sections, plan_words
from depthkv.report.reading import AnyFigures, ArmFigures, BenchFigures, EvaluationFigures
from depthkv.report.recipe_reading import RecipeFigures
from depthkv.report.recipe_sections import Recipes, recipe_sections, recipe_words
from depthkv.report.runs import Runs
from depthkv.report.speed import Benches, bench_words, speed_sections
from depthkv.report.suites import suite_sections

if TYPE_CHECKING:
    import jinja2

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the report is."""

    html: str
    """The whole file."""
    verdict: str
    """Its first sentence."""


def build_page(files: Sequence[AnyFigures], labels: Sequence[str] | None = None) -> Page:
    """The page of some files. The same files and labels give the same page.

    Args:
        files: from `read_figures`, at least one.
        labels: one for each file; None takes the names of the models.

    Raises:
        DepthKVError: no files, another number of labels, or labels of one kind of file that are not different.
    """
    if not files:
        raise DepthKVError("expected at least one file, got none")
    if labels is not None and len(labels) != len(files):
        raise DepthKVError(f"expected a label for each of {len(files)} files, got {len(labels)}")
    runs: dict[str, EvaluationFigures] = {}
    benches: dict[str, BenchFigures] = {}
    plans: dict[str, PlanFigures] = {}
    recipes: dict[str, RecipeFigures] = {}
    generations: dict[str, GenerationFigures] = {}
    for i, figures in enumerate(files):
        own = _of_its_kind(figures, runs, benches, plans, recipes, generations)
        label = _own_label(figures, own) if labels is None else labels[i]
        if label in own:
            raise DepthKVError(f"expected labels that are different, got {label!r} twice")
        own[label] = figures
    sections = [*plan_sections(plans), *recipe_sections(recipes), *loss_sections(runs), *suite_sections(runs)]
    sections += [*generation_sections(generations), *speed_sections(benches)]
    sections += _about(runs, benches, plans, recipes, generations, _own_command(files, labels))
    models = dict.fromkeys(figures.model for figures in files)
    sentence = verdict(runs, benches, plans, recipes, generations)
    html = _template().render(
        title=f"depthkv report: {', '.join(models)}",
        models=list(models),
        verdict=sentence,
        facts=_facts(runs, plans),
        warnings=[*_warnings(runs, plans), *generation_warnings(generations)],
        sections=sections,
        # our own file; it must not be escaped
        style=Markup((_FOLDER / "style.css").read_text(encoding="utf-8")),
    )
    # half of a surrogate pair is valid in JSON and not in UTF-8
    whole = [text.encode("utf-8", "replace").decode("utf-8") for text in (html, sentence)]
    return Page(html=f"{whole[0]}\n", verdict=whole[1])


@cache
def _template() -> jinja2.Template:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.jinja")


def verdict(runs: Runs, benches: Benches, plans: Plans, recipes: Recipes, generations: Generations) -> str:
    """One sentence from the figures."""
    parts = [*_quality_words(runs), *plan_words(plans), *recipe_words(recipes), *generation_words(generations)]
    parts = [f"{part[0].upper()}{part[1:]}" if i == 0 else part for i, part in enumerate(parts)]
    speed = list(bench_words(benches))
    if speed:
        clause = ", ".join(speed)
        parts.append(clause if parts else f"{clause[0].upper()}{clause[1:]}")
    return f"{'; '.join(parts)}." if parts else "The files hold the full cache's figures alone."


def _quality_words(runs: Runs) -> list[str]:
    """Loss, answers and retrieval, since each may be kept while another is lost; the other measures where alone.

    At the size of the cache that is nearest to a half and that most files have, for each file's best arm there.
    """
    tasks = (
        ("loss", "loss", " nats", " per token", 2),
        ("f1", "F1", " points", "", 1),
        ("retrieval", "retrieval", " points", "", 1),
    )
    others = (
        ("kl", "divergence from the full cache", " nats", "", 3),
        ("top1", "agreement with the full cache", " points", "", 1),
        ("repetition", "repetition", " points", "", 1),
    )
    return _clauses(runs, tasks) or _clauses(runs, others)[:1]


def _clauses(runs: Runs, measures: Sequence[tuple[str, str, str, str, int]]) -> list[str]:
    clauses: list[str] = []
    said = ""
    for key, name, unit, per, digits in measures:
        by_share: dict[int, dict[str, list[ArmFigures]]] = {}
        for label, run in runs.items():
            for arm in run.arms[1:]:
                if key in arm.scores and key in run.arms[0].scores and arm.scores[key].difference is not None:
                    by_share.setdefault(round(20 * arm.cache_share), {}).setdefault(label, []).append(arm)
        if not by_share:
            continue
        share = min(by_share, key=lambda share: (-len(by_share[share]), abs(share - 10), share))
        lower = key in ("loss", "kl", "repetition")
        changes, shares = [], set()
        for label, arms in by_share[share].items():
            best = min(arms, key=lambda arm: arm.scores[key].value if lower else -arm.scores[key].value)
            shares |= {per_cent(arm.cache_share) for arm in arms}
            whose = "" if len(runs) == 1 else label
            if len(arms) > 1:
                whose = f"{whose}, best of {len(arms)}: {best.label}".removeprefix(", ")
            full = runs[label].arms[0].scores[key]
            if len(runs) == 1:
                changes.append(change_words(best.scores[key], full, digits, unit, per, whose))
            else:
                around = _around(best.scores[key], digits)
                amount = f"{signed(best.scores[key].difference or 0.0, digits)} {around}".rstrip()
                changes.append(f"{amount} to {fixed(best.scores[key].value, digits)} ({whose})")
        if len(runs) > 1:
            changes[0] = f"changes by {changes[0]}"
            name = f"{name}{' in' * bool(unit)}{unit}{per}"
        size = shares.pop() if len(shares) == 1 else f"about {per_cent(share / 20)}"
        place = f"at {size} of the cache, "
        clauses.append(f"{'' if place == said else place}{name} {', '.join(changes)}")
        said = place
    return [f"{clause[0].upper()}{clause[1:]}" if i == 0 else clause for i, clause in enumerate(clauses)]


def _around(found: Score, digits: int) -> str:
    return interval(found.difference_low, found.difference_high, digits, sign=True)


def _of_its_kind(
    figures: AnyFigures, runs: Runs, benches: Benches, plans: Plans, recipes: Recipes, generations: Generations
) -> Any:
    """The files that a file stands beside."""
    kinds = {
        EvaluationFigures: runs,
        BenchFigures: benches,
        PlanFigures: plans,
        RecipeFigures: recipes,
        GenerationFigures: generations,
    }
    return kinds[type(figures)]


def _own_label(figures: AnyFigures, taken: Mapping[str, object]) -> str:
    """The model's name, with the file's where another has it, too."""
    label = figures.model
    if label in taken:
        label = f"{figures.model} ({Path(figures.file).stem})"
    number = 2
    while label in taken:
        label = f"{figures.model} ({Path(figures.file).stem}, {number})"
        number += 1
    return label


def _own_command(files: Sequence[AnyFigures], labels: Sequence[str] | None) -> str:
    words = [word for label in labels or () for word in ("--label", label)]
    return shlex.join(["depthkv", "report", *(figures.file for figures in files), *words, "--out", "report.html"])


def _facts(runs: Runs, plans: Plans) -> str:
    """What was measured on, in a line; empty where files differ in it."""
    if not runs and len(plans) == 1:
        settings = next(iter(plans.values())).settings
        losses = settings["of it for the cost map"]
        compared = settings["calibration text"]
        return f"Text: {settings['text']}; layers compared on {compared}, losses of {losses}; {settings['dtype']}."
    found = list(dict.fromkeys(tuple(run.settings.items()) for run in runs.values()))
    if len(found) != 1:
        return ""
    settings = dict(found[0])
    held = "held out from training" if settings["held out from training"] == "yes" else "all of it"
    return f"Text: {settings['text']}, {held}; {settings['blocks of each text']}; {settings['dtype']}."


def _warnings(runs: Runs, plans: Plans) -> list[str]:
    """What makes files hard to compare."""
    warnings = []
    keys = list(dict.fromkeys(key for run in runs.values() for key in run.settings))
    different = [key for key in keys if len({run.settings.get(key) for run in runs.values()}) > 1]
    if different:
        warnings.append(
            f"The files were not measured alike: they differ in {', '.join(different)}. Differences within a file hold."
        )
    if any(not run.held_out for run in runs.values()):
        warnings.append("Measured on all of the text: a model that was trained on it does better here than elsewhere.")
    losses = [arm.scores["loss"] for run in runs.values() for arm in run.arms[1:] if "loss" in arm.scores]
    losses += [found.rules[0].loss for found in plans.values()]
    if any(score.difference_high is not None and score.difference_high < 0 for score in losses):
        warnings.append(BETTER_THAN_FULL)
    counts = [arm.scores["loss"] for run in runs.values() for arm in run.arms if "loss" in arm.scores]
    counts += [found.rules[0].loss for found in plans.values()]
    if any(score.low != score.low for score in counts):
        warnings.append("Where an interval is missing, there was one document alone, which gives none.")
    return warnings


def _about(
    runs: Runs, benches: Benches, plans: Plans, recipes: Recipes, generations: Generations, own_command: str
) -> list[Section]:
    """Provenance, environment and commands."""
    sections = []
    made = {label: run.provenance for label, run in runs.items() if run.provenance}
    if made:
        intro = "How the models were made, as their checkpoints say."
        table = _entries("Provenance", made)
        sections.append(Section(anchor="provenance", title="Provenance", intro=intro, parts=(table,)))
    columns: dict[str, Mapping[str, str]] = {}
    for label, found in plans.items():
        own = f"{label} (plan)" if runs or benches or recipes or generations else label
        columns[own] = {"model": found.model, **found.settings, **found.environment}
    for label, chosen in recipes.items():
        own = f"{label} (recipe)" if runs or benches or plans or generations else label
        columns[own] = {"model": chosen.model, **chosen.settings, **chosen.environment}
    for label, run in runs.items():
        columns[label] = {"model": run.model, **run.settings, **run.environment}
    for label, text in generations.items():
        own = f"{label} (text)" if runs or benches or plans or recipes else label
        columns[own] = {"model": text.model, **text.settings, **text.environment}
    for label, bench in benches.items():
        own = f"{label} (speed)" if runs or plans or recipes or generations else label
        columns[own] = {"model": bench.model, **bench.environment}
    table = _entries("Settings and environment", columns)
    sections.append(
        Section(anchor="environment", title="Environment", intro="What it was measured with.", parts=(table,))
    )
    written = [found.command for kind in (plans, recipes, runs, generations, benches) for found in kind.values()]
    commands = [command for command in dict.fromkeys(written) if command]
    intro = "The first commands write the JSON files that the last one reads." if commands else ""
    code = Code(caption="Commands", text="\n".join([*commands, own_command]))
    sections.append(Section(anchor="commands", title="To reproduce", intro=intro, parts=(code,)))
    return sections


def _entries(caption: str, columns: Mapping[str, Mapping[str, str]]) -> Table:
    """A row for each name, a column for each file."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = tuple(
        Row(heading=name, cells=tuple(Cell(text=column.get(name, "")) for column in columns.values())) for name in names
    )
    return Table(caption=caption, headings=headings("", *columns), rows=rows, kind="words")

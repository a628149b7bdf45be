"""JSON files of `depthkv evaluate`, `bench`, `plan` and `generate`, checked key by key."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from depthkv.compress.figures import FORMAT as RECIPE_FORMAT
from depthkv.errors import DepthKVError
from depthkv.evaluate.intervals import Score
from depthkv.plan import SharingPlan
from depthkv.planner.figures import FORMAT as PLAN_FORMAT
from depthkv.report.checked import CheckedObject, kind
from depthkv.report.generation_reading import FORMAT as GENERATION_FORMAT
from depthkv.report.generation_reading import GenerationFigures, generation_figures
from depthkv.report.plan_reading import PlanFigures, plan_figures
from depthkv.report.recipe_reading import RecipeFigures, recipe_figures

FORMAT, VERSION = "depthkv-evaluation", 1
HEALTH = ("repetition", "length", "ended", "same_prefix")
ANSWERS = ("f1", "exact_match", "rouge_l")
SPEEDS = ("ttft_s", "itl_s", "decode_tokens_per_s", "cache_bytes", "peak_bytes", "peak_above_start_bytes")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A score of one part of the text or of the prompts."""

    name: str
    """Kind of text or task; empty where the place says it all."""
    tokens: int = 0
    """Length of the prompts, or the last token of a range."""
    first: int = 0
    """Of a range of tokens."""
    depth: float = 0.0
    """Of a needle: share of the text before it."""
    score: Score


@dataclass(frozen=True, kw_only=True)
class TextFigures:
    """The loss on one kind of text."""

    name: str
    documents: int
    loss: Score
    """Nats per token."""
    positions: tuple[Part, ...]
    """By place in the text."""


@dataclass(frozen=True, kw_only=True)
class ArmFigures:
    """One row of an evaluation."""

    label: str
    plan: SharingPlan
    bytes_per_token: int | None
    """Of the cache, where the plan alone says it."""
    cache_share: float
    """Bytes of the cache, 1 is the full cache's."""
    perplexity: float | None
    scores: Mapping[str, Score]
    """By measure: loss (nats), top1 (%), kl (nats), those of `HEALTH` and `ANSWERS`, retrieval (%)."""
    texts: tuple[TextFigures, ...]
    samples: tuple[tuple[str, str], ...]
    """Prompts and what was written after them."""
    tasks: tuple[Part, ...]
    """Of retrieval."""
    depths: tuple[Part, ...]
    """Of the needle."""


@dataclass(frozen=True, kw_only=True)
class EvaluationFigures:
    """A file of `depthkv evaluate`. The first arm is the full cache."""

    file: str
    """Its name without folders."""
    model: str
    data: tuple[str, ...]
    held_out: bool
    settings: Mapping[str, str]
    """What was measured on, for the page: name to value."""
    provenance: Mapping[str, str]
    """How the model was made, where the file says it."""
    environment: Mapping[str, str]
    command: str
    num_layers: int
    arms: tuple[ArmFigures, ...]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median of some runs, with the smallest and the largest."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class BenchCell:
    """What was measured under one plan, at one length and batch size."""

    retention: float | None
    leaders: int | None
    recipe: str
    """What a recipe says of itself; empty without one."""
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    arms: Mapping[str, Mapping[str, Spread]]
    """By arm and field of `SPEEDS`; fields that could not be measured are missing."""
    ratios: Mapping[str, float]
    """By field: shared / full, the median over pairs of runs."""
    roofline: Mapping[str, Mapping[str, float]]
    """By arm and figure, where the file has them."""
    out_of_memory: frozenset[str] = frozenset()
    """Arms that did not fit."""


@dataclass(frozen=True, kw_only=True)
class BenchFigures:
    """A file of `depthkv bench`."""

    file: str
    model: str
    cells: tuple[BenchCell, ...]
    environment: Mapping[str, str]
    command: str


AnyFigures = EvaluationFigures | BenchFigures | PlanFigures | GenerationFigures | RecipeFigures
"""What `read_figures` gives."""


def read_figures(path: str | os.PathLike[str]) -> AnyFigures:
    """Read a file that `--json` of `depthkv evaluate`, `bench`, `plan` or `generate` wrote.

    Keys that it does not know are left.

    Raises:
        DepthKVError: no such file, no JSON, or a key that is missing or holds something else; names the file and key.
    """
    try:
        # numbers that JSON does not have: our own commands write null for them
        data = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except OSError as error:
        raise DepthKVError(f"expected a JSON file at {Path(path)}, got {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DepthKVError(f"{Path(path)}: expected JSON, got {error or 'too deep a nesting'}") from error
    name = Path(path).name
    try:
        if not isinstance(data, dict):
            raise DepthKVError(f"expected a JSON object, got {kind(data)}")
        top = CheckedObject(data, "")
        if data.get("format") == FORMAT:
            return _evaluation(top, name)
        if data.get("format") == PLAN_FORMAT:
            return plan_figures(top, name)
        if data.get("format") == RECIPE_FORMAT:
            return recipe_figures(top, name)
        if data.get("format") == GENERATION_FORMAT:
            return generation_figures(top, name)
        if "format" not in data and "arms" in data:
            return _bench(top, name)
        got = (
            f"the format {data['format']!r}" if "format" in data else f"the keys {', '.join(list(data)[:8]) or 'none'}"
        )
        raise DepthKVError(f"expected what --json of evaluate, bench, plan or generate writes, got {got}")
    except DepthKVError as error:
        raise DepthKVError(f"{Path(path)}: {error}") from error


def _evaluation(top: CheckedObject, file: str) -> EvaluationFigures:
    if top.values.get("version") != VERSION or isinstance(top.values["version"], bool):
        raise top.wrong("version", str(VERSION))
    num_layers = top.whole("num_layers", 1)
    data = top.texts("data")
    rows = top.objects("rows")
    full = top.object("full_cache") if "full_cache" in top else next((row for row in rows if _is_full(row)), None)
    if full is None:
        raise top.wrong("rows", 'a list with the full cache, or "full_cache" beside it')
    ordered = [full, *(row for row in rows if row is not full)]
    arms = tuple(_arm(row, full, num_layers) for row in ordered)
    labels = [arm.label for arm in arms]
    for label in labels:
        if labels.count(label) > 1:
            raise DepthKVError(f"expected rows with a label of their own each, got {labels.count(label)} of {label!r}")
    return EvaluationFigures(
        file=file,
        model=top.text("model"),
        data=data,
        held_out=top.flag("held_out"),
        settings={
            "text": ", ".join(data),
            "held out from training": "yes" if top.flag("held_out") else "no",
            "blocks of each text": f"{top.whole('blocks', 1):,} blocks of {top.whole('block_size', 1):,} tokens",
            **(
                {"tokens of each block read as a prompt": f"{top.whole('streamed_prompt'):,}, others through the cache"}
                if "streamed_prompt" in top
                else {}
            ),
            **{row.text("label"): row.object("cache_recipe").text("words") for row in rows if "cache_recipe" in row},
            "dtype": top.text("dtype"),
            "seed": str(top.whole("seed", -(2**63))),
            "layers": str(num_layers),
        },
        provenance=top.object("provenance").shown() if "provenance" in top else {},
        environment=top.object("environment").shown(),
        command=top.text("command"),
        num_layers=num_layers,
        arms=arms,
    )


def _is_full(row: CheckedObject) -> bool:
    # another method keeps all layers, too: its bytes per token are not the plan's and left open
    return row.values.get("retention") == 1 and "kv_bytes_per_token" in row


def _arm(row: CheckedObject, full: CheckedObject, num_layers: int) -> ArmFigures:
    plan = row.plan("kv_source_layers", num_layers)
    own = row.whole("kv_bytes_per_token") if "kv_bytes_per_token" in row else None
    share = row.number("retention")
    if "cache_fraction" in row:
        share = row.number("cache_fraction")
    elif own is not None and "kv_bytes_per_token" in full:
        share = own / full.whole("kv_bytes_per_token", 1)
    if share <= 0:
        raise row.wrong("cache_fraction" if "cache_fraction" in row else "retention", "a number above 0")
    scores, sections = _scores(row)
    generation, retrieval = sections.get("generation"), sections.get("retrieval")
    return ArmFigures(
        label=row.text("label"),
        plan=plan,
        bytes_per_token=own,
        cache_share=share,
        perplexity=row.maybe_number("perplexity"),
        scores=scores,
        texts=tuple(map(_text, row.objects("texts"))) if "texts" in row else (),
        samples=tuple((sample.text("prompt"), sample.text("text")) for sample in generation.objects("samples"))
        if generation is not None and "samples" in generation
        else (),
        tasks=tuple(
            Part(name=part.text("task"), tokens=part.whole("tokens", 1), score=part.score("score"))
            for part in retrieval.objects("tasks")
        )
        if retrieval is not None
        else (),
        depths=tuple(
            Part(name="needle", tokens=part.whole("tokens", 1), depth=part.number("depth"), score=part.score("score"))
            for part in retrieval.objects("depths")
        )
        if retrieval is not None
        else (),
    )


def _scores(row: CheckedObject) -> tuple[dict[str, Score], dict[str, CheckedObject]]:
    """Scores by measure, and the sections that they are from."""
    scores: dict[str, Score] = {}
    if "loss_score" in row:
        scores["loss"] = row.score("loss_score")
    elif "loss" in row:
        raise row.wrong("loss_score", "an object beside the loss")
    sections = {name: row.object(name) for name in ("agreement", "generation", "qa", "retrieval") if name in row}
    names = {"agreement": ("top1", "kl"), "generation": HEALTH, "qa": ANSWERS}
    for section, keys in names.items():
        if section in sections:
            scores |= {key: sections[section].score(key) for key in keys}
    if "retrieval" in sections:
        scores["retrieval"] = sections["retrieval"].score("score")
    return scores, sections


def _text(found: CheckedObject) -> TextFigures:
    return TextFigures(
        name=found.text("data"),
        documents=found.whole("documents"),
        loss=found.score("loss"),
        positions=tuple(
            Part(name="", first=part.whole("first"), tokens=part.whole("last"), score=part.score("loss"))
            for part in found.objects("positions")
        ),
    )


def _bench(top: CheckedObject, file: str) -> BenchFigures:
    cells = top.objects("cells") if "cells" in top else [top]
    if not cells:
        raise top.wrong("cells", "a list of at least one object")
    environment = top.object("environment").shown() if "environment" in top else {}
    plain = ("device", "threads", "torch", "dtype", "repeats", "seed")
    environment |= {name: text for name, text in top.shown().items() if name in plain and name not in environment}
    return BenchFigures(
        file=file,
        model=top.text("model"),
        cells=tuple(map(_cell, cells)),
        environment=environment,
        command=top.text("command") if "command" in top else "",
    )


def _cell(cell: CheckedObject) -> BenchCell:
    arms = cell.object("arms")
    names = list(arms.values)
    if "full" not in names or len(names) < 2:
        raise cell.wrong("arms", 'an object with "full" and another arm')
    ratios = cell.object("ratios") if "ratios" in cell else CheckedObject({}, "")
    roofline = cell.object("roofline") if "roofline" in cell else CheckedObject({}, "")
    return BenchCell(
        retention=cell.maybe_number("retention"),
        leaders=len(cell.sequence("leaders")) if "leaders" in cell else None,
        recipe=cell.object("cache_recipe").text("words") if "cache_recipe" in cell else "",
        prompt_tokens=cell.whole("prompt_tokens", 1),
        new_tokens=cell.whole("new_tokens", 1),
        batch_size=cell.whole("batch_size", 1),
        arms={name: _speeds(arms.object(name)) for name in sorted(names, key="full".__ne__)},
        ratios={field: ratios.number(field) for field in SPEEDS if field in ratios},
        roofline={
            name: {
                key: float(value)
                for key, value in roofline.object(name).values.items()
                if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            }
            for name in names
            if name in roofline
        },
        out_of_memory=frozenset(name for name in names if "out_of_memory" in arms.object(name)),
    )


def _speeds(arm: CheckedObject) -> dict[str, Spread]:
    found = {}
    if "out_of_memory" not in arm and not any(field in arm for field in SPEEDS):
        raise DepthKVError(f"expected {arm.place} to hold at least one of {', '.join(SPEEDS)}, got none")
    for field in SPEEDS:
        if field in arm:
            low, high = (arm.maybe_number(f"{field}_{end}") for end in ("min", "max"))
            value = arm.number(field)
            found[field] = Spread(value=value, low=value if low is None else low, high=value if high is None else high)
    return found

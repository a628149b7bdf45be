"""`depthkv plan --axes depth bits tokens`: a recipe for a budget, found by measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from depthkv.adaptive import Ladder
from depthkv.architectures import LayerKind
from depthkv.calibrate import Calibrator
from depthkv.checkpoint import load
from depthkv.cli import inputs
from depthkv.cli.inputs import naming
from depthkv.cli.output import bar, command_line, console, show, table, waiting, write_json
from depthkv.cli.plan import text_blocks
from depthkv.compress.figures import Rival, best_single, recipe_figures
from depthkv.compress.losses import RecipeLosses
from depthkv.compress.planner import Chosen, alone, choose_recipe, combined
from depthkv.compress.recipe import CacheRecipe
from depthkv.compress.rules import RULES
from depthkv.compress.space import Space
from depthkv.data import Document, split_documents
from depthkv.errors import DepthKVError, PlanError, RecipeError
from depthkv.machine import environment
from depthkv.memory import device_room, format_bytes
from depthkv.plan import SharingPlan
from depthkv.planner import Budget, Problem, make_plan
from depthkv.sharing import check_plan

RETENTION = 0.5
"""Of the plan that is searched for where none is given; the ladder goes through it."""

PROMPT_SHARE = 0.75
"""Of each block: it is read at once, and what follows is scored."""

RIVAL_EVALUATIONS = 8
"""For each single axis."""

MOST_TOKENS = 1024
"""Of a block, where nothing is said."""


@dataclass(frozen=True, kw_only=True)
class JointOptions:
    """What the command line says, checked."""

    model: str
    config: PreTrainedConfig
    kinds: tuple[LayerKind, ...]
    data: list[str]
    out: Path
    axes: tuple[str, ...]
    kv_budget: int | None
    """Bytes, in all with a context, per token without."""
    memory: int | None
    context: int | None
    batch: int
    plans: tuple[Path, ...]
    keep: frozenset[int]
    stages: tuple[int, ...]
    prefill_weight: float
    any_source: bool
    evaluations: int | None
    calibration: Path
    losses: Path
    validation: bool
    blocks: int
    cost_blocks: int
    held_out_blocks: int
    block_size: int | None
    batch_size: int
    seed: int
    dtype: str
    device: str
    json_file: Path | None

    @property
    def measured_tokens(self) -> int:
        """Of each block."""
        return self.block_size or min(MOST_TOKENS, self.context or MOST_TOKENS)


def choose_and_show(options: JointOptions) -> None:
    """Choose, compare on held-out documents, write the recipe and the figures."""
    tokens = options.measured_tokens
    with naming(options.model):
        inputs.require_positions(options.config, tokens, "--block-size")
    context = options.context or tokens
    if tokens > context:
        raise DepthKVError(f"--block-size: expected at most the {context} tokens of --context, got {tokens}")
    if tokens < 2:
        raise DepthKVError(f"--block-size: expected at least 2 tokens, got {tokens}")
    ladder = read_ladder(options.plans, options.kinds)
    if options.dtype != "auto":  # else bytes depend on the dtype of the weights
        _limit(options, inputs.DTYPES[options.dtype], context)
    texts = inputs.split_texts(options.data)
    if options.validation:
        texts = {name: halves_of_held_out(name, parts[1]) for name, parts in texts.items()}
    with waiting(f"loading {options.model}"):
        model, tokenizer, trained_for = load(options.model, dtype=options.dtype, device=options.device, progress=show)
        training, _ = text_blocks(texts, 0, tokenizer, tokens, options.cost_blocks)
        held_out, documents = text_blocks(texts, 1, tokenizer, tokens, options.held_out_blocks)
    seen = None if trained_for is None else trained_for.provenance.get("data")
    if not options.validation and seen is not None and set(texts) & set(seen if isinstance(seen, list) else [seen]):
        show(
            "the model was trained on documents that the recipe is chosen on, where fewer layers cost it less than "
            "elsewhere: --validation chooses on others"
        )
    limit, words = _limit(options, model.dtype, context)
    prompt_tokens = max(1, min(tokens - 1, round(PROMPT_SHARE * tokens)))
    begun = options.losses.exists()
    with naming("--losses"):
        losses = RecipeLosses(model, training, prompt_tokens, batch_size=options.batch_size, path=options.losses)
    with naming(options.model):
        if "depth" in options.axes and not ladder:
            ladder = _calibrated_ladder(options, model, tokenizer, texts)
        show(f"{'going on from' if begun else 'measurements are kept in'} {options.losses}")
        space = Space(
            options.config,
            model.dtype,
            context=context,
            plans=ladder,
            axes=options.axes,
            measured_tokens=tokens,
            batch=options.batch,
            working=options.memory is not None,
        )
        # what plans were searched for is better than its neighbours, and measured whatever is expected of it
        searched = [space.recipe(plan) for plan in ladder[: max(1, len(options.plans))] if "depth" in options.axes]
        rivals = _rivals(space, losses, limit, options.evaluations, searched)
        known = [*searched, *(rival.chosen.best.recipe for rival in rivals if rival.chosen is not None)]
        chosen = _choose(space, losses, limit, 24 if options.evaluations is None else options.evaluations, known)
        held = _held_out(chosen, rivals, RecipeLosses(model, held_out, prompt_tokens, batch_size=options.batch_size))
    figures = {
        "model": options.model,
        "data": list(texts),
        "command": command_line(),
        "environment": environment(next(model.parameters()).device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seed": options.seed,
        "budget": {"words": words, "bytes": limit, "context": context, "batch": options.batch},
        "text": {"blocks": len(training), "held_out_blocks": len(held_out), "block_size": tokens}
        | {"prompt_tokens": prompt_tokens},
        **recipe_figures(chosen, rivals, held, documents, options.seed),
    }
    _with_provenance(chosen.best.recipe, figures).save(options.out)
    write_json(options.json_file, figures)
    _show(figures, chosen, rivals, options.out)


def halves_of_held_out(name: str, held_out: list[Document]) -> tuple[list[Document], list[Document]]:
    """Held-out documents to choose on and others to compare on.

    Raises:
        DataError: too little text for two halves.
    """
    with naming(f"--data {name}"):
        return split_documents(held_out, held_out_fraction=0.5, seed=1)


def read_ladder(files: Sequence[Path], kinds: tuple[LayerKind, ...]) -> list[SharingPlan]:
    """The plans in the files, then those nested around them.

    Raises:
        PlanError: plans for other layers, or nested ones that are no plans.
    """
    plans = {file: inputs.read_plan(file, kinds) for file in files}
    found = list(plans.values())
    for file, plan in plans.items():
        with naming(file):
            found += nested_around(plan, kinds)
    return list(dict.fromkeys(found))


def nested_around(plan: SharingPlan, kinds: tuple[LayerKind, ...]) -> list[SharingPlan]:
    """Smaller and larger plans, by what the plan's provenance says; without a word of it, smaller ones by a rule.

    Where it says only in which order leaders are given up, larger plans are made from that: each layer that still
    follows reads what it reads in the plan.
    """
    ladder, found = Ladder.of(plan, kinds), []
    sources = plan.kv_source_layers
    while (below := ladder.smaller(sources)) is not None:
        found.append(SharingPlan(sources := below))
    larger = plan.provenance.get("larger", [])
    if not isinstance(larger, list):
        raise PlanError("expected a list of larger plans in the plan's provenance, got something else")
    found += [SharingPlan(entry) for entry in larger]
    gone: set[int] = set()
    for layer in () if larger else ladder.order:
        if layer not in plan.followers:
            break
        gone.add(layer)
        found.append(SharingPlan([source if i in gone else i for i, source in enumerate(plan.kv_source_layers)]))
    for made in found:
        check_plan(made, kinds)
    return found


def _limit(options: JointOptions, dtype: torch.dtype, context: int) -> tuple[int, str]:
    """Bytes of all sequences, and the budget in words."""
    name = "--kv-budget" if options.memory is None else "--memory"
    with naming(name):
        if options.memory is not None:
            limit = device_room(options.config, dtype, options.memory, context, 1)
        else:
            assert options.kv_budget is not None
            limit = options.kv_budget * (1 if options.context else context * options.batch)
        budget = Budget.of_bytes(limit, options.config, dtype, context=context, batch=options.batch)
        if sum(budget.leader_bytes) <= limit:
            raise DepthKVError(f"expected a budget that the full cache does not fit into, got {budget.words}")
    per_token = (
        "" if options.context or options.memory else f" ({format_bytes(limit / context / options.batch)} a token)"
    )
    return limit, budget.words + per_token


def _calibrated_ladder(
    options: JointOptions, model: Any, tokenizer: Any, texts: Mapping[str, Any]
) -> list[SharingPlan]:
    """A plan and those nested around it, as `depthkv plan --retention .5` finds them."""
    block_size = options.block_size or 512
    training = text_blocks(dict(texts), 0, tokenizer, block_size, options.blocks)
    problem = Problem(
        kinds=options.kinds,
        budget=Budget.of_retention(RETENTION, options.config, model.dtype),
        keep=options.keep,
        stages=options.stages,
        prefill_weight=options.prefill_weight,
        any_source=options.any_source,
    )
    with naming("--calibration"):
        calibrator = Calibrator(
            model,
            *training,
            cost_blocks=options.cost_blocks,
            batch_size=options.batch_size,
            path=options.calibration,
            bar=bar,
        )
    try:
        calibrator.measure_similarity()
        calibrator.measure_outputs()
        calibrator.measure_costs()
        evaluations = 60 if options.evaluations is None else options.evaluations
        planned = make_plan(calibrator, problem, evaluations=evaluations, seed=options.seed, bar=bar)
    finally:
        calibrator.save()
    return list(dict.fromkeys([planned.plan, *(plan for plan in planned.nested if not plan.is_full)]))


def _choose(space: Space, losses: RecipeLosses, limit: int, evaluations: int, known: Sequence[CacheRecipe]) -> Chosen:
    with bar("measuring recipes", _expected(space, limit, evaluations)) as advance:
        return choose_recipe(space, losses, limit, evaluations=evaluations, known=known, advance=advance)


def _expected(space: Space, limit: int, evaluations: int) -> int:
    """Measurements of one search, about."""
    expected = 1 + len(alone(space, limit)) + len(combined(space, limit)) + evaluations
    expected += 2 * len(RULES) * bool(space.token_budgets())
    return expected + len(space.kinds) // 2 * ("bits" in space.axes)


def _rivals(
    space: Space, losses: RecipeLosses, limit: int, evaluations: int | None, searched: Sequence[CacheRecipe]
) -> list[Rival]:
    """The best recipe of each axis alone."""
    if len(space.axes) == 1:
        return []
    rivals = []
    number = RIVAL_EVALUATIONS if evaluations is None else min(RIVAL_EVALUATIONS, evaluations)
    for axis in space.axes:
        own = space.replaced(axes=(axis,))
        with bar(f"{axis} alone", _expected(own, limit, number)) as advance:
            try:
                found = choose_recipe(own, losses, limit, evaluations=number, known=searched, advance=advance)
            except RecipeError:
                found = None
        rivals.append(Rival(label=f"{axis} alone", chosen=found))
    return rivals


def _held_out(chosen: Chosen, rivals: Sequence[Rival], losses: RecipeLosses) -> dict[CacheRecipe, list[float]]:
    bests = [chosen.best, *(rival.chosen.best for rival in rivals if rival.chosen is not None)]
    recipes = list(dict.fromkeys([chosen.space.recipe(), *(entry.recipe for entry in bests)]))
    found = {}
    with bar("comparing recipes", len(recipes)) as advance:
        for recipe in recipes:
            found[recipe] = losses(chosen.space.on_text(recipe))
            advance(1)
    return found


def _with_provenance(recipe: CacheRecipe, figures: Mapping[str, Any]) -> CacheRecipe:
    kept = ("model", "data", "seed", "axes", "bytes", "full_bytes", "full_loss", "predicted_loss", "measured_loss")
    provenance = {"made_by": figures["command"], "budget": figures["budget"], "text": figures["text"]}
    provenance |= {key: figures[key] for key in (*kept, "prediction", "settled")}
    return CacheRecipe.from_dict(recipe.to_dict() | {"provenance": provenance})


def _show(figures: Mapping[str, Any], chosen: Chosen, rivals: Sequence[Rival], out: Path) -> None:
    printed = console()
    best, full = chosen.best, figures["full_bytes"]
    printed.print(f"{figures['model']}: {best.recipe.describe()}", style="bold", markup=False, soft_wrap=True)
    if not best.recipe.plan.is_full:
        printed.print(best.recipe.plan.diagram(), markup=False, soft_wrap=True)
    budget = figures["budget"]
    printed.print(
        f"{format_bytes(best.bytes)} instead of {format_bytes(full)}, {full / best.bytes:.1f} times smaller, for a "
        f"budget of {budget['words']}",
        soft_wrap=True,
    )
    text = figures["text"]
    if text["block_size"] < budget["context"]:
        printed.print(
            f"Measured on {text['block_size']:,} tokens with as large a share of them: raise --block-size to "
            f"{budget['context']:,} to measure what is served",
            soft_wrap=True,
        )
    cells = []
    for row in figures["comparison"]:
        held, against = row["loss_score"], row["against_single"]
        difference = "" if against is None else f"{against['difference']:+.3f}"
        if against is not None and against["low"] is not None and against["low"] == against["low"]:
            difference += f" [{against['low']:+.3f}, {against['high']:+.3f}]"
        sources = row["recipe"]["kv_source_layers"]
        leaders = sum(source == i for i, source in enumerate(sources))
        own = row["recipe"]
        cells.append(
            [
                row["label"],
                f"{leaders}",
                _bits(own["key_bits"]),
                _bits(own["value_bits"]),
                "all" if own["tokens"] is None else f"{own['tokens']:,}",
                format_bytes(row["bytes"]),
                f"{row['measured_loss']:.3f}",
                f"{held['value']:.3f}",
                f"{held['difference']:+.3f}",
                difference,
            ]
        )
    headings = ["saved on", "layers", "bits of keys", "of values", "tokens", "bytes", "measured", "held out"]
    printed.print(table([*headings, "over full", "over best single [95 %]"], cells, "Loss, nats per token"))
    for label in figures["no_room"]:
        printed.print(f"{label}: nothing fits the budget", soft_wrap=True)
    held = figures["held_out_full"]["value"]
    printed.print(f"Full cache: {figures['full_loss']:.3f} measured, {held:.3f} held out", soft_wrap=True)
    found = figures["prediction"]
    if found["recipes"]:
        printed.print(
            f"Predictions of {found['recipes']} recipes, before they were measured, were off by "
            f"{found['mean_absolute_error']:.3f} on average",
            soft_wrap=True,
        )
    if not chosen.settled:
        printed.print("Better ones may be left: raise --evaluations", soft_wrap=True)
    single = best_single(rivals)
    if single is not None and best.excess > 0:
        share = f"{best.excess / single.excess:.0%}" if single.excess > 0 else "more than all"
        printed.print(f"{out}: {share} of what the best single axis loses beyond the full cache", soft_wrap=True)
    else:
        printed.print(f"{out}", soft_wrap=True)


def _bits(value: Any) -> str:
    widths = sorted(set(value) if isinstance(value, list) else {value}, key=str)
    return "-".join(map(str, widths))

"""`depthkv plan`: which layers keep their cache, found from the model and text, for a stated budget.

With more axes than depth the answer is a recipe, see `depthkv.cli.joint`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from depthkv.calibrate import Calibrator
from depthkv.checkpoint import load
from depthkv.cli import inputs
from depthkv.cli.inputs import count, json_path, naming, not_negative, option, require_different
from depthkv.cli.output import bar, command_line, show, waiting, write_json
from depthkv.cli.plan_table import show_plan
from depthkv.compress.space import AXES
from depthkv.data import Document, named_blocks
from depthkv.errors import DataError, DepthKVError
from depthkv.evaluate.perplexity import perplexity, spread
from depthkv.machine import environment
from depthkv.memory import device_room, parse_bytes
from depthkv.plan import SharingPlan
from depthkv.planner import Budget, Planned, Problem, make_plan
from depthkv.planner.figures import plan_figures, sizes_to_measure
from depthkv.planner.problem import stage_starts
from depthkv.sharing import share


def plan_command(
    model: inputs.Model,
    data: inputs.Texts,
    out: Annotated[Path, option("--out", json_path, "FILE", "The plan, or with more --axes the recipe.")],
    retention: Annotated[
        float | None, option("--retention", inputs.retention_value, "R", "Keep this share of the layers of each kind.")
    ] = None,
    kv_budget: Annotated[
        str | None, typer.Option("--kv-budget", metavar="SIZE", help="Bytes of the cache in --dtype, such as 2GiB.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Of one device: the cache gets what weights and one prompt's prefill leave.",
        ),
    ] = None,
    context: Annotated[
        int | None, option("--context", count, "N", "Tokens per sequence.  [default: --kv-budget is per token]")
    ] = None,
    batch: Annotated[int, option("--batch", count, "N", "Sequences.")] = 1,
    axes: Annotated[
        list[str] | None,
        typer.Option("--axes", metavar="AXIS...", help="What may be saved on: depth, bits, tokens.  [default: depth]"),
    ] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option("--plan", metavar="FILE...", help="With --axes: of `plan`, instead of choosing layers anew."),
    ] = None,
    keep: Annotated[
        list[int] | None, option("--keep", inputs.count_or_none, "LAYER...", "Layers that must keep their cache.")
    ] = None,
    pipeline_stages: Annotated[
        str | None,
        typer.Option(
            "--pipeline-stages", metavar="N|N,N,...", help="Stages, or the layers of each: none reads across stages."
        ),
    ] = None,
    prefill_weight: Annotated[
        float,
        option(
            "--prefill-weight",
            not_negative,
            "NATS",
            "What running all layers for the prompt counts as: favours leaders in the lower layers.",
        ),
    ] = 0.0,
    nearest: Annotated[
        bool, typer.Option("--nearest", help="Followers read the nearest leader below them, not any earlier one.")
    ] = False,
    evaluations: Annotated[
        int | None,
        option(
            "--evaluations",
            inputs.count_or_none,
            "N",
            "Plans to measure beyond those of simple rules, or recipes that are predicted to be good.  "
            "[default: 60 plans, 24 recipes]",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        option("--calibration", json_path, "FILE", "Keeps the measurements.  [default: OUT with .calibration.json]"),
    ] = None,
    losses: Annotated[
        Path | None,
        option("--losses", json_path, "FILE", "Keeps losses of recipes.  [default: OUT with .losses.json]"),
    ] = None,
    validation: Annotated[
        bool,
        typer.Option(
            "--validation",
            help="With --axes: choose on half of the held-out documents and compare on the others, for models that "
            "were trained on the training documents.",
        ),
    ] = False,
    blocks: Annotated[int, option("--blocks", count, "N", "Training blocks on which layers are compared.")] = 64,
    cost_blocks: Annotated[int, option("--cost-blocks", count, "N", "Of these, on which losses are measured.")] = 8,
    held_out_blocks: Annotated[int, option("--held-out-blocks", count, "N", "To compare rules of choice on.")] = 16,
    block_size: Annotated[
        int | None,
        option(
            "--block-size", count, "N", "Tokens in one block.  [default: 512; for recipes --context, at most 1,024]"
        ),
    ] = None,
    batch_size: inputs.BatchSize = 4,
    seed: inputs.Seed = 0,
    dtype: inputs.Dtype = "auto",
    device: inputs.Device = "auto",
    json_file: inputs.Json = None,
) -> None:
    """Choose the layers that keep their cache, by measuring the model on training documents of DATA.

    One of --retention, --kv-budget and --memory is the budget. After Ctrl-C or a kill the same command goes on where it
    stopped, and another budget needs no new calibration with the same --calibration. `depthkv report` draws the JSON.
    With more --axes the bytes may also be saved on bits and on tokens, and OUT is a recipe.
    """
    sizes = {"--kv-budget": _size("--kv-budget", kv_budget), "--memory": _size("--memory", memory)}
    if (given := sum(value is not None for value in (retention, kv_budget, memory))) != 1:
        raise DepthKVError(f"expected one of --retention, --kv-budget and --memory, got {given or 'none'}")
    if retention is not None and (context is not None or batch != 1):
        raise DepthKVError("expected --context and --batch with --kv-budget or --memory, got --retention")
    if memory is not None and context is None:
        raise DepthKVError("expected --context with --memory, got none")
    if cost_blocks > blocks:
        raise DepthKVError(f"--cost-blocks: expected at most the {blocks} of --blocks, got {cost_blocks}")
    if out.exists() and not out.is_file():
        raise DepthKVError(f"--out: expected a file, got {out}")
    chosen_axes = checked_axes(axes)
    is_joint = chosen_axes != ("depth",)
    if is_joint and retention is not None:
        raise DepthKVError(f"expected --kv-budget or --memory with --axes {' '.join(chosen_axes)}, got --retention")
    for name, is_set in (("--plan", plan), ("--losses", losses), ("--validation", validation)):
        if is_set and not is_joint:
            raise DepthKVError(f"expected more --axes than depth with {name}, got none")
    path = calibration or json_path(out.with_name(f"{out.stem}.calibration.json"))
    losses_path = losses or json_path(out.with_name(f"{out.stem}.losses.json"))
    files = {"--out": out, "--calibration": path, "--losses": losses_path if is_joint else None, "--json": json_file}
    require_different(files | {f"--plan {file}": file for file in plan or ()})
    config, kinds = inputs.read_config(model)
    with naming(model):
        inputs.require_all_weights(config)
        if len(set(kinds)) == len(kinds) and "depth" in chosen_axes:
            raise DepthKVError("expected layers that can share, got a model in which every layer is of another kind")
        inputs.require_positions(config, block_size or 512, "--block-size")
    with naming("--pipeline-stages"):
        stages = (0,) if pipeline_stages is None else stage_starts(pipeline_stages, len(kinds))
    with naming("--keep"):
        if keep and max(keep) >= len(kinds):
            raise DepthKVError(f"expected layers from 0 to {len(kinds) - 1}, got {max(keep)}")

    if is_joint:
        from depthkv.cli.joint import JointOptions, choose_and_show

        given_depth = {"--keep": bool(keep), "--pipeline-stages": pipeline_stages is not None, "--nearest": nearest}
        given_depth |= {"--prefill-weight": prefill_weight > 0, "--calibration": calibration is not None}
        if (plan or "depth" not in chosen_axes) and (
            name := next((n for n, is_set in given_depth.items() if is_set), "")
        ):
            if plan:
                raise DepthKVError(f"expected {name} without --plan, got both")
            raise DepthKVError(f"expected {name} with depth among --axes, got {' '.join(chosen_axes)}")
        choose_and_show(
            JointOptions(
                model=model,
                config=config,
                kinds=kinds,
                data=data,
                out=out,
                axes=chosen_axes,
                kv_budget=sizes["--kv-budget"],
                memory=sizes["--memory"],
                context=context,
                batch=batch,
                plans=tuple(plan or ()),
                keep=frozenset(keep or ()),
                stages=stages,
                prefill_weight=prefill_weight,
                any_source=not nearest,
                evaluations=evaluations,
                calibration=path,
                losses=losses_path,
                validation=validation,
                blocks=blocks,
                cost_blocks=cost_blocks,
                held_out_blocks=held_out_blocks,
                block_size=block_size,
                batch_size=batch_size,
                seed=seed,
                dtype=dtype,
                device=device,
                json_file=json_file,
            )
        )
        return
    block_size, evaluations = block_size or 512, 60 if evaluations is None else evaluations

    def problem_of(dtype: torch.dtype) -> Problem:
        name = "--retention" if retention is not None else "--kv-budget" if kv_budget is not None else "--memory"
        with naming(name):
            found = Problem(
                kinds=kinds,
                budget=_budget(config, dtype, retention, sizes, context, batch),
                keep=frozenset(keep or ()),
                stages=stages,
                prefill_weight=prefill_weight,
                any_source=not nearest,
            )
            _require_choice(found)
        return found

    if retention is not None or dtype != "auto":  # else bytes depend on the dtype of the weights
        problem_of(inputs.DTYPES.get(dtype, torch.bfloat16))
    texts = inputs.split_texts(data)
    with waiting(f"loading {model}"):
        loaded, tokenizer, _ = load(model, dtype=dtype, device=device, progress=show)
        training = text_blocks(texts, 0, tokenizer, block_size, blocks)
        held_out, held_out_documents = text_blocks(texts, 1, tokenizer, block_size, held_out_blocks)
    problem = problem_of(loaded.dtype)
    begun = path.exists()
    with naming("--calibration"):
        calibrator = Calibrator(loaded, *training, cost_blocks=cost_blocks, batch_size=batch_size, path=path, bar=bar)
    show(f"{'going on from' if begun else 'measurements are kept in'} {path}")
    with naming(model):
        try:
            calibrator.measure_similarity()
            calibrator.measure_outputs()
            calibrator.measure_costs()
            planned = make_plan(calibrator, problem, evaluations=evaluations, seed=seed, bar=bar)
            held_out_losses = _compare(calibrator, planned, held_out, batch_size)
            served = None
            if calibrator.has_adapter:  # off, as the model is used with its full cache
                served = perplexity(loaded, held_out, batch_size=batch_size).block_losses
        finally:
            calibrator.save()
        figures = {
            "model": model,
            "data": list(texts),
            "command": command_line(),
            "environment": environment(next(loaded.parameters()).device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "seed": seed,
            "budget": {"words": problem.words, "context": context, "batch": batch, "retention": retention},
            **plan_figures(planned, calibrator, config, held_out_losses, held_out_documents, seed, served),
        }
    _with_provenance(planned, figures).save(out)
    write_json(json_file, figures)
    show_plan(figures, planned.plan, out)


def checked_axes(axes: list[str] | None) -> tuple[str, ...]:
    """What --axes names, in a fixed order."""
    for axis in axes or ():
        if axis not in AXES:
            raise DepthKVError(f"--axes: expected some of {', '.join(AXES)}, got {axis!r}")
    return tuple(axis for axis in AXES if axis in (axes or ("depth",)))


def _size(name: str, text: str | None) -> int | None:
    with naming(name):
        return None if text is None else parse_bytes(text)


def _budget(
    config: Any,
    dtype: torch.dtype,
    retention: float | None,
    sizes: dict[str, int | None],
    context: int | None,
    batch: int,
) -> Budget:
    if retention is not None:
        return Budget.of_retention(retention, config, dtype)
    limit = sizes["--kv-budget"]
    if limit is None:
        memory = sizes["--memory"]
        assert memory is not None and context is not None
        # one prompt is read at a time, as `inspect` counts it
        limit = device_room(config, dtype, memory, context, 1)
    return Budget.of_bytes(limit, config, dtype, context=context or 1, batch=batch)


def _require_choice(problem: Problem) -> None:
    if problem.affords(range(problem.num_layers)):
        raise DepthKVError(
            f"expected a budget that not all layers' caches fit into, got {problem.budget.words}: no plan is needed"
        )


def text_blocks(
    texts: dict[str, tuple[list[Document], list[Document]]], part: int, tokenizer: Any, block_size: int, wanted: int
) -> tuple[torch.Tensor, list[str]]:
    """Blocks of all texts, as many of each, and their documents: of the training part (0) or the held-out one (1)."""
    found, names = [], []
    for name, parts in texts.items():
        try:
            blocks, documents = named_blocks(parts[part], tokenizer, block_size)
        except DataError as error:
            which = "the tenth that is held out" if part else "the rest, of which a tenth is held out"
            raise DataError(f"--data {name}: {error} (in {which})") from error
        chosen = spread(len(blocks), max(1, wanted // len(texts)))
        found.append(blocks[chosen])
        names += [documents[i] if len(texts) == 1 else f"{name}: {documents[i]}" for i in chosen]
    return torch.cat(found), names


def _compare(
    calibrator: Calibrator, planned: Planned, blocks: torch.Tensor, batch_size: int
) -> dict[SharingPlan, tuple[float, ...]]:
    """Held-out losses of the plan, its rivals and the full cache; calibration losses of some nested plans, too."""
    sizes = sizes_to_measure(planned)
    rivals = list(dict.fromkeys([planned.plan, *(plan for _, plan in planned.rivals)]))
    losses = {}
    with bar("comparing plans", len(sizes) + 2 * len(rivals) + 1) as advance:
        for plan in (*sizes, *rivals):
            calibrator.plan_loss(plan)
            advance(1)
        with calibrator.with_own_kv():
            full = perplexity(calibrator.model, blocks, batch_size=batch_size)
        losses[SharingPlan.full(planned.problem.num_layers)] = full.block_losses
        advance(1)
        for plan in rivals:
            if plan.is_full:
                continue
            with share(calibrator.model, plan):
                losses[plan] = perplexity(calibrator.model, blocks, batch_size=batch_size).block_losses
            advance(1)
    return losses


def _with_provenance(planned: Planned, figures: dict[str, Any]) -> SharingPlan:
    kept = ("model", "data", "seed", "predicted_loss", "measured_loss", "full_loss", "order")
    provenance = {"made_by": figures["command"], "budget": figures["budget"]["words"]}
    # what a sequence falls back to under pressure, see `depthkv.adaptive.Ladder`
    leaders = len(planned.plan.leaders)
    provenance["nested"] = [list(p.kv_source_layers) for p in planned.nested if len(p.leaders) < leaders]
    # what recipes are made of beside these, see `depthkv.cli.joint`
    larger = [p for p in planned.nested if len(p.leaders) > leaders and not p.is_full]
    provenance["larger"] = [list(p.kv_source_layers) for p in larger]
    return SharingPlan(planned.plan.kv_source_layers, provenance | {key: figures[key] for key in kept})

"""The command inspect."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from depthkv.cli import inputs
from depthkv.cli.inputs import count, naming, option
from depthkv.cli.output import console, show, table, write_json
from depthkv.compress.recipe import CacheRecipe
from depthkv.export import lacks_follower_kv
from depthkv.inspect_model import Inspection, PlanCost, default_plans, inspect_model, layer_ranges
from depthkv.memory import format_bytes, parse_bytes
from depthkv.plan import SharingPlan


def inspect_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file, builtin:NAME or just a config.json.")
    ],
    context: Annotated[
        int | None, option("--context", count, "N", "Tokens per sequence.  [default: all positions]")
    ] = None,
    batch: Annotated[int, option("--batch", count, "N", "Sequences.")] = 1,
    dtype: inputs.Dtype = "auto",
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Memory of one GPU, such as 24GiB.")
    ] = None,
    plan: inputs.PlanFile = None,
    recipe: inputs.RecipeFiles = None,
    json_file: inputs.Json = None,
) -> None:
    """Layers, KV bytes per token, what can share with what, and what fits into a memory size. Reads no weights."""
    inputs.keep_inputs(json_file, model, plan, recipe)
    with naming("--memory"):
        room = None if memory is None else parse_bytes(memory)
    config, kinds = inputs.read_config(model)
    with naming(model):
        usual = default_plans(config)
        plans: list[tuple[str, SharingPlan | CacheRecipe]] = [*(usual if plan is None and not recipe else usual[:1])]
        if plan is not None:
            plans.append((plan.name, inputs.read_plan(plan, kinds)))
        plans += [(path.name, inputs.read_recipe(path, kinds)) for path in recipe or ()]
        stored: Any = getattr(config, "dtype", None) or torch.bfloat16
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        inspection = inspect_model(
            config,
            plans,
            dtype=stored if dtype == "auto" else inputs.DTYPES[dtype],
            context=context or positions or 4096,
            batch=batch,
            memory=room,
        )
    write_json(json_file, {"model": model, **inspection.to_dict()})
    _show_inspection(model, inspection)
    if lacks_follower_kv(config):
        own = layer_ranges(SharingPlan(config.kv_source_layers).leaders)
        show(f"an export: it runs under its own plan, leaders {own}; the rest is said of its original")


def _show_inspection(model: str, found: Inspection) -> None:
    out = console()
    dtype = str(found.dtype).removeprefix("torch.")
    weights = "unknown size" if found.weight_bytes is None else format_bytes(found.weight_bytes)
    parameters = "" if found.num_parameters is None else f"{found.num_parameters / 1e9:.3g} billion parameters, "
    quantized = ", more than its quantized checkpoint" if found.is_quantized else ""
    total = sum(len(group.layers) * group.bytes_per_token for group in found.groups)
    out.print(f"{model}: {found.model_type}, {found.num_layers} layers", style="bold", markup=False)
    out.print(f"weights: {parameters}{weights} in {dtype}{quantized}")
    out.print(f"cache: {format_bytes(total)} per token in {dtype}, all layers together\n")
    rows = [
        [
            layer_ranges(group.layers),
            str(len(group.layers)),
            group.kind.attention.replace("_attention", "").replace("_", " ")
            + ("" if group.kind.window is None else f", {group.kind.window} tokens"),
            group.rope_base,
            f"{group.kind.kv_heads} x {group.kind.head_dim}",
            format_bytes(group.bytes_per_token),
        ]
        for group in found.groups
    ]
    headings = ["these can share", "layers", "attention", "rotary base", "KV heads", "per token and layer"]
    out.print(table(headings, rows, "What can share with what"))
    sequences = "1 sequence" if found.batch == 1 else f"{found.batch} sequences"
    headings = ["plan", "leaders", "per token", "cache"]
    if found.memory is not None:
        headings += ["activations", "sequences", "longest context"]
    rows = []
    for cost in found.costs:
        kept = f"{len(cost.plan.leaders)} of {found.num_layers} ({cost.plan.retention:.0%})"
        row = [cost.name, kept, format_bytes(cost.bytes_per_token), format_bytes(cost.cache_bytes)]
        if found.memory is not None:
            row += [format_bytes(cost.activation_bytes), f"{cost.sequences:,}", f"{cost.longest_context:,}"]
        rows.append(row)
    out.print()
    out.print(table(headings, rows, f"Cache of {sequences} of {found.context:,} tokens"))
    if found.memory is not None:
        counted = "" if found.weight_bytes is not None else ", but not the weights, which are unknown"
        out.print(
            f"In {format_bytes(found.memory)}, counting weights, cache and the activations of one prefill at a "
            f"time{counted}: this many sequences of {found.context:,} tokens, or this context for {sequences}."
        )
        for cost in found.costs:
            if not cost.plan.is_full:
                out.print(f"{cost.name}: {_compared(cost, found.full, found.context)}", markup=False)
        if found.weight_bytes is not None and found.weight_bytes > found.memory:
            out.print("The weights alone need more.")
        if all(group.kind.window is not None for group in found.groups):
            out.print("All layers have windows: what is written after such a prompt needs no more memory.")
        longest = max(cost.longest_context or 0 for cost in found.costs)
        if found.max_positions is not None and longest > found.max_positions:
            out.print(f"The model itself is made for {found.max_positions:,} positions.")
    out.print()
    for cost in found.costs[1:]:
        words = "" if cost.recipe is None else f", {cost.recipe.describe()}"
        out.print(f"{cost.name}: {cost.plan.diagram()}{words}", markup=False, soft_wrap=True)


def _compared(cost: PlanCost, full: PlanCost, context: int) -> str:
    """What the plan makes room for, beside what the full cache does."""
    longer = f"{cost.longest_context:,} instead of {full.longest_context:,} tokens"
    if cost.sequences == 0:
        return f"no sequence of {context:,} tokens fits" + (f", but {longer} do" if cost.longest_context else "")
    if cost.sequences_ratio is None:
        many = f"{cost.sequences:,} sequence{'s' * (cost.sequences != 1)}, where the full cache has room for none"
    elif cost.sequences == full.sequences:
        many = f"as many sequences ({cost.sequences:,})"
    else:
        many = f"{cost.sequences_ratio:.1f}x more sequences ({cost.sequences:,} instead of {full.sequences:,})"
    return f"with this plan {many}, or {longer}"

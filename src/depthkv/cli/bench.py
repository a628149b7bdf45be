"""The command bench: speed and memory over a grid of plans, prompt lengths and batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from depthkv.bench import ARMS, BenchConfig, BenchResult, GridResult, How, bench_grid
from depthkv.checkpoint import load
from depthkv.cli import inputs
from depthkv.cli.inputs import count, naming, option
from depthkv.cli.output import command_line, console, json_line, progress_bar, show, table, waiting, write_json
from depthkv.compress.recipe import CacheRecipe
from depthkv.errors import DepthKVError
from depthkv.machine import environment
from depthkv.memory import format_bytes
from depthkv.plan import SharingPlan
from depthkv.roofline import PHASES, MachineLimits

_NO_MEMORY = "out of memory"


def bench_command(
    model: inputs.Model,
    plan: Annotated[
        list[Path] | None, typer.Option("--plan", metavar="FILE", help="A plan.json. Repeat it for several.")
    ] = None,
    recipe: inputs.RecipeFiles = None,
    retention: inputs.Retentions = None,
    prompt_tokens: Annotated[
        list[int] | None, option("--prompt-tokens", count, "N...", "Tokens of the prompt.  [default: 1024]")
    ] = None,
    new_tokens: Annotated[int, option("--new-tokens", count, "N", "Tokens to write, 2 or more.")] = 64,
    repeats: Annotated[int, option("--repeats", count, "N", "Measured runs of each arm.")] = 5,
    batch_size: Annotated[
        list[int] | None, option("--batch-size", count, "N...", "Sequences decoded together.  [default: 1]")
    ] = None,
    seed: inputs.Seed = 0,
    dtype: inputs.Dtype = "auto",
    device: inputs.Device = "auto",
    json_file: inputs.Json = None,
) -> None:
    """Time to first token, decoding speed and memory, with the full and the shared cache in turns.

    Every plan and recipe is measured with every prompt length and batch size, beside what this machine allows
    (roofline).

    Without --plan, --recipe or --retention, the checkpoint's own plan is measured, or every second layer. An export
    without followers' K and V has no full cache to compare with.
    """
    inputs.refuse_both(plan, retention)
    inputs.keep_inputs(json_file, model, plan, recipe)
    if new_tokens < 2:
        raise DepthKVError(f"--new-tokens: expected at least 2, got {new_tokens}: decoding starts with the second")
    lengths, batches = dict.fromkeys(prompt_tokens or [1024]), dict.fromkeys(batch_size or [1])
    settings = [
        BenchConfig(prompt_tokens=length, new_tokens=new_tokens, repeats=repeats, batch_size=batch, seed=seed)
        for length in lengths
        for batch in batches
    ]
    config, kinds = inputs.read_config(model)
    with naming(model):
        plans: list[How] = []
        if plan:
            plans = [inputs.read_plan(path, kinds) for path in plan]
        elif retention:
            plans = [SharingPlan.for_retention(share, kinds) for share in retention]
        elif not recipe:
            plans = [inputs.choose_plan(None, None, config, kinds, default=0.5)]
        plans += [inputs.read_recipe(path, kinds) for path in recipe or ()]
        plans = [how for i, how in enumerate(plans) if how not in plans[:i]]
        inputs.require_positions(config, max(lengths) + new_tokens, "--prompt-tokens and --new-tokens together")
    with waiting(f"loading {model}"):
        loaded, _, _ = load(model, dtype=dtype, device=device, progress=show)
    runs = len(plans) * len(settings) * len(ARMS) * (repeats + 1)
    with naming(model), progress_bar("measuring", runs) as advance:
        result = bench_grid(loaded, plans, settings, advance)
    figures = {
        "model": model,
        "command": command_line(),
        "environment": environment(next(loaded.parameters()).device),
        **result.to_dict(),
    }
    write_json(json_file, figures)
    _show(model, result)
    print(json_line(figures))


def _show(model: str, result: GridResult) -> None:
    first = result.cells[0]
    config, machine = first.config, first.machine
    where = f"{machine['device']}, {machine['threads']} threads, {machine['dtype']}"
    out = console()
    if len(result.cells) == 1:
        tokens = f"{config.prompt_tokens} + {config.new_tokens} tokens, batch {config.batch_size}"
        out.print(f"{model}: {tokens}, {where}", markup=False)
        out.print(_cell_table(first, result.limits))
    else:
        out.print(f"{model}: {config.new_tokens} new tokens after each prompt, {where}", markup=False)
        out.print(_grid_table(result.cells, result.limits))
    speed, rate = result.limits.bandwidth_bytes_per_s, result.limits.matmul_flops_per_s
    out.print(
        f"of the limit: the least time for the bytes and the matrix products, at the {speed / 1e9:,.4g} GB/s and "
        f"{rate / 1e12:,.3g} TFLOP/s reached here, as a share of the time measured",
        style="dim",
        soft_wrap=True,
    )


def _cell_table(cell: BenchResult, limits: MachineLimits) -> Any:
    """A row per figure, a column per arm."""
    formats: dict[str, tuple[str, Callable[[float], str]]] = {
        "ttft_s": ("time to first token", lambda value: f"{value:.3f} s"),
        "decode_tokens_per_s": ("decoding", lambda value: f"{value:.2f} tok/s"),
        "itl_s": ("between tokens", lambda value: f"{value * 1000:.2f} ms"),
        "cache_bytes": ("cache at the end", format_bytes),
        "peak_bytes": ("peak memory", format_bytes),
        "peak_above_start_bytes": ("of it for the run", format_bytes),
    }
    rows = []
    for field, (name, shown) in formats.items():
        row = [name]
        for arm in cell.samples:
            median, spread = cell.median(arm, field), cell.spread(arm, field)
            if median is None or spread is None:
                row.append(_NO_MEMORY if arm in cell.out_of_memory else "not measured")
            elif spread[0] == spread[1]:
                row.append(shown(median))
            else:
                row.append(f"{shown(median)} ({shown(spread[0])} to {shown(spread[1])})")
        rows.append([*row, *([_ratio(cell, field)] if "full" in cell.samples else [])])
    roofline = cell.roofline(limits)
    for phase, name in zip(PHASES, ("prompt", "decoding"), strict=True):
        shares = [_share(roofline[arm][f"{phase}_share"]) for arm in cell.samples]
        rows.append([f"{name}, of the limit", *shares, *([""] if "full" in cell.samples else [])])
    headings = ["median (range)", "full", f"shared: {_kept(cell)}", "shared / full"]
    return table(headings if "full" in cell.samples else [headings[0], headings[2]], rows)


def _grid_table(cells: Sequence[BenchResult], limits: MachineLimits) -> Any:
    """A row per cell: ratios of shared to full, and figures of full and shared."""
    headings = ["cache", "prompt", "batch", "first token", "between tokens", "tokens per second"]
    headings += ["cache", "peak memory", "decoding, of the limit"]
    rows = []
    for cell in cells:
        roofline = cell.roofline(limits)
        rows.append(
            [
                _kept(cell),
                f"{cell.config.prompt_tokens:,}",
                str(cell.config.batch_size),
                _ratio(cell, "ttft_s"),
                _ratio(cell, "itl_s"),
                _both(cell, "decode_tokens_per_s", lambda value: f"{value:,.1f}"),
                _both(cell, "cache_bytes", format_bytes),
                _ratio(cell, "peak_bytes"),
                " → ".join(_share(roofline[arm]["decode_share"]) for arm in cell.samples),
            ]
        )
    return table(headings, rows, "Medians, full → shared, or shared / full")


def _kept(cell: BenchResult) -> str:
    if isinstance(cell.how, CacheRecipe):
        return cell.how.describe()
    return f"{len(cell.plan.leaders)} of {cell.plan.num_layers} layers are leaders"


def _both(cell: BenchResult, field: str, shown: Callable[[float], str]) -> str:
    values = [cell.median(arm, field) for arm in cell.samples]
    return " → ".join(_NO_MEMORY if value is None else shown(value) for value in values)


def _ratio(cell: BenchResult, field: str) -> str:
    ratio = cell.ratio(field)
    return "" if ratio is None else f"{ratio:.3f}x"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"

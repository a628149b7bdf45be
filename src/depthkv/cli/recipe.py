"""`depthkv recipe`: a recipe from what one knows already; nothing is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from depthkv.architectures import max_positions
from depthkv.cli import inputs
from depthkv.cli.inputs import count, count_or_none, json_path, naming, option, require_different
from depthkv.cli.output import command_line, console, table, write_json
from depthkv.compress.recipe import BITS, Bits, CacheRecipe
from depthkv.compress.rules import RULES
from depthkv.memory import cache_bytes, format_bytes
from depthkv.plan import SharingPlan

_CONTEXTS = (512, 2048, 8192, 32768, 131072)
"""Tokens at which bytes are shown, as far as the model has positions."""


def bits_value(text: str) -> str:
    """A width, or one for each leader with commas between them."""
    widths = str(text).split(",")
    if not all(width in map(str, BITS) for width in widths):
        raise typer.BadParameter(f"expected {', '.join(map(str, BITS))} or a list such as 8,4,4, got {text!r}")
    return str(text)


def recipe_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file, builtin:NAME or just a config.json.")
    ],
    out: Annotated[Path, option("--out", json_path, "FILE", "The recipe.json.")],
    plan: inputs.PlanFile = None,
    retention: inputs.Retention = None,
    bits: Annotated[str, option("--bits", bits_value, "BITS", "Of keys and values: 16, 8, fp8, 4 or 2.")] = "16",
    key_bits: Annotated[
        str | None, option("--key-bits", bits_value, "BITS", "Of keys; for each leader its own: 8,4,4.")
    ] = None,
    value_bits: Annotated[str | None, option("--value-bits", bits_value, "BITS", "Of values, in the same way.")] = None,
    tokens: Annotated[
        int | None, option("--tokens", count, "N", "Most tokens of a sequence that stay.  [default: all]")
    ] = None,
    rule: Annotated[str, typer.Option("--rule", metavar="|".join(RULES), help="Which tokens stay.")] = "window",
    group_size: Annotated[
        int, option("--group-size", count, "N", "Tokens or channels that share a scale.")
    ] = CacheRecipe.group_size,
    sinks: Annotated[int, option("--sinks", count_or_none, "N", "First tokens, always kept.")] = CacheRecipe.sinks,
    recent: Annotated[int, option("--recent", count, "N", "Last tokens, always kept.")] = CacheRecipe.recent,
    dtype: inputs.Dtype = "auto",
    json_file: inputs.Json = None,
) -> None:
    """Write a recipe: which layers keep a cache, in how many bits, how many tokens. Reads no weights, measures nothing.

    Without --plan or --retention, the checkpoint's own plan holds, or every layer keeps its cache. What a recipe costs,
    `depthkv evaluate MODEL --recipe FILE` measures.
    """
    require_different({"--out": out, "--json": json_file, "--plan": plan})
    config, kinds = inputs.read_config(model)
    with naming(model):
        chosen = inputs.choose_plan(plan, retention, config, kinds, default=1.0)
    recipe = CacheRecipe(
        plan=SharingPlan(chosen.kv_source_layers),
        key_bits=_widths(key_bits or bits),
        value_bits=_widths(value_bits or bits),
        group_size=group_size,
        sinks=sinks,
        recent=recent,
        tokens=tokens,
        rule=rule,
        provenance={"made_by": command_line()},
    )
    stored: Any = getattr(config, "dtype", None) or torch.bfloat16
    kept_in = stored if dtype == "auto" else inputs.DTYPES[dtype]
    most = max_positions(config) or _CONTEXTS[-1]
    contexts = [*(n for n in _CONTEXTS if n < most), most]
    rows = [
        {
            "tokens": n,
            "full_cache_bytes": cache_bytes(config, kept_in, n),
            "plan_cache_bytes": cache_bytes(config, kept_in, n, 1, recipe.plan),
            "cache_bytes": recipe.cache_bytes(config, kept_in, n),
        }
        for n in contexts
    ]
    recipe.save(out)
    figures = {"model": model, "command": command_line(), "dtype": str(kept_in).removeprefix("torch.")}
    write_json(json_file, {**figures, "cache_recipe": recipe.figures(), "rows": rows})
    shown = console()
    shown.print(f"{out}: {recipe.describe()}", markup=False, soft_wrap=True)
    cells = []
    for row in rows:
        full, ours = row["full_cache_bytes"], row["cache_bytes"]
        sizes = [format_bytes(row[name]) for name in ("full_cache_bytes", "plan_cache_bytes", "cache_bytes")]
        cells.append([f"{row['tokens']:,}", *sizes, format_bytes(ours / row["tokens"]), f"{full / ours:.2f}x"])
    headings = ["tokens of a sequence", "full cache", "the plan alone", "the recipe", "per token", "smaller"]
    shown.print(table(headings, cells, f"Cache in {figures['dtype']}"))


def _widths(text: str) -> Bits | tuple[Bits, ...]:
    named = {str(width): width for width in BITS}
    widths = tuple(named[width] for width in text.split(","))
    return widths if len(widths) > 1 else widths[0]

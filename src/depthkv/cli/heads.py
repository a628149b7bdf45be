"""The command merge-heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from depthkv.architectures import text_config
from depthkv.checkpoint import load, save
from depthkv.cli import inputs
from depthkv.cli.inputs import count, naming, option
from depthkv.cli.output import command_line, console, show, waiting, write_json
from depthkv.compress.heads import check_kv_heads, merge_kv_heads
from depthkv.memory import format_bytes, kv_bytes_per_token


def merge_heads_command(
    model: inputs.Model,
    kv_heads: Annotated[int, option("--kv-heads", count, "N", "KV heads to keep: a divisor of the model's.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the new checkpoint.")],
    dtype: inputs.Dtype = "auto",
    json_file: inputs.Json = None,
) -> None:
    """Merge groups of KV heads into their mean, for a smaller cache in every layer.

    DIR gets a checkpoint like MODEL with fewer KV heads. It writes worse text than MODEL until `depthkv adapt` has
    trained it.
    """
    inputs.require_other_folder(out, model)
    config, kinds = inputs.read_config(model)
    with naming(model):
        inputs.require_all_weights(config)
    with naming("--kv-heads"):
        check_kv_heads(config, kv_heads)
    with naming(model), waiting(f"loading {model}"):
        loaded, tokenizer, plan = load(model, dtype=dtype, progress=show)
        merged = merge_kv_heads(loaded, kv_heads)
    provenance = {"made_by": "depthkv merge-heads", "base_model": model, "kv_heads": kv_heads}
    save(out, merged, tokenizer, plan, provenance)
    before, after = (kv_bytes_per_token(found.config, loaded.dtype) for found in (loaded, merged))
    name = str(loaded.dtype).removeprefix("torch.")
    write_json(
        json_file,
        {
            "model": model,
            "out": str(out),
            "command": command_line(),
            "dtype": name,
            "num_layers": len(kinds),
            "num_attention_heads": text_config(config).num_attention_heads,
            "kv_heads_before": kinds[0].kv_heads,
            "kv_heads": kv_heads,
            "kv_bytes_per_token_before": before,
            "kv_bytes_per_token": after,
        },
    )
    shown = console()
    shown.print(
        f"KV heads: {kinds[0].kv_heads} to {kv_heads} in each of {len(kinds)} layers; cache per token in {name}: "
        f"{format_bytes(before)} to {format_bytes(after)}; the checkpoint is in {out}",
        markup=False,
        soft_wrap=True,
    )
    if before != after:
        shown.print(
            f"It has to be trained before it is used: depthkv adapt {out} --data TEXT --out DIR",
            markup=False,
            soft_wrap=True,
        )

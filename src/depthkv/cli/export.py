"""The command export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from depthkv import __version__
from depthkv.checkpoint import load
from depthkv.cli import inputs
from depthkv.cli.inputs import naming
from depthkv.cli.output import command_line, console, show, waiting, write_json
from depthkv.errors import DepthKVError
from depthkv.export import check_removable, export, require_new_or_export
from depthkv.memory import format_bytes, kv_bytes_per_token


def export_command(
    model: inputs.Model,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the exported checkpoint.")],
    plan: inputs.PlanFile = None,
    retention: inputs.Retention = None,
    keep_kv: Annotated[
        bool, typer.Option("--keep-kv", help="Keep the K and V weights of layers that read another layer's.")
    ] = False,
    dtype: inputs.Dtype = "auto",
    json_file: inputs.Json = None,
) -> None:
    """A checkpoint for one plan, which vLLM serves (with depthkv installed there) and depthkv loads.

    An adapter is merged. Without --plan or --retention it is the checkpoint's own plan.
    """
    inputs.require_other_folder(out, model)
    with naming("--out"):
        require_new_or_export(out)
    config, kinds = inputs.read_config(model)
    if plan is None and retention is None and inputs.own_plan(config) is None:
        raise DepthKVError(f"expected --plan or --retention for {model}, which has no plan of its own, got neither")
    with naming(model):
        chosen = inputs.choose_plan(plan, retention, config, kinds, default=1.0)
        inputs.require_all_weights(config)
        if not keep_kv:
            check_removable(config)
        with waiting(f"loading {model}"):
            loaded, tokenizer, own = load(model, dtype="auto", progress=show)
            stored = loaded.dtype
            if is_adapted := hasattr(loaded, "merge_and_unload"):  # the sum is rounded once, in the end
                loaded = loaded.float().merge_and_unload()
            loaded = loaded.to(stored if dtype == "auto" else getattr(torch, dtype))
    provenance: dict[str, object] = {"made_by": "depthkv export", "depthkv": __version__, "base_model": model}
    provenance["adapter_merged"] = is_adapted
    if own is not None and own.provenance:
        provenance["checkpoint"] = dict(own.provenance)
    if is_adapted and chosen.is_full:
        show("the adapter, which is meant for sharing, is merged into a checkpoint in which no layer shares")
    with waiting(f"writing {out}"):
        export(out, loaded, tokenizer, chosen, keep_kv=keep_kv, provenance=provenance)
    weights = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    full, kept = (kv_bytes_per_token(config, loaded.dtype, part) for part in (None, chosen))
    write_json(
        json_file,
        {
            "model": model,
            "out": str(out),
            "command": command_line(),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "num_layers": len(kinds),
            "kv_source_layers": list(chosen.kv_source_layers),
            "leaders": list(chosen.leaders),
            "retention": chosen.retention,
            "keep_kv": keep_kv,
            "weight_bytes": weights,
            "kv_bytes_per_token": kept,
            "full_kv_bytes_per_token": full,
        },
    )
    console().print(
        f"{len(chosen.leaders)} of {len(kinds)} layers keep a cache: {format_bytes(kept)} instead of "
        f"{format_bytes(full)} per token; weights of {format_bytes(weights)}; the checkpoint is in {out}",
        markup=False,
        soft_wrap=True,
    )

"""Commands that train: adapt and demo."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from depthkv.adapt import AdaptConfig, AdaptResult, adapt, discard_state
from depthkv.adapt.config import DECAYS, PRECISIONS, TRAINABLE
from depthkv.checkpoint import load, require_replaceable, save
from depthkv.cli import inputs
from depthkv.cli.inputs import count, count_or_none, naming, option, positive
from depthkv.cli.output import console, curve_table, progress_bar, show, waiting, write_json
from depthkv.data import resolve_data, split_documents, token_blocks
from depthkv.errors import DepthKVError
from depthkv.evaluate import CurveRow, retention_curve, spread_blocks
from depthkv.report import plot_loss, plot_plan, plot_retention

_DEFAULT = AdaptConfig(max_minutes=15.0)
_MINUTES = f"Training time.  [default: {_DEFAULT.max_minutes:g}]"


def adapt_command(
    model: inputs.Model,
    data: inputs.Data,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the adapted checkpoint.")],
    plan: inputs.PlanFile = None,
    retention: inputs.Retention = None,
    minutes: Annotated[
        float | None, option("--minutes", positive, "M", f"Training time.  [default: {_DEFAULT.max_minutes:g}]")
    ] = None,
    tokens: Annotated[int | None, option("--tokens", count, "N", "Training tokens, instead of --minutes.")] = None,
    learning_rate: Annotated[float, option("--learning-rate", positive, "LR", "Peak.")] = _DEFAULT.learning_rate,
    cross_layer_prob: Annotated[
        float,
        option(
            "--cross-layer-prob",
            inputs.probability,
            "P",
            "Probability that a layer reads an earlier layer's KV in a step.",
        ),
    ] = _DEFAULT.cross_layer_prob,
    batch_size: inputs.BatchSize = _DEFAULT.batch_size,
    accumulate_steps: Annotated[
        int, option("--accumulate-steps", count, "N", "Forwards in one optimizer step.")
    ] = _DEFAULT.accumulate_steps,
    block_size: inputs.BlockSize = _DEFAULT.block_size,
    decay: Annotated[str, typer.Option("--decay", metavar="|".join(DECAYS))] = _DEFAULT.decay,
    trainable: Annotated[str, typer.Option("--trainable", metavar="|".join(TRAINABLE))] = _DEFAULT.trainable,
    precision: Annotated[str, typer.Option("--precision", metavar="|".join(PRECISIONS))] = _DEFAULT.precision,
    seed: inputs.Seed = 0,
    blocks: Annotated[
        int, option("--blocks", count_or_none, "N", "Held-out blocks for the curves before and after; 0 for none.")
    ] = 8,
    device: inputs.Device = "auto",
    json_file: inputs.Json = None,
) -> None:
    """Train a model with stochastic KV routing, so that it can keep the cache of fewer layers.

    DIR gets the checkpoint with a plan (--plan, or --retention, 0.5 by default) and pictures. After Ctrl-C the same
    command goes on where it stopped.
    """
    inputs.refuse_both(plan, retention)
    if minutes is not None and tokens is not None:
        raise DepthKVError("expected --minutes or --tokens, got both")
    recipe = AdaptConfig(
        max_minutes=_DEFAULT.max_minutes if minutes is None and tokens is None else minutes,
        max_tokens=tokens,
        learning_rate=learning_rate,
        cross_layer_prob=cross_layer_prob,
        batch_size=batch_size,
        accumulate_steps=accumulate_steps,
        block_size=block_size,
        decay=decay,
        trainable=trainable,
        precision=precision,
        seed=seed,
    )
    with naming("--out"):
        require_replaceable(out)
    config, kinds = inputs.read_config(model)
    with naming(model):
        chosen = inputs.choose_plan(plan, retention, config, kinds, default=0.5)
        plans = inputs.choose_plans(None, None, config, kinds)
        plans += [chosen] if chosen not in plans else []
        inputs.require_positions(config, block_size, "--block-size")
    with naming(data):
        training, held_out = split_documents(resolve_data(data, progress=show))
    with waiting(f"loading {model}"):
        # one device: the loop keeps the optimizer's state where the weights are
        single = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        loaded, tokenizer, _ = load(model, dtype="float32", device=single, progress=show)
    with naming(data):
        train_blocks = token_blocks(training, tokenizer, block_size)
        test_blocks = spread_blocks(token_blocks(held_out, tokenizer, block_size), blocks) if blocks else None

    def curve(what: str) -> list[CurveRow]:
        if test_blocks is None:
            return []
        place = next(loaded.parameters()).device
        cast: AbstractContextManager[Any] = nullcontext()
        if recipe.uses_bf16(place):
            cast = torch.autocast(place.type, torch.bfloat16)
        with cast, progress_bar(what, len(plans) * len(test_blocks)) as advance:
            return retention_curve(loaded, test_blocks, plans, batch_size=batch_size, progress=advance)

    state = out.with_name(f"{out.name}.unfinished")
    with naming(model):
        before = curve("before")
        try:
            result = adapt(loaded, train_blocks, recipe, resume_dir=state)
        except KeyboardInterrupt:
            show(f"depthkv: stopped; the same command goes on from {state}, delete that folder to start anew")
            raise typer.Exit(130) from None
        after = curve("after")
    provenance = {"made_by": "depthkv adapt", "base_model": model, "data": data, "tokens": result.tokens}
    save(out, loaded, tokenizer, chosen, provenance)
    tokens_at = [recipe.tokens_per_step * (i + 1) for i in range(result.steps)]
    plot_loss(tokens_at, result.losses, out / "loss.png")
    plot_plan(chosen, out / "plan.png", kinds)
    if after:
        plot_retention({"before": before, "after": after}, out / "retention.png")
    figures = _adapt_figures(result, recipe, before, after)
    write_json(json_file, {"model": model, "data": data, "out": str(out), "leaders": list(chosen.leaders), **figures})
    discard_state(state)  # only now is everything safe that it could give back
    if state.is_dir() and not any(state.iterdir()):
        state.rmdir()
    shown = console()
    if after:
        shown.print(curve_table(after, len(kinds), before))
    shown.print(
        f"{result.steps:,} steps, {result.tokens:,} tokens, {result.seconds / 60:.1f} minutes; "
        f"checkpoint, plan.json and pictures are in {out}",
        markup=False,
    )


def _adapt_figures(
    result: AdaptResult, recipe: AdaptConfig, before: list[CurveRow], after: list[CurveRow]
) -> dict[str, Any]:
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "num_trained": result.num_trained,
        "learning_rate": recipe.learning_rate,
        "cross_layer_prob": recipe.cross_layer_prob,
        "rows_before": [row.to_dict() for row in before],
        "rows": [row.to_dict() for row in after],
        "losses": list(result.losses),
    }


def demo_command(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder, or one of an earlier demo.")] = Path(
        "demo-out"
    ),
    minutes: Annotated[
        float | None, option("--minutes", positive, "M", "Training time.  [default: 11 on a CPU, 0.75 on a GPU]")
    ] = None,
    model: Annotated[str, typer.Option("--model", metavar="MODEL")] = "builtin:smollm2-135m",
    data: Annotated[
        str, typer.Option("--data", metavar="DATA", help="Text: a file, a folder or builtin:NAME.")
    ] = "builtin:anarchism",
    blocks: Annotated[int, option("--blocks", count, "N", "Held-out blocks in each measurement.")] = 16,
    device: inputs.Device = "auto",
    seed: inputs.Seed = 0,
    json_file: inputs.Json = None,
) -> None:
    """The whole story in minutes: a real model, ruined by sharing, adapted, and writing with the smaller cache."""
    from depthkv.demo import print_figures, run_demo

    try:
        figures = run_demo(
            out, minutes=minutes, model_name=model, data=data, device=device, eval_blocks=blocks, seed=seed
        )
    except KeyboardInterrupt:
        show("depthkv: stopped; the same command goes on where it was")
        raise typer.Exit(130) from None
    write_json(json_file, figures)
    print_figures(figures, out, console())

"""What adapt shows, draws and writes beside the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from depthkv.adapt import AdaptConfig
from depthkv.adapt.stages import Stages, StagesResult, done_steps, estimate
from depthkv.cli.output import console, curve_table, show, table, write_json
from depthkv.compress.measure import streamed_losses
from depthkv.compress.recipe import CacheRecipe
from depthkv.evaluate import CurveRow
from depthkv.evaluate.qa import QAScores
from depthkv.memory import format_bytes
from depthkv.plan import SharingPlan
from depthkv.report import plot_loss, plot_plan, plot_retention

_FEW_TOKENS = 300_000


def announce(out: Path, state: Path) -> None:
    """Say what an earlier run left in `out` and in `state`."""
    if out.exists():
        show(f"{out} is there already, and is replaced when this run has ended")
    steps = done_steps(state)
    if steps is not None:
        show(f"going on from step {steps:,} of {state}")
    elif state.is_dir():
        show(f"no checkpoint in {state}: from the beginning")


def cache_losses(
    model: Any, recipe: CacheRecipe, blocks: torch.Tensor, batch_size: int, advance: Any
) -> dict[str, float]:
    """Losses of the second half of each block after the first: full cache, the recipe's plan, the recipe."""
    full = SharingPlan.full(recipe.plan.num_layers)
    arms: dict[str, SharingPlan | CacheRecipe] = {
        "full cache": full,
        "the recipe's plan": recipe.plan,
        "the recipe": recipe,
    }
    losses = {}
    for name, how in arms.items():
        found = streamed_losses(model, how, blocks, blocks.shape[1] // 2, batch_size=batch_size, advance=advance)
        losses[name] = sum(found) / len(found)
    return losses


def show_estimate(
    loaded: Any, examples: Any, adapt_config: AdaptConfig, stages: Stages, json_file: Path | None
) -> None:
    if not isinstance(examples, torch.Tensor):  # questions: as if all were as long as the longest
        longest = max(examples, key=lambda example: len(example["input_ids"]))
        examples = longest["input_ids"][None]
    found = estimate(loaded, examples, adapt_config, stages)
    shown = console()
    rows = {
        "weights": found.weight_bytes,
        "gradients": found.gradient_bytes,
        "optimizer": found.optimizer_bytes,
        "activations": found.activation_bytes,
    }
    first = f"{found.num_finetuned:,} parameters train first, then " if found.num_finetuned else ""
    shown.print(f"{first}{found.num_trained:,} parameters train in the routed stage")
    for name, size in rows.items():
        shown.print(f"{name:12} {format_bytes(size) if size is not None else 'not measured on a CPU'}")
    shown.print(f"{'together':12} {format_bytes(found.total_bytes)}")
    shown.print(f"one step     {found.seconds_per_step:.2f} s, {adapt_config.tokens_per_step:,} tokens")
    tokens = found.num_steps * adapt_config.tokens_per_step
    about = "" if adapt_config.max_minutes is None else "about "
    parts = f": {found.num_finetune_steps:,} of fine-tuning, {found.num_routed_steps:,} with routing"
    shown.print(f"{about}{found.num_steps:,} steps, {tokens:,} tokens{parts if stages.finetune else ''}")
    shown.print(f"about {found.num_steps * found.seconds_per_step / 60:.1f} minutes of training")
    if tokens < _FEW_TOKENS:
        show(f"depthkv: {tokens:,} tokens are few: some million are a start (docs/faq.md, Do I have to train?)")
    write_json(json_file, {**vars(found), "num_steps": found.num_steps, "total_bytes": found.total_bytes})


def draw(
    out: Path,
    result: StagesResult,
    adapt_config: AdaptConfig,
    chosen: SharingPlan,
    kinds: Any,
    before: list[Any],
    after: list[Any],
) -> None:
    tokens_at = [adapt_config.tokens_per_step * (i + 1) for i in range(result.routed.steps)]
    plot_loss(tokens_at, result.routed.losses, out / "loss.png")
    plot_plan(chosen, out / "plan.png", kinds)
    if after and isinstance(after[0], CurveRow):
        plot_retention({"before": before, "after": after}, out / "retention.png")


def training_figures(
    result: StagesResult, adapt_config: AdaptConfig, before: list[Any], after: list[Any]
) -> dict[str, Any]:
    return {
        "steps": result.routed.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.routed.tokens_per_second,
        "num_trained": result.routed.num_trained,
        "learning_rate": adapt_config.learning_rate,
        "rows_before": [row.to_dict() for row in before],
        "rows": [row.to_dict() for row in after],
        "curves": list(result.routed.curves),
        "finetune_losses": list(result.finetuned.losses) if result.finetuned is not None else [],
        "losses": list(result.routed.losses),
    }


def show_result(
    out: Path,
    result: StagesResult,
    before: list[Any],
    after: list[Any],
    streamed: list[dict[str, float]],
    num_layers: int,
    seconds: float,
) -> None:
    """Tables and the last line; `streamed` is before and after, and `seconds` what the command took in all."""
    shown = console()
    if after and isinstance(after[0], CurveRow):
        shown.print(curve_table(after, num_layers, before))
    elif after:
        shown.print(_qa_table(before, after))
    if streamed[0]:
        shown.print(
            table(
                ["second halves of blocks, through the cache", "loss before", "loss"],
                [[name, f"{value:.3f}", f"{streamed[1][name]:.3f}"] for name, value in streamed[0].items()],
            )
        )
    stages = [result.routed] if result.finetuned is None else [result.finetuned, result.routed]
    # a run that was taken up again has trained in earlier calls, too
    whole = "in this call" if any(stage.first_step for stage in stages) else "in all"
    shown.print(
        f"{result.routed.steps:,} routed steps, {result.tokens:,} tokens; "
        f"{result.seconds / 60:.1f} minutes of training, {seconds / 60:.1f} {whole}; "
        f"checkpoint, plan.json and pictures are in {out}",
        markup=False,
    )


def _qa_table(before: list[QAScores], after: list[QAScores]) -> Any:
    from rich.table import Table

    table = Table(title=f"{after[0].num_questions} held-out questions: before and after, per cent")
    for heading in ("retention", "F1", "exact match", "ROUGE-L"):
        table.add_column(heading, justify="right")
    for old, new in zip(before, after, strict=True):
        pairs = ((old.f1, new.f1), (old.exact_match, new.exact_match), (old.rouge_l, new.rouge_l))
        table.add_row(f"{new.retention:.0%}", *(f"{a:.1f} -> {b:.1f}" for a, b in pairs))
    return table

"""`depthkv evaluate`: what is lost at several retentions, by which suite, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from depthkv.checkpoint import load
from depthkv.cli import inputs
from depthkv.cli.inputs import count, naming, option
from depthkv.cli.output import command_line, console, number, progress_bar, show, table, waiting, write_json
from depthkv.compress.recipe import CacheRecipe
from depthkv.data import Document
from depthkv.errors import DataError, DepthKVError
from depthkv.evaluate.arms import Arm, plan_arms
from depthkv.evaluate.intervals import BETTER_THAN_FULL
from depthkv.evaluate.run import SUITES, EvaluateConfig, Evaluation
from depthkv.export import lacks_follower_kv
from depthkv.machine import environment
from depthkv.memory import format_bytes
from depthkv.plan import SharingPlan
from depthkv.qa import Question, read_squad

FORMAT, VERSION = "depthkv-evaluation", 1


def suite_name(text: str) -> str:
    """One of `SUITES` or "all"."""
    if text not in (*SUITES, "all"):
        raise typer.BadParameter(f"expected a suite among {', '.join(SUITES)} or all, got {text!r}")
    return text


def evaluate_command(
    model: inputs.Model,
    data: inputs.Texts,
    plan: inputs.PlanFile = None,
    recipe: inputs.RecipeFiles = None,
    retention: inputs.Retentions = None,
    suite: Annotated[
        list[str] | None, option("--suite", suite_name, "SUITE...", f"What to measure: {', '.join(SUITES)} or all.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option("--questions", metavar="FILE", help="Questions in SQuAD's JSON format, for qa.")
    ] = None,
    num_questions: Annotated[int, option("--num-questions", count, "N", "Questions to ask.")] = 100,
    blocks: Annotated[int, option("--blocks", count, "N", "Blocks of each kind of text, over its documents.")] = 16,
    block_size: inputs.BlockSize = 512,
    batch_size: inputs.BatchSize = 4,
    prompts: Annotated[int, option("--prompts", count, "N", "Texts of each kind to go on from (generation).")] = 8,
    new_tokens: Annotated[int, option("--new-tokens", count, "N", "Tokens to write after each (generation).")] = 64,
    length: Annotated[
        list[int] | None, option("--length", count, "N...", "Tokens of the prompts of retrieval; 512 and 1024.")
    ] = None,
    items: Annotated[int, option("--items", count, "N", "Prompts of each retrieval task and length.")] = 10,
    all_text: Annotated[bool, typer.Option("--all-text", help="All of the text, not only the tenth held out.")] = False,
    seed: inputs.Seed = 0,
    dtype: inputs.Dtype = "auto",
    device: inputs.Device = "auto",
    json_file: inputs.Json = None,
) -> None:
    """What is lost under one plan, or at several retentions, with 95 % intervals and paired against the full cache.

    With --recipe the first half of each block is read as a prompt and the other half through the cache, under every
    plan, too; each recipe's plan is measured beside it.

    An export without followers' K and V has no full cache: its first plan is what others are compared with, and
    `report` does not take such figures.

    Perplexity by default. `depthkv report` makes a page of the JSON file.
    """
    inputs.refuse_both(plan, retention)
    inputs.keep_inputs(json_file, model, data, plan, recipe, questions)
    if recipe and block_size < 2:
        raise DepthKVError(f"--block-size: expected at least 2 with --recipe, got {block_size}")
    suites = _suites(suite, questions)
    lengths = tuple(dict.fromkeys(length or (512, 1024)))
    settings = EvaluateConfig(
        suites=suites,
        block_size=block_size,
        blocks=blocks,
        streamed_prompt=block_size // 2 if recipe else None,
        batch_size=batch_size,
        prompts=prompts,
        prompt_tokens=min(64, block_size),
        new_tokens=new_tokens,
        questions=num_questions,
        lengths=lengths,
        items=items,
        seed=seed,
    )
    config, kinds = inputs.read_config(model)
    with naming(model):
        recipes = {path: inputs.read_recipe(path, kinds) for path in dict.fromkeys(recipe or ())}
        chosen = inputs.choose_plans(plan, retention, config, kinds) if plan or retention or not recipes else []
        plans = list(dict.fromkeys([*chosen, *(found.plan for found in recipes.values())]))
        inputs.require_positions(config, block_size, "--block-size")
        if "generation" in suites:
            inputs.require_positions(config, settings.prompt_tokens + new_tokens, "--new-tokens and the prompt")
        if "retrieval" in suites:
            inputs.require_positions(config, max(lengths), "--length")
    if lacks_follower_kv(config) and "agreement" in suites:
        raise DepthKVError("--suite: expected suites without agreement for an export, which has no full cache, got it")
    asked = _questions(questions)
    texts = {name: inputs.held_out_documents(name, all_text) for name in dict.fromkeys(data)}
    with waiting(f"loading {model}"):
        loaded, tokenizer, own = load(model, dtype=dtype, device=device, progress=show)
        work = _prepare(tokenizer, texts, settings, asked, all_text)
    # every figure is compared with the full cache's, so that is measured whether or not it was asked for
    full = SharingPlan.full(len(kinds))
    arms = plan_arms(plans if lacks_follower_kv(config) else [full, *plans])
    recipe_arms = _recipe_arms(recipes)
    for arm in recipe_arms:
        if {"perplexity", "agreement"} & set(suites) and arm.recipe and _is_idle(arm.recipe, block_size):
            show(f"depthkv: {arm.label} does nothing to blocks of {block_size} tokens; raise --block-size")
    with naming(model), progress_bar("evaluating", work.units(len(arms) + len(recipe_arms))) as advance:
        found_rows = work.run(loaded, [*arms, *recipe_arms], advance)
    measured = dict(zip([arm.plan for arm in arms], found_rows, strict=False))
    figures: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "data": list(texts),
        "held_out": not all_text,
        "suites": list(suites),
        "blocks": blocks,
        "block_size": block_size,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "seed": seed,
        "num_layers": len(kinds),
        "environment": environment(next(loaded.parameters()).device),
        "command": command_line(),
        "streamed_prompt": settings.streamed_prompt,
        "rows": [*(measured[plan] for plan in plans), *found_rows[len(arms) :]],
    }
    if own is not None and own.provenance:
        figures["provenance"] = dict(own.provenance)
    if full not in plans and full in measured:
        figures["full_cache"] = measured[full]
    write_json(json_file, figures)
    _show(figures)


def _recipe_arms(recipes: Mapping[Path, CacheRecipe]) -> list[Arm]:
    """Labelled by the files' names, or their whole paths where names are equal."""
    names = [path.name for path in recipes]
    labels = [path.name if names.count(path.name) == 1 else str(path) for path in recipes]
    return [Arm(label=label, recipe=found) for label, found in zip(labels, recipes.values(), strict=True)]


def _is_idle(recipe: CacheRecipe, num_tokens: int) -> bool:
    """Whether so many tokens are kept as they were computed."""
    kept = recipe.kept_tokens(num_tokens)
    return kept == num_tokens and (not recipe.is_quantised or not recipe.packed_tokens(kept))


def _suites(asked: list[str] | None, questions: Path | None) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(asked or ["perplexity"]))
    if "all" in chosen:
        chosen = tuple(suite for suite in SUITES if suite != "qa" or questions is not None)
    if "qa" in chosen and questions is None:
        raise DepthKVError("--questions: expected a file of questions for the suite qa, got none")
    if questions is not None and not {"qa", "retrieval"} & set(chosen):
        raise DepthKVError(f"--questions: expected the suite qa or retrieval with it, got {', '.join(chosen)}")
    return chosen


def _questions(path: Path | None) -> list[Question]:
    if path is None:
        return []
    with naming(path):
        return read_squad(path)


def _prepare(
    tokenizer: Any,
    texts: Mapping[str, Sequence[Document]],
    settings: EvaluateConfig,
    questions: list[Question],
    all_text: bool,
) -> Evaluation:
    try:
        return Evaluation(tokenizer=tokenizer, texts=texts, config=settings, questions=questions)
    except DepthKVError as error:
        where = "" if all_text else " (in the tenth that is held out; --all-text uses everything)"
        # a length or questions that do not fit are named by the error itself
        is_text = isinstance(error, DataError) and "questions" not in str(error)
        raise type(error)(f"--data {' '.join(texts)}: {error}{where}" if is_text else str(error)) from error


def _show(figures: dict[str, Any]) -> None:
    """One table: a column for each figure of the suites that ran."""
    rows = [*([figures["full_cache"]] if "full_cache" in figures else []), *figures["rows"]]
    columns: list[tuple[str, Any]] = [
        ("layers that keep a cache", lambda row: f"{len(row['leaders'])} of {figures['num_layers']}, {row['label']}"),
        ("cache per token", lambda row: format_bytes(row["kv_bytes_per_token"])),
    ]
    if figures["streamed_prompt"] is not None:
        heading = f"cache of {figures['block_size']} tokens"
        columns[1] = (heading, lambda row: f"{format_bytes(row['cache_bytes'])} ({row['cache_fraction']:.1%})")
    first = rows[0]
    if "loss" in first:
        columns.append(("loss [95 %]", lambda row: _with_interval(row["loss_score"], ".3f")))
        columns.append(("over the full cache", lambda row: _difference(row["loss_score"])))
        columns.append(("perplexity", lambda row: number(row["perplexity"])))
    if "agreement" in first:
        columns.append(("same next token", lambda row: f"{row['agreement']['top1']['value']:.1f} %"))
        columns.append(("KL", lambda row: f"{row['agreement']['kl']['value']:.3f}"))
    if "generation" in first:
        columns.append(("repetition", lambda row: f"{row['generation']['repetition']['value']:.0f} %"))
    if "qa" in first:
        columns.append(("F1 / EM", lambda row: _pair(row["qa"]["f1"], row["qa"]["exact_match"])))
    if "retrieval" in first:
        columns.append(("retrieval", lambda row: _with_interval(row["retrieval"]["score"], ".0f")))
    held_out = "held out" if figures["held_out"] else "all text"
    out = console()
    counts = [f"{figures['blocks']} blocks of {figures['block_size']} tokens of each"] if "loss" in first else []
    for key, score, things in (
        ("generation", "length", "texts"),
        ("qa", "f1", "questions"),
        ("retrieval", "score", "prompts to retrieve from"),
    ):
        if key in first:
            counts.append(f"{first[key][score]['count']} {things}")
    out.print(
        f"{figures['model']} on {', '.join(figures['data'])} ({held_out}): {', '.join(counts)}, {figures['dtype']}",
        markup=False,
        soft_wrap=True,
    )
    out.print(table([name for name, _ in columns], [[cell(row) for _, cell in columns] for row in rows]))
    if "loss" in first and len(figures["data"]) > 1:
        headings = ["loss by kind of text", *figures["data"]]
        cells = [[row["label"], *(f"{text['loss']['value']:.3f}" for text in row["texts"])] for row in rows]
        out.print(table(headings, cells))
    for row in rows:
        if row["cache_recipe"] is not None:
            out.print(f"{row['label']}: {row['cache_recipe']['words']}", markup=False, soft_wrap=True)
    if "loss" in first and (prompt := figures["streamed_prompt"]) is not None:
        read = f"{prompt} tokens of each block were read as a prompt; the loss is of the others, through the cache"
        out.print(read, style="dim", soft_wrap=True)
    if any((row["loss_score"]["difference_high"] or 0.0) < 0 for row in rows if "loss" in row):
        out.print(BETTER_THAN_FULL, markup=False, soft_wrap=True)


def _with_interval(score: dict[str, Any], shape: str) -> str:
    value, low, high = score["value"], score["low"], score["high"]
    return f"{value:{shape}} [{low:{shape}}, {high:{shape}}]" if low == low else f"{value:{shape}}"


def _difference(score: dict[str, Any]) -> str:
    if score["difference"] is None:
        return ""
    low, high = score["difference_low"], score["difference_high"]
    interval = f" [{low:+.3f}, {high:+.3f}]" if low == low else ""
    return f"{score['difference']:+.3f}{interval}"


def _pair(one: dict[str, Any], other: dict[str, Any]) -> str:
    return f"{one['value']:.1f} / {other['value']:.1f}"

"""The command that trains: adapt."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from depthkv.adapt import AdaptConfig
from depthkv.adapt.adapters import LoraSettings, save_adapter
from depthkv.adapt.config import PRECISIONS, TRAINABLE
from depthkv.adapt.pretrain import equal_cache_layers, from_config, train_tokenizer
from depthkv.adapt.stages import ADAPTER_LEARNING_RATE, OBJECTIVES, Stages, discard_stages, train_in_stages
from depthkv.checkpoint import load, load_tokenizer, save
from depthkv.cli import inputs
from depthkv.cli.inputs import count, count_or_none, naming, option, positive
from depthkv.cli.output import bar, show, waiting, write_json
from depthkv.cli.training import announce, cache_losses, draw, show_estimate, show_result, training_figures
from depthkv.compress.noise import recipe_noise
from depthkv.data import Document, resolve_data, split_documents, token_blocks
from depthkv.errors import CheckpointError, DataError, DepthKVError
from depthkv.evaluate import retention_curve, spread_blocks
from depthkv.evaluate.qa import evaluate_qa
from depthkv.folders import require_replaceable
from depthkv.patches import ADAPTER_SWITCH
from depthkv.plan import SharingPlan
from depthkv.qa import Question, collate, encode, read_squad, split_articles
from depthkv.routing import Sampler
from depthkv.samplers import SAMPLERS, FullCache, parse_sampler

_DEFAULT = AdaptConfig(max_minutes=15.0)
_FINETUNE = 0.7
"""Part of the budget for the full-cache model, where an adapter trains: measured in docs/results.md."""
_MAX_QA_TOKENS = 512


@dataclass
class _Task:
    """What is trained and measured on."""

    examples: Any
    blocks: torch.Tensor | None
    questions: list[Question] | None = None
    collate: Any = None


def adapt_command(
    model: inputs.Model,
    data: inputs.Texts,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the adapted checkpoint.")],
    plan: inputs.PlanFile = None,
    recipe_file: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="A recipe.json: its plan, training with noise of its bits."),
    ] = None,
    retention: inputs.Retention = None,
    minutes: Annotated[
        float | None,
        option(
            "--minutes",
            positive,
            "M",
            f"Of training alone, without loading, measuring and saving.  [default: {_DEFAULT.max_minutes:g}]",
        ),
    ] = None,
    tokens: Annotated[int | None, option("--tokens", count, "N", "Training tokens, instead of --minutes.")] = None,
    trainable: Annotated[
        str,
        typer.Option(
            "--trainable",
            metavar="|".join(("lora", "dora", *TRAINABLE)),
            help="An adapter that is on while layers share, or the model's own weights.",
        ),
    ] = "lora",
    rank: Annotated[int, option("--rank", count, "N", "Of the adapter.")] = 16,
    finetune: Annotated[
        float | None,
        option(
            "--finetune",
            inputs.probability,
            "SHARE",
            f"Part of the budget for ordinary fine-tuning first.  [default: {_FINETUNE:g} with an adapter, else 0]",
        ),
    ] = None,
    local_steps: Annotated[
        int, option("--local-steps", count_or_none, "N", "Steps of the layer-local stage before routing.")
    ] = 0,
    sampler: Annotated[
        str,
        typer.Option("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)}; cla:K, rd-cla:K; A+B mixes two."),
    ] = "even",
    cross_layer_prob: Annotated[
        float,
        option(
            "--cross-layer-prob",
            inputs.probability,
            "P",
            "For r-cla, rd-cla and plan: probability that a layer reads an earlier layer's KV in a step.",
        ),
    ] = _DEFAULT.cross_layer_prob,
    objective: Annotated[str, typer.Option("--objective", metavar="|".join(OBJECTIVES))] = "lm",
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", metavar="FILE", help="For distill: a stored teacher instead of a live one."),
    ] = None,
    learning_rate: Annotated[
        float | None,
        option(
            "--learning-rate",
            positive,
            "LR",
            f"Peak.  [default: {ADAPTER_LEARNING_RATE:g} for an adapter, else {_DEFAULT.learning_rate:g}]",
        ),
    ] = None,
    batch_size: inputs.BatchSize = _DEFAULT.batch_size,
    accumulate_steps: Annotated[
        int, option("--accumulate-steps", count, "N", "Forwards in one optimizer step.")
    ] = _DEFAULT.accumulate_steps,
    block_size: inputs.BlockSize = _DEFAULT.block_size,
    precision: Annotated[str, typer.Option("--precision", metavar="|".join(PRECISIONS))] = _DEFAULT.precision,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile norms and MLPs: a slow start, then faster on a GPU.")
    ] = False,
    eval_every: Annotated[
        int | None, option("--eval-every", count, "N", "Measure every N steps, and keep the best state.")
    ] = None,
    best_mix: Annotated[
        str | None,
        typer.Option(
            "--best-mix", metavar="R:W,...", help="Retentions and weights of the best.  [default: 1:1,.5:1,.25:1]"
        ),
    ] = None,
    early_stop: Annotated[
        int | None, option("--early-stop", count, "N", "Stop after N measurements without a better one.")
    ] = None,
    save_every: Annotated[
        float, option("--save-every", positive, "MINUTES", "Time between checkpoints, which a kill loses at most.")
    ] = _DEFAULT.save_every_minutes,
    report_to: Annotated[
        str | None, typer.Option("--report-to", metavar="NAME", help="tensorboard, trackio, wandb or mlflow.")
    ] = None,
    task: Annotated[str, typer.Option("--task", metavar="text|qa", help="qa: DATA is SQuAD-format JSON.")] = "text",
    from_config_: Annotated[
        bool, typer.Option("--from-config", help="Pre-train: MODEL's config with random weights.")
    ] = False,
    equal_cache: Annotated[
        float | None,
        option(
            "--equal-cache",
            inputs.retention_value,
            "R",
            "With --from-config: the ordinary shallower model whose cache is as large as the deep one's at R.",
        ),
    ] = None,
    independent_maps: Annotated[
        bool, typer.Option("--independent-maps", help="Distributed: each process draws maps of its own.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate memory and time.")] = False,
    seed: inputs.Seed = 0,
    blocks: Annotated[
        int, option("--blocks", count_or_none, "N", "Held-out blocks of each text (or questions) to measure; 0: none.")
    ] = 8,
    device: inputs.Device = "auto",
    json_file: inputs.Json = None,
) -> None:
    """Train a model with stochastic KV routing, so that it can keep the cache of fewer layers.

    DIR gets the checkpoint with a plan (--plan, that of --recipe, or --retention, 0.5 by default) and pictures. After
    Ctrl-C the same command goes on where it stopped, after a kill from the last checkpoint. Under torchrun or
    accelerate launch, processes share the batches.
    """
    started = time.perf_counter()
    inputs.refuse_beside_recipe(recipe_file, plan=plan, retention=retention, equal_cache=equal_cache)
    inputs.refuse_both(plan, retention)
    inputs.keep_inputs(json_file, model, data, plan, recipe_file)
    if minutes is not None and tokens is not None:
        raise DepthKVError("expected --minutes or --tokens, got both")
    if task not in ("text", "qa"):
        raise DepthKVError(f"expected --task text or qa, got {task!r}")
    if equal_cache is not None and not from_config_:
        raise DepthKVError("expected --equal-cache with --from-config, got it alone")
    if best_mix is not None and eval_every is None:
        raise DepthKVError("expected --best-mix with --eval-every, got it alone")
    if trainable not in ("lora", "dora", *TRAINABLE):
        raise DepthKVError(f"expected --trainable among lora, dora, {', '.join(TRAINABLE)}, got {trainable!r}")
    is_adapter = trainable in ("lora", "dora") and not from_config_
    adapt_config = AdaptConfig(
        max_minutes=_DEFAULT.max_minutes if minutes is None and tokens is None else minutes,
        max_tokens=tokens,
        learning_rate=learning_rate or (ADAPTER_LEARNING_RATE if is_adapter else _DEFAULT.learning_rate),
        cross_layer_prob=cross_layer_prob,
        batch_size=batch_size,
        accumulate_steps=accumulate_steps,
        block_size=block_size,
        trainable="all" if from_config_ else _DEFAULT.trainable if is_adapter else trainable,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile_,
        independent_maps=independent_maps,
        save_every_minutes=save_every,
        eval_every=eval_every,
        early_stop=early_stop,
        report_to=(report_to,) if report_to is not None else (),
        seed=seed,
        best_mix=_parse_mix(best_mix) if best_mix is not None else _DEFAULT.best_mix,
    )
    stages = Stages(
        finetune=finetune if finetune is not None else _FINETUNE if is_adapter else 0.0,
        local_steps=local_steps,
        lora=LoraSettings(rank=rank, alpha=2.0 * rank, use_dora=trainable == "dora") if is_adapter else None,
        objective=objective,
        teacher_file=teacher,
    )
    with naming("--out"):
        require_replaceable(out)
    config, kinds = inputs.read_config(model)
    with naming(model):
        inputs.require_all_weights(config)
    num_layers = None
    if equal_cache is not None:
        num_layers = equal_cache_layers(len(kinds), equal_cache)
        kinds = kinds[:num_layers]
    with naming(model):
        if equal_cache is not None:
            chosen, plans = SharingPlan.full(num_layers or 1), [SharingPlan.full(num_layers or 1)]
        else:
            chosen = inputs.choose_plan(plan, retention, config, kinds, default=0.5)
            if recipe_file is not None:
                cache_recipe = inputs.read_recipe(recipe_file, kinds)
                with naming(recipe_file):
                    recipe_noise(cache_recipe, kinds)
                chosen, adapt_config = cache_recipe.plan, replace(adapt_config, cache_recipe=cache_recipe)
            plans = inputs.choose_plans(None, None, config, kinds)
        plans += [chosen] if chosen not in plans else []
        inputs.require_positions(config, block_size, "--block-size")
    with naming("--sampler"):
        chosen_sampler = _sampler(sampler, chosen, adapt_config, equal_cache is not None)
    data = list(dict.fromkeys(data))
    state = out.with_name(f"{out.name}.unfinished")
    if inputs.is_main_process() and not dry_run:
        announce(out, state)
    with waiting(f"loading {model}"):
        loaded, tokenizer = _model(model, data, from_config_, num_layers, device, seed)
    work = _read_task(task, data, tokenizer, adapt_config, blocks)
    if dry_run:
        if inputs.is_main_process():
            show_estimate(loaded, work.examples, adapt_config, stages, json_file)
        return

    def curve(what: str, measured: Any) -> list[Any]:
        if work.blocks is None and not work.questions:
            return []
        place = next(measured.parameters()).device
        cast: AbstractContextManager[Any] = nullcontext()
        if adapt_config.uses_bf16(place):
            cast = torch.autocast(place.type, torch.bfloat16)
        if work.questions:
            with cast, bar(what, len(plans) * len(work.questions)) as advance:
                return evaluate_qa(measured, tokenizer, work.questions, plans, progress=advance)
        assert work.blocks is not None
        with cast, bar(what, len(plans) * len(work.blocks)) as advance:
            return retention_curve(measured, work.blocks, plans, batch_size=batch_size, progress=advance)

    def through_cache(measured: Any) -> dict[str, float]:
        if adapt_config.cache_recipe is None or work.blocks is None:
            return {}
        with bar("measuring through the cache", 3 * len(work.blocks)) as advance:
            return cache_losses(measured, adapt_config.cache_recipe, work.blocks, batch_size, advance)

    with naming(model):
        before = curve("measuring before training", loaded) if inputs.is_main_process() else []
        streamed = [through_cache(loaded)] if inputs.is_main_process() else []
        try:
            result = train_in_stages(
                loaded,
                work.examples,
                adapt_config,
                stages,
                sampler=chosen_sampler,
                resume_dir=state,
                eval_blocks=work.blocks,
                collate=work.collate,
                tell=show,
                warn=lambda line: show(f"depthkv: {line}"),
            )
        except KeyboardInterrupt:
            show(f"depthkv: stopped; the same command goes on from {state}, delete that folder to start anew")
            raise typer.Exit(130) from None
        if not inputs.is_main_process():
            return
        after = curve("measuring after training", result.model)
        streamed.append(through_cache(result.model))
    provenance = {"made_by": "depthkv adapt", "base_model": model, "data": " ".join(data), "tokens": result.tokens}
    provenance["sampler"] = sampler
    if adapt_config.cache_recipe is not None:
        provenance["noise"] = adapt_config.cache_recipe.describe()
    if is_adapter:
        local = str(Path(model).resolve()) if Path(model).exists() else model
        base = "base" if stages.finetune else local
        save_adapter(out, result.model, base=base, tokenizer=tokenizer, plan=chosen, provenance=provenance)
    else:
        save(out, loaded, tokenizer, None if equal_cache is not None else chosen, provenance)
    if adapt_config.cache_recipe is not None:
        adapt_config.cache_recipe.save(out / "recipe.json")
    draw(out, result, adapt_config, chosen, kinds, before, after)
    figures = training_figures(result, adapt_config, before, after)
    if streamed[0]:
        names = streamed[0]
        figures["through_cache"] = [
            {"label": name, "loss_before": streamed[0][name], "loss": streamed[1][name]} for name in names
        ]
    write_json(json_file, {"model": model, "data": data, "out": str(out), "leaders": list(chosen.leaders), **figures})
    discard_stages(state)  # only now is everything safe that it could give back
    show_result(out, result, before, after, streamed, len(kinds), time.perf_counter() - started)


def _sampler(text: str, plan: SharingPlan, adapt_config: AdaptConfig, is_ordinary: bool) -> Sampler | None:
    """None leaves it to `adapt_config`."""
    if is_ordinary:
        return FullCache()
    if text == "even":
        return None
    return parse_sampler(text, cross_layer_prob=adapt_config.cross_layer_prob, seed=adapt_config.seed, plan=plan)


def _parse_mix(text: str) -> tuple[tuple[float, float], ...]:
    try:
        pairs = [part.partition(":") for part in text.split(",")]
        return tuple((float(retention), float(weight or 1)) for retention, _, weight in pairs)
    except ValueError:
        raise DepthKVError(f"expected --best-mix such as 1:1,.5:2, got {text!r}") from None


def _model(name: str, data: list[str], is_new: bool, num_layers: int | None, device: str, seed: int) -> tuple[Any, Any]:
    # one device for each process: the optimizer's state lies where the weights are
    single = inputs.process_device() if device == "auto" else device
    if not is_new:
        loaded, tokenizer, _ = load(name, dtype="float32", device=single, progress=show)
        if hasattr(loaded, ADAPTER_SWITCH):
            raise DepthKVError(f"expected a model without an adapter to train, got {name}")
        return loaded, tokenizer
    try:
        tokenizer = load_tokenizer(name)
    except CheckpointError:
        documents = [document for name in data for document in _split(name)[0]]
        tokenizer = train_tokenizer(documents, inputs.read_config(name)[0].get_text_config().vocab_size)
    return from_config(name, num_layers=num_layers, seed=seed).to(single), tokenizer


def _split(name: str) -> tuple[list[Document], list[Document]]:
    with naming(name):
        return split_documents(resolve_data(name, progress=show))


def _read_task(task: str, data: list[str], tokenizer: Any, adapt_config: AdaptConfig, blocks: int) -> _Task:
    if task == "text":
        training: list[torch.Tensor] = []
        test: list[torch.Tensor] = []
        for name in data:
            documents, held_out = _split(name)
            with naming(name):
                training.append(token_blocks(documents, tokenizer, adapt_config.block_size))
                if blocks:
                    test.append(spread_blocks(token_blocks(held_out, tokenizer, adapt_config.block_size), blocks))
        return _Task(examples=torch.cat(training), blocks=torch.cat(test) if test else None)
    if adapt_config.eval_every is not None:
        raise DataError("expected --eval-every with --task text, got --task qa")
    if len(data) > 1:
        raise DataError(f"expected one file of questions, got {' '.join(data)}")
    with naming(data[0]):
        questions, held = split_articles(read_squad(data[0]), seed=adapt_config.seed)
        examples = encode(
            questions, tokenizer, max_tokens=min(_MAX_QA_TOKENS, adapt_config.block_size), seed=adapt_config.seed
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    stride = max(1, len(held) // blocks) if blocks else len(held)
    chosen = held[::stride][:blocks] if blocks else []
    return _Task(examples=examples, blocks=None, questions=chosen, collate=lambda rows: collate(rows, pad))

"""The whole story in minutes: a real model, ruined by sharing, adapted, and generating text with the smaller cache."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from depthkv.adapt import AdaptConfig, AdaptResult, adapt, discard_state, has_state
from depthkv.adapt.adapters import load_adapter
from depthkv.architectures import layer_kinds
from depthkv.checkpoint import builtin_adapter, load, save
from depthkv.data import BUILTIN_TEXTS, Document, resolve_data, split_documents, token_blocks
from depthkv.downloads import BUILTIN_ADAPTERS
from depthkv.errors import DataError, DepthKVError
from depthkv.evaluate import CurveRow, retention_curve, spread_blocks
from depthkv.files import write_text
from depthkv.memory import format_bytes, measured_cache_bytes
from depthkv.patches import ADAPTER_SWITCH
from depthkv.plan import SharingPlan
from depthkv.report import plot_loss, plot_plan, plot_retention
from depthkv.samplers import default_sampler
from depthkv.sharing import share

BUILTIN = "builtin:smollm2-135m"
ADAPTER = BUILTIN_ADAPTERS[0]
CPU_MINUTES = 11.0
"""Training minutes on a CPU: with downloads, two curves and samples the demo then takes about 13."""
GPU_MINUTES = 0.75
KEEP_EVERY = (1, 2, 3, 4)
"""Plans of the curve: every k-th layer keeps its cache."""
PROMPT_TOKENS = 48
NEW_TOKENS = 48

_OWN = {"figures.json", "retention.png", "loss.png", "plan.png", "samples.txt", "model", "training"}


def run_demo(
    out: str | os.PathLike[str],
    *,
    train: bool = False,
    minutes: float | None = None,
    model_name: str = BUILTIN,
    data: str = "builtin:anarchism",
    device: str = "auto",
    eval_blocks: int = 16,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure, adapt, measure again, generate; everything goes into the folder `out`.

    Writes `figures.json` (what this returns), `retention.png`, `plan.png` and `samples.txt`. Adapted is the built-in
    model by the adapter that comes with depthkv. With `train` it is trained here instead, which also leaves `loss.png`
    and the checkpoint `model/` with its plan; a demo that was stopped during training goes on where it was.

    Args:
        out: a new folder, or one of an earlier demo.
        train: train instead of taking the adapter; implied by `minutes`, `settings` and by another model.
        minutes: training minutes; None is `CPU_MINUTES` or `GPU_MINUTES`. The rest takes about two minutes on 2 cores.
        model_name: anything that `depthkv.load` takes.
        data: `builtin:NAME` or a path. Where a built-in text cannot be fetched, the other one or the bundled one is
            used, and said so.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        eval_blocks: held-out blocks in every measurement.
        seed: of the routing maps, the order of the data and the split.
        settings: those of `AdaptConfig` to change.
        progress: progress bars and messages on stderr.

    Raises:
        DepthKVError: `out` holds files of something else, or a model or text cannot be used.
        KeyboardInterrupt: Ctrl-C; training goes on when the demo is called again.
    """
    started = time.perf_counter()
    out = Path(out)
    _check_folder(out)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    train = train or minutes is not None or settings is not None or model_name != BUILTIN
    if minutes is None:
        minutes = CPU_MINUTES if device == "cpu" else GPU_MINUTES
    config = AdaptConfig(**{"max_minutes": minutes, "seed": seed, **(settings or {})})
    tell = Console(stderr=True, quiet=not progress)
    seconds: dict[str, float] = {}

    with _timed(seconds, "load"):
        tell.print(f"Loading {model_name} and text")
        documents, data_used = _documents(data, tell)
        model, tokenizer, _ = load(model_name, dtype="float32", device=device)
        if hasattr(model, ADAPTER_SWITCH):
            raise DepthKVError(f"expected a model without an adapter, got {model_name}")
        train_documents, held_out_documents = split_documents(documents, seed=seed)
        train_blocks = token_blocks(train_documents, tokenizer, config.block_size)
        held_out: torch.Tensor = spread_blocks(
            token_blocks(held_out_documents, tokenizer, config.block_size), eval_blocks
        )
    kinds = layer_kinds(model.config)
    plans = [SharingPlan.every(k, len(kinds), kinds) for k in KEEP_EVERY]
    shared_plan = plans[1]
    prompt = held_out[:1, :PROMPT_TOKENS]
    bf16 = config.uses_bf16(next(model.parameters()).device)

    with _timed(seconds, "before"):
        resuming = " (training goes on afterwards)" if has_state(out / "training") else ""
        tell.print(f"Measuring the untrained model on {held_out.numel():,} held-out tokens{resuming}")
        before = _curve(model, held_out, plans, bf16)
        samples = _samples("before", model, tokenizer, prompt, shared_plan)

    result = None
    if train:
        with _timed(seconds, "training"):
            tell.print(
                f"Training with stochastic KV routing for {minutes:g} minutes; Ctrl-C stops, the same command resumes"
            )
            result = adapt(
                model,
                train_blocks,
                config,
                sampler=default_sampler(seed),
                resume_dir=out / "training",
                progress=progress,
                warn=lambda line: tell.print(line, markup=False),
            )
    else:
        tell.print(f"Switching on the adapter {ADAPTER} (--train trains one here instead)")
        model = load_adapter(model, builtin_adapter(ADAPTER))

    with _timed(seconds, "after"):
        tell.print("Measuring the adapted model")
        after = _curve(model, held_out, plans, bf16)
        samples += _samples("after", model, tokenizer, prompt, shared_plan)

    with _timed(seconds, "saving"):
        plot_retention({"untrained": before, "adapted": after}, out / "retention.png")
        if result is not None:
            provenance = {"made_by": "depthkv demo", "base_model": model_name, "data": data_used}
            save(out / "model", model, tokenizer, shared_plan, {**provenance, "tokens": result.tokens})
            tokens_at = [config.tokens_per_step * (i + 1) for i in range(result.steps)]
            plot_loss(tokens_at, result.losses, out / "loss.png")
        plot_plan(shared_plan, out / "plan.png", kinds=kinds)
        write_text(out / "samples.txt", _samples_text(tokenizer.decode(prompt[0]), samples), "sample text")
    seconds["total"] = time.perf_counter() - started

    figures = {
        "model": model_name,
        "data": data_used,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "held_out_tokens": held_out.numel(),
        "adapter": None if train else ADAPTER,
        "config": asdict(config) if train else None,
        "precision": "bf16" if bf16 else "fp32",
        "before": [asdict(row) for row in before],
        "after": [asdict(row) for row in after],
        "training": _training_figures(result) if result is not None else None,
        "kv_source_layers": list(shared_plan.kv_source_layers),
        "samples": samples,
        "seconds": seconds,
    }
    write_text(out / "figures.json", json.dumps(figures, indent=2) + "\n", "the figures")
    # only now is everything safe that the state of the training could give back
    if result is not None:
        discard_state(out / "training")
        (out / "training").rmdir()
    return figures


def print_figures(figures: Mapping[str, Any], out: str | os.PathLike[str], console: Console | None = None) -> None:
    """Show what `run_demo` returned: the table, the sample text and what lies in `out`."""
    console = console or Console()
    table = Table(title=f"{figures['model']}: held-out loss (perplexity), nats per token")
    for heading in ("layers that keep a cache", "cache per token", "untrained", "adapted"):
        table.add_column(heading, justify="right")
    for before, after in zip(figures["before"], figures["after"], strict=True):
        table.add_row(
            f"{len(before['leaders'])} of {len(figures['kv_source_layers'])} ({before['retention']:.0%})",
            format_bytes(before["kv_bytes_per_token"]),
            *(f"{row['loss']:.2f} ({_number(row['perplexity'])})" for row in (before, after)),
        )
    console.print(table)
    for sample in figures["samples"]:
        label = f"{sample['when']} adapting, {sample['cache']} cache ({format_bytes(sample['cache_bytes'])})"
        console.print(label, style="bold", highlight=False)
        console.print(sample["text"].strip(), markup=False, highlight=False)
    training, seconds = figures["training"], figures["seconds"]
    if training is not None:
        how = f"{training['tokens']:,} training tokens at {training['tokens_per_second']:,.0f} per second"
        left = "Pictures, figures.json and the model are"
    else:
        how = f"Adapted by {figures['adapter']}; depthkv demo --train does without it"
        left = "Pictures and figures.json are"
    console.print(f"{how}; {seconds['total'] / 60:.1f} minutes in all. {left} in {Path(out)}/", highlight=False)


def _documents(data: str, tell: Console) -> tuple[list[Document], str]:
    """The text, and which it is: without a network, a built-in one gives way to the one in the package."""
    if not data.startswith("builtin:"):
        return resolve_data(data, lambda line: tell.print(line, markup=False)), data
    choices = list(dict.fromkeys([data, *(f"builtin:{text}" for text in BUILTIN_TEXTS)]))
    for name in choices[:-1]:
        try:
            return resolve_data(name), name
        except DataError as error:
            if name == data and data.removeprefix("builtin:") not in BUILTIN_TEXTS:
                raise  # a typing error, not a missing network
            tell.print(f"{name} could not be fetched: {error}", markup=False)
    tell.print("Using the short text that comes with depthkv: figures will be worse than with a long one")
    return resolve_data("builtin:fallback"), "builtin:fallback"


def _curve(model: PreTrainedModel, blocks: torch.Tensor, plans: Sequence[SharingPlan], bf16: bool) -> list[CurveRow]:
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        return retention_curve(model, blocks, plans)


@torch.no_grad()
def _samples(
    when: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: torch.Tensor,
    plan: SharingPlan,
) -> list[dict[str, Any]]:
    """Greedy text from the full and from the shared cache."""
    samples = []
    prompt = prompt.to(next(model.parameters()).device)
    for cache in ("full", "shared"):
        with share(model, plan) if cache == "shared" else nullcontext():
            output: Any = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,  # an early end would make the caches incomparable
                do_sample=False,
                return_dict_in_generate=True,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        samples.append(
            {
                "when": when,
                "cache": cache,
                "text": tokenizer.decode(output.sequences[0, prompt.shape[1] :], skip_special_tokens=True),
                "cache_bytes": measured_cache_bytes(output.past_key_values),
            }
        )
    return samples


def _samples_text(prompt: str, samples: Sequence[Mapping[str, Any]]) -> str:
    parts = [f"Prompt (held-out text): {prompt}"]
    for sample in samples:
        size = format_bytes(sample["cache_bytes"])
        parts.append(f"{sample['when']} adapting, {sample['cache']} cache, {size}:\n{sample['text'].strip()}")
    return "\n\n".join(parts) + "\n"


def _training_figures(result: AdaptResult) -> dict[str, Any]:
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "num_trained": result.num_trained,
        "losses": list(result.losses),
    }


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DepthKVError(f"expected a folder for the demo's files, got the file {out}")
    foreign = sorted(path.name for path in out.iterdir() if path.name not in _OWN) if out.is_dir() else []
    if foreign:
        raise DepthKVError(f"expected a new folder or an earlier demo's, got {out}, which holds {foreign[0]}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DepthKVError(f"expected to write to the folder {out}, got {error.strerror or error}") from error


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started

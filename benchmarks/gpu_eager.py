"""The eager stack, the paper's setting: transformers' dynamic cache and SDPA, one Python call for each token.

Runs are those of `depthkv bench`; all plans take turns in each round, so that the full cache is measured once for all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import gpu_attention
import torch
from gpu_compiled import free, sharing
from gpu_model import PLANS, Output, make_plan, seconds_of
from transformers import DynamicCache

from depthkv import SharingPlan
from depthkv.bench import BenchConfig, Sample, _count, _is_out_of_memory, _try_run
from depthkv.decoder import find_decoder
from depthkv.memory import kv_bytes_per_token, prefill_activation_bytes, weight_bytes
from depthkv.roofline import MachineLimits, roofline


def measure_cell(
    model: Any,
    plans: Sequence[str],
    config: BenchConfig,
    limits: MachineLimits,
    out: Output,
    warm_up: bool = True,
) -> None:
    """One row for each plan. The rounds are cut short when the time is up."""
    gpu_attention.use(model, "sdpa")
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, config.prompt_tokens)
    prompt = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
    layers = model.config.num_hidden_layers
    samples: dict[str, list[Sample]] = {name: [] for name in plans}
    work = {}
    for name in plans:
        plan = make_plan(name, layers)
        with sharing(model, plan):
            work[name] = _count(find_decoder(model), plan, config, True)
    exhausted: set[str] = set()
    round_s = 0.0
    for number in range(config.repeats + warm_up):
        if number > warm_up and not out.has(round_s):
            break
        began = time.monotonic()
        for name in list(plans)[number % len(plans) :] + list(plans)[: number % len(plans)]:
            if name in exhausted:
                continue
            with sharing(model, make_plan(name, layers)):
                sample = _try_run(model, prompt, config.new_tokens, model.device, {"logits_to_keep": 1})
            if sample is None:
                exhausted.add(name)
                samples[name].clear()
            elif number >= warm_up:
                samples[name].append(sample)
        round_s = time.monotonic() - began
    for name in plans:
        row: dict[str, Any] = {"run": "eager", "plan": name, "leaders": list(make_plan(name, layers).leaders)}
        row |= {"context": config.prompt_tokens, "batch_size": config.batch_size, "new_tokens": config.new_tokens}
        row["repeats"] = len(samples[name])
        if name in exhausted:
            out.write({**row, "out_of_memory": True})
            continue
        if not samples[name]:
            continue
        for field in ("ttft_s", "decode_tokens_per_s", "itl_s", "cache_bytes", "peak_bytes"):
            values = [getattr(sample, field) for sample in samples[name]]
            if values[0] is not None:
                row |= {field: statistics.median(values), f"{field}_range": [min(values), max(values)]}
        for field, ratio in (("ttft_s", "ttft_ratio"), ("decode_tokens_per_s", "decode_ratio")):
            pairs = zip(samples[name], samples["g=1"], strict=False)  # of one round
            ratios = [getattr(ours, field) / getattr(full, field) for ours, full in pairs]
            if name != "g=1" and ratios:
                row[ratio] = statistics.median(ratios)
        figures = roofline(work[name], limits, {"prefill": row["ttft_s"], "decode": row["itl_s"]})
        row |= {key: figures[key] for key in ("prefill_share", "decode_share", "prefill_limit_s", "decode_limit_s")}
        out.write(row)


def largest_batch(
    model: Any, name: str, context: int, limit: int, out: Output, steps: int = 6, ceiling: int = 4096
) -> int:
    """Most sequences of `context` tokens that decode within `limit` bytes with transformers' dynamic cache.

    The prompts are taken to be read one by one, as engines do: the cache of the batch is filled with random values, one
    prompt is read beside it (`limit` must hold that, too), then all sequences decode. The first guess comes from the
    byte formulas; then smaller and larger ones until the largest is known to within 2 %.
    """
    gpu_attention.use(model, "sdpa")
    plan = make_plan(name, model.config.num_hidden_layers)
    weights = weight_bytes(model.config, model.dtype) or 0
    each = kv_bytes_per_token(model.config, model.dtype, plan) * (context + steps)
    # a growing cache of one layer lies there twice while it is copied; one prompt is read beside the others
    beside = prefill_activation_bytes(model.config, model.dtype, context, 1, plan) + each + limit // 200
    growing = (limit - weights - limit // 100) / (each * (1 + 0.5 / len(plan.leaders)))
    guess = min(ceiling, max(1, int(min(growing, (limit - weights - beside) / each))))
    fits, fails, row = 0, ceiling + 1, None
    batch = guess
    with sharing(model, plan), torch.no_grad():
        for _ in range(8):
            found = _decode(model, plan, batch, context, steps)
            free()
            if found is None:
                fails = min(fails, batch)
            elif batch > fits:
                fits, row = batch, found
            step = max(1, fits // 50)
            if fails - fits <= step or not out.has(20):
                break
            batch = fits + step if fails > ceiling else (fits + fails) // 2 if fits else int(fails * 0.97)
            batch = max(1, min(batch, ceiling))
            if batch in (fits, fails):
                break
    result: dict[str, Any] = {"run": "largest", "stack": "eager", "plan": name, "leaders": list(plan.leaders)}
    result |= {"context": context, "limit_bytes": limit, "guess": guess, "batch_size": fits}
    result["smallest_that_failed"] = fails if fails <= ceiling else None
    out.write({**result, **(row or {})})
    return fits


def _decode(model: Any, plan: SharingPlan, batch: int, context: int, steps: int) -> dict[str, float] | None:
    """None where memory ran out."""
    try:
        return _decode_or_raise(model, plan, batch, context, steps)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
    free()
    return None


def _decode_or_raise(model: Any, plan: SharingPlan, batch: int, context: int, steps: int) -> dict[str, float]:
    device = model.device
    free()
    cache = DynamicCache(config=model.config)
    from depthkv.cache import fit_cache

    if not plan.is_full:
        fit_cache(cache, plan)
    shape = (batch, model.config.num_key_value_heads, context, model.config.head_dim)
    for leader in plan.leaders:
        layer = cache.layers[leader]
        layer.lazy_initialization(*(torch.empty(0, dtype=model.dtype, device=device) for _ in range(2)))
        layer.keys, layer.values = (torch.empty(shape, dtype=model.dtype, device=device).normal_() for _ in range(2))
    prompt = torch.zeros(1, context, dtype=torch.long, device=device)
    beside = DynamicCache(config=model.config)
    model(input_ids=prompt, past_key_values=beside, use_cache=True, logits_to_keep=1)
    del beside
    if device.type == "cuda":
        torch.cuda.empty_cache()
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    seconds = []

    def step() -> None:
        nonlocal token
        token = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    for _ in range(steps):
        seconds.append(seconds_of(step, device))
    median = statistics.median(seconds[2:])  # the first ones meet an allocator that has to be warmed up
    row = {"itl_s": median, "tokens_per_s": batch / median}
    if device.type == "cuda":
        row |= {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    return row


def grid(model: Any, limits: MachineLimits, limit: int, tiny: bool, out: Output, parts: Sequence[str]) -> None:
    """All cells, the most important ones first; see the table in docs/results.md."""
    some = ("g=1", "g=4", "front half")
    # plans, context, batch, new tokens, repeats, seconds that it should take
    cells: list[tuple[Sequence[str], int, int, int, int, float]] = [
        (PLANS, 8192, 1, 33, 4, 45),
        (PLANS, 8192, 16, 9, 1, 70),
        (PLANS, 32768, 1, 17, 2, 45),
        (PLANS, 512, 1, 33, 2, 20),
        (PLANS, 2048, 1, 33, 2, 20),
        (PLANS, 8192, 4, 17, 2, 35),
        (PLANS, 512, 64, 9, 1, 20),
        (some, 131072, 1, 9, 1, 60),
        (some, 2048, 64, 9, 1, 30),
        (some, 2048, 16, 9, 1, 15),
        (some, 8192, 64, 5, 1, 25),
    ]
    if tiny:
        cells = [(PLANS, 24, 1, 4, 1, 0), (some, 16, 4, 4, 1, 0)]
    first = cells[:2] if "largest" in parts else cells
    if "cells" in parts:
        for plans, context, batch, new, repeats, seconds in first:
            _one(model, plans, context, batch, new, repeats, seconds, limits, out)
    if "largest" in parts:
        for context in (16,) if tiny else (8192, 32768):
            for name in some if tiny else PLANS:
                if out.has(25):
                    largest_batch(model, name, context, limit, out, ceiling=4 if tiny else 4096)
    if "cells" in parts:
        for plans, context, batch, new, repeats, seconds in cells[len(first) :]:
            _one(model, plans, context, batch, new, repeats, seconds, limits, out)


def _one(
    model: Any,
    plans: Sequence[str],
    context: int,
    batch: int,
    new: int,
    repeats: int,
    seconds: float,
    limits: MachineLimits,
    out: Output,
) -> None:
    if not out.has(seconds):
        print(f"no time for {context} x {batch}", flush=True)
        return
    config = BenchConfig(prompt_tokens=context, new_tokens=new, repeats=repeats, batch_size=batch)
    measure_cell(model, plans, config, limits, out, warm_up=context * batch < 100_000)
    free()

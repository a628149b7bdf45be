"""Time to first token, decoding speed and memory, full and shared cache taking turns in one run, over a grid.

Turns matter: a machine that slows down during the run slows both arms down. Each arm does what `generate()` does with
greedy decoding: one forward over the prompt for the last position's logits into a fresh cache, then one per token.
A run that needs more memory than there is counts as a figure, too: it does not end the grid.
"""

from __future__ import annotations

import gc
import inspect
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from depthkv.compress.recipe import CacheRecipe
from depthkv.decoder import Decoder, find_decoder
from depthkv.errors import DepthKVError
from depthkv.export import lacks_follower_kv
from depthkv.memory import measured_cache_bytes
from depthkv.peak import read_peak, start_peak
from depthkv.plan import SharingPlan
from depthkv.roofline import MachineLimits, Work, forward_work, measure_limits, roofline
from depthkv.sharing import share

__all__ = ["BenchConfig", "BenchResult", "GridResult", "Sample", "bench", "bench_grid"]

ARMS = ("full", "shared")

How = SharingPlan | CacheRecipe

_CELL = ("retention", "leaders", "cache_recipe", "prompt_tokens", "new_tokens", "batch_size", "arms", "ratios")
"""Keys of `BenchResult.to_dict` that differ between the cells of a grid."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What one repeat does.

    Raises:
        DepthKVError: a value that is too small.
    """

    prompt_tokens: int = 1024
    """Random token ids; what they are does not change the work of a dense model."""
    new_tokens: int = 64
    """The first comes from the prompt's forward, each other one from a decoding step."""
    repeats: int = 5
    """Measured runs of each arm, after one of each to warm up."""
    batch_size: int = 1
    """Sequences decoded together."""
    seed: int = 0
    """Of the prompt."""

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("repeats", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise DepthKVError(f"expected {name} of at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One run of one arm."""

    ttft_s: float
    """Time to first token: the prompt's forward and the choice of a token, seconds."""
    decode_tokens_per_s: float
    """Tokens after the first of each sequence, over all sequences, per second."""
    itl_s: float
    """Inter-token latency: the median of the run's decoding steps, seconds."""
    cache_bytes: int
    """What the cache's tensors hold at the end."""
    peak_bytes: int | None
    """Most memory in use during the run, weights included: allocated by torch on a GPU, resident memory of the process
    on Linux, None elsewhere."""
    peak_above_start_bytes: int | None
    """The part of it that was not in use when the run started."""


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """All samples of both arms: one cell of a grid."""

    how: How
    """Of the shared arm."""
    config: BenchConfig
    samples: dict[str, tuple[Sample, ...]]
    """By arm of `ARMS`, in the order measured; sample i of both ran side by side. None of an arm that ran out of
    memory."""
    machine: dict[str, Any]
    """Device, threads, versions, dtype."""
    work: Mapping[str, Mapping[str, Work]] = field(default_factory=dict)
    """By arm and phase: what the prompt's forward needs ("prefill") and a decoding step halfway ("decode")."""

    @property
    def plan(self) -> SharingPlan:
        """Of the shared arm."""
        return self.how.plan if isinstance(self.how, CacheRecipe) else self.how

    @property
    def out_of_memory(self) -> tuple[str, ...]:
        """Arms that needed more memory than there is."""
        return tuple(arm for arm, samples in self.samples.items() if not samples)

    def median(self, arm: str, field: str) -> float | None:
        """None where the field could not be measured."""
        values = self._values(arm, field)
        return statistics.median(values) if values else None

    def spread(self, arm: str, field: str) -> tuple[float, float] | None:
        """Smallest and largest."""
        values = self._values(arm, field)
        return (min(values), max(values)) if values else None

    def ratio(self, field: str) -> float | None:
        """Median over the repeats of shared / full: a pair ran side by side, so drift of the machine cancels."""
        if self.out_of_memory or "full" not in self.samples:
            return None
        pairs = zip(self._values("shared", field), self._values("full", field), strict=True)
        ratios = [shared / full for shared, full in pairs if full]
        return statistics.median(ratios) if ratios else None

    def roofline(self, limits: MachineLimits) -> dict[str, dict[str, float | None]]:
        """By arm: the median times beside what the machine allows, see `depthkv.roofline.roofline`."""
        return {
            arm: roofline(work, limits, {"prefill": self.median(arm, "ttft_s"), "decode": self.median(arm, "itl_s")})
            for arm, work in self.work.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Medians, `NAME_min` and `NAME_max` beside them, all null in an arm with `"out_of_memory": true`."""
        fields = [name for name in Sample.__dataclass_fields__]
        arms: dict[str, dict[str, Any]] = {}
        for arm in self.samples:
            arms[arm] = {}
            for name in fields:
                low, high = self.spread(arm, name) or (None, None)
                arms[arm] |= {name: self.median(arm, name), f"{name}_min": low, f"{name}_max": high}
            if arm in self.out_of_memory:
                arms[arm]["out_of_memory"] = True
        return {
            "arms": arms,
            "ratios": {name: self.ratio(name) for name in fields},
            "retention": self.plan.retention,
            "leaders": list(self.plan.leaders),
            "cache_recipe": self.how.figures() if isinstance(self.how, CacheRecipe) else None,
            **asdict(self.config),
            **self.machine,
        }

    def _values(self, arm: str, field: str) -> list[float]:
        values = [getattr(sample, field) for sample in self.samples[arm]]
        return [value for value in values if value is not None]


@dataclass(frozen=True, kw_only=True)
class GridResult:
    """All cells of a grid, measured in one process."""

    cells: tuple[BenchResult, ...]
    """In the order measured."""
    limits: MachineLimits
    """Measured before the cells."""

    def to_dict(self) -> dict[str, Any]:
        """What `bench --json` writes: the first cell's figures, and those of all of them in `cells`."""
        cells = []
        for cell in self.cells:
            figures = cell.to_dict()
            cells.append({**{key: figures[key] for key in _CELL}, "roofline": cell.roofline(self.limits)})
        return {**self.cells[0].to_dict(), "machine_limits": asdict(self.limits), "cells": cells}


def bench_grid(
    model: nn.Module,
    plans: Sequence[How],
    configs: Sequence[BenchConfig],
    progress: Callable[[int], None] | None = None,
) -> GridResult:
    """`bench` for every plan or recipe with every config, and what the machine allows. `progress` is as for `bench`.

    Raises:
        DepthKVError: no plan or config, or the first cell runs out of memory with either cache.
        PlanError: as for `bench`.
        UnsupportedModelError: as for `share`.
    """
    if not plans or not configs:
        raise DepthKVError(f"expected at least one plan and one config, got {len(plans)} and {len(configs)}")
    limits = measure_limits(_device(model), model.dtype)  # type: ignore[arg-type]
    cells: list[BenchResult] = []
    for plan in plans:
        for config in configs:
            cells.append(bench(model, plan, config, progress))
            if len(cells[0].out_of_memory) == len(cells[0].samples):
                raise DepthKVError(
                    f"expected enough memory for {config.prompt_tokens} + {config.new_tokens} tokens with a batch size "
                    f"of {config.batch_size}, got out of memory with the full and the shared cache"
                )
    return GridResult(cells=tuple(cells), limits=limits)


def bench(
    model: nn.Module, plan: How, config: BenchConfig, progress: Callable[[int], None] | None = None
) -> BenchResult:
    """Measure `model` as it is and under `plan`, which may be a recipe, in turns. `progress` is called with 1 after
    each of `2 * (config.repeats + 1)` runs. An arm that runs out of memory has no samples and is not tried again.
    Of an export without followers' K and V there is only the arm "shared".

    Raises:
        PlanError: the plan does not fit, or the model is shared already.
        UnsupportedModelError: as for `share`.
    """
    arms: dict[str, How | None] = {"full": None, "shared": plan}
    if lacks_follower_kv(find_decoder(model).config):
        del arms["full"]
    samples, work = bench_arms(model, arms, config, progress)
    device = _device(model)
    return BenchResult(
        how=plan,
        config=config,
        samples=samples,
        machine={
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        work=work,
    )


def bench_arms(
    model: nn.Module,
    arms: Mapping[str, How | None],
    config: BenchConfig,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, tuple[Sample, ...]], dict[str, Mapping[str, Work]]]:
    """Samples and work by arm, as in `BenchResult`, of any number of arms in turns; None is the model as it is.

    `progress` and errors are as for `bench`.
    """
    device = _device(model)
    decoder = find_decoder(model)
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    generator = torch.Generator().manual_seed(config.seed)
    prompt = torch.randint(vocabulary, (config.batch_size, config.prompt_tokens), generator=generator).to(device)
    training = model.training
    model.eval()
    samples: dict[str, list[Sample]] = {arm: [] for arm in arms}
    work: dict[str, Mapping[str, Work]] = {}
    options = {"logits_to_keep": 1} if _takes_logits_to_keep(decoder) else {}
    exhausted: set[str] = set()
    try:
        for arm, how in arms.items():
            with _sharing(model, how):  # which switches on an adapter that was trained for it
                work[arm] = _count(decoder, how, config, bool(options))
        for repeat in range(config.repeats + 1):
            # whichever comes first in a pair could be at an advantage, so they take turns at that, too
            for arm in arms if repeat % 2 else reversed(list(arms)):
                if arm not in exhausted:
                    with _sharing(model, arms[arm]):
                        sample = _try_run(model, prompt, config.new_tokens, device, options)
                    if sample is None:
                        exhausted.add(arm)
                        samples[arm].clear()
                    elif repeat > 0:  # the first pair warms up
                        samples[arm].append(sample)
                if progress is not None:
                    progress(1)
    finally:
        model.train(training)
    return {arm: tuple(values) for arm, values in samples.items()}, work


def _device(model: nn.Module) -> torch.device:
    device = next(model.get_input_embeddings().parameters()).device  # type: ignore[operator]
    assert isinstance(device, torch.device)
    return device


def _sharing(model: nn.Module, how: How | None) -> AbstractContextManager[Any]:
    return nullcontext() if how is None else share(model, how)


def _takes_logits_to_keep(decoder: Decoder) -> bool:
    """Models without this argument compute all logits, as generate() lets them. PEFT's forward hands it on unnamed."""
    parameters = inspect.signature(decoder.model.forward).parameters
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return "logits_to_keep" in parameters or (hands_on and decoder.head_with_logits_to_keep() is not None)


def _count(decoder: Decoder, how: How | None, config: BenchConfig, last_logits_only: bool) -> dict[str, Work]:
    how = how or SharingPlan.full(decoder.num_layers)
    halfway = config.prompt_tokens + (config.new_tokens - 2) // 2
    return {
        "prefill": forward_work(
            decoder,
            how,
            batch_size=config.batch_size,
            new_tokens=config.prompt_tokens,
            last_logits_only=last_logits_only,
        ),
        "decode": forward_work(decoder, how, batch_size=config.batch_size, new_tokens=1, past_tokens=halfway),
    }


def _try_run(
    model: nn.Module, prompt: torch.Tensor, new_tokens: int, device: torch.device, options: dict[str, Any]
) -> Sample | None:
    """None where memory ran out."""
    try:
        return _run(model, prompt, new_tokens, device, options)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
    # only here, after the handler, the traceback no longer holds the tensors of the failed run
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    # of torch's allocators for the CPU, and of CUDA's libraries, whose own allocations raise no OutOfMemoryError
    texts = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in texts)


@torch.no_grad()
def _run(
    model: nn.Module, prompt: torch.Tensor, new_tokens: int, device: torch.device, options: dict[str, Any]
) -> Sample:
    start = start_peak(device)
    cache = DynamicCache(config=model.config)  # type: ignore[no-untyped-call, unused-ignore]

    began = _now(device)
    token = model(input_ids=prompt, past_key_values=cache, use_cache=True, **options).logits[:, -1:].argmax(-1)
    first = _now(device)
    marks = [_mark(device)]
    for _ in range(new_tokens - 1):
        token = model(input_ids=token, past_key_values=cache, use_cache=True, **options).logits[:, -1:].argmax(-1)
        marks.append(_mark(device))
    ended = _now(device)

    peak = read_peak(device)
    return Sample(
        ttft_s=first - began,
        decode_tokens_per_s=len(prompt) * (new_tokens - 1) / (ended - first),
        itl_s=statistics.median(_seconds(a, b) for a, b in pairwise(marks)),
        cache_bytes=measured_cache_bytes(cache),
        peak_bytes=peak,
        peak_above_start_bytes=None if peak is None or start is None else max(0, peak - start),
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _mark(device: torch.device) -> Any:
    """A moment in the device's work; on a GPU an event, which does not make the program wait."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(earlier: Any, later: Any) -> float:
    """Between two marks, after both have passed."""
    return float(later - earlier) if isinstance(later, float) else float(earlier.elapsed_time(later)) / 1000

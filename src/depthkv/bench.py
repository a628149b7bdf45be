"""Time to first token, decoding speed and memory, full and shared cache taking turns in one run.

Turns matter: a machine that slows down during the run slows both arms down. Each arm does what `generate()` does with
greedy decoding: one forward over the prompt for the last position's logits into a fresh cache, then one per token.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from depthkv.errors import DepthKVError
from depthkv.memory import measured_cache_bytes
from depthkv.plan import SharingPlan
from depthkv.sharing import share

ARMS = ("full", "shared")


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
    cache_bytes: int
    """What the cache's tensors hold at the end."""
    peak_bytes: int | None
    """Most memory in use during the run, weights included: allocated by torch on a GPU, resident memory of the process
    on Linux, None elsewhere."""
    peak_above_start_bytes: int | None
    """The part of it that was not in use when the run started."""


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """All samples of both arms."""

    plan: SharingPlan
    config: BenchConfig
    samples: dict[str, tuple[Sample, ...]]
    """By arm, in the order measured; sample i of both arms ran side by side."""
    machine: dict[str, Any]
    """Device, threads, versions, dtype."""

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
        pairs = zip(self._values("shared", field), self._values("full", field), strict=True)
        ratios = [shared / full for shared, full in pairs if full]
        return statistics.median(ratios) if ratios else None

    def to_dict(self) -> dict[str, Any]:
        """What `bench --json` writes: medians, and `NAME_min` and `NAME_max` beside them."""
        fields = [name for name in Sample.__dataclass_fields__]
        arms: dict[str, dict[str, float | None]] = {}
        for arm in ARMS:
            arms[arm] = {}
            for name in fields:
                low, high = self.spread(arm, name) or (None, None)
                arms[arm] |= {name: self.median(arm, name), f"{name}_min": low, f"{name}_max": high}
        return {
            "arms": arms,
            "ratios": {name: self.ratio(name) for name in fields},
            "retention": self.plan.retention,
            "leaders": list(self.plan.leaders),
            **asdict(self.config),
            **self.machine,
        }

    def _values(self, arm: str, field: str) -> list[float]:
        values = [getattr(sample, field) for sample in self.samples[arm]]
        return [value for value in values if value is not None]


def bench(
    model: nn.Module, plan: SharingPlan, config: BenchConfig, progress: Callable[[int], None] | None = None
) -> BenchResult:
    """Measure `model` as it is and under `plan`, in turns. `progress` is called with 1 after each of
    `2 * (config.repeats + 1)` runs.

    Raises:
        PlanError: the plan does not fit, or the model is shared already.
        UnsupportedModelError: as for `share`.
    """
    device = next(model.get_input_embeddings().parameters()).device  # type: ignore[operator]
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    generator = torch.Generator().manual_seed(config.seed)
    prompt = torch.randint(vocabulary, (config.batch_size, config.prompt_tokens), generator=generator).to(device)
    training = model.training
    model.eval()
    samples: dict[str, list[Sample]] = {arm: [] for arm in ARMS}
    try:
        for repeat in range(config.repeats + 1):
            # whichever comes first in a pair could be at an advantage, so they take turns at that, too
            for arm in ARMS if repeat % 2 else reversed(ARMS):
                context: AbstractContextManager[Any] = share(model, plan) if arm == "shared" else nullcontext()
                with context:
                    sample = _run(model, prompt, config.new_tokens, device)
                if repeat > 0:  # the first pair warms up
                    samples[arm].append(sample)
                if progress is not None:
                    progress(1)
    finally:
        model.train(training)
    return BenchResult(
        plan=plan,
        config=config,
        samples={arm: tuple(values) for arm, values in samples.items()},
        machine={
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
    )


@torch.no_grad()
def _run(model: nn.Module, prompt: torch.Tensor, new_tokens: int, device: torch.device) -> Sample:
    # models without this argument compute all logits, as generate() lets them
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    start = _start_peak(device)
    cache = DynamicCache(config=model.config)  # type: ignore[no-untyped-call, unused-ignore]

    began = _now(device)
    token = model(input_ids=prompt, past_key_values=cache, use_cache=True, **keep).logits[:, -1:].argmax(-1)
    first = _now(device)
    for _ in range(new_tokens - 1):
        token = model(input_ids=token, past_key_values=cache, use_cache=True, **keep).logits[:, -1:].argmax(-1)
    ended = _now(device)

    peak = _peak(device)
    return Sample(
        ttft_s=first - began,
        decode_tokens_per_s=len(prompt) * (new_tokens - 1) / (ended - first),
        cache_bytes=measured_cache_bytes(cache),
        peak_bytes=peak,
        peak_above_start_bytes=None if peak is None or start is None else max(0, peak - start),
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _start_peak(device: torch.device) -> int | None:
    """Start to measure the peak anew; the bytes in use now, None where the peak cannot be measured."""
    gc.collect()
    if device.type == "cuda":
        gpus = range(torch.cuda.device_count())
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        return sum(torch.cuda.memory_allocated(gpu) for gpu in gpus)
    if device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
        return None
    # memory that the other arm freed would stay resident, and this arm's use of it would not show
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the highest resident size so far
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(gpu) for gpu in range(torch.cuda.device_count()))
    return _status_bytes("VmHWM") if device.type == "cpu" else None


def _status_bytes(name: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None

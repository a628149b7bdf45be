"""Shapes with random weights, plans, and rows of figures: what the parts of benchmarks/gpu.py have in common."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from depthkv import SharingPlan
from depthkv.memory import format_bytes

_QWEN3_8B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SMALLER = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": _QWEN3_8B,
    "qwen3-8b-2-layers": {**_QWEN3_8B, "num_hidden_layers": 2},
    # of the paper's pre-training
    "qwen3-1.7b": {**_QWEN3_8B, **_SMALLER, "num_hidden_layers": 28, "tie_word_embeddings": True},
    "tiny": {
        **_QWEN3_8B,
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}
PLANS = ("g=1", "g=4", "front half", "g=2", "g=8", "front quarter")
"""In the order of their importance; g=1 is the model as it is."""


def random_model(shape: str, device: str, dtype: torch.dtype = torch.bfloat16, layers: int | None = None) -> Any:
    """A causal language model of that shape, made where it is to run; its weights are random."""
    changes = {} if layers is None else {"num_hidden_layers": layers}
    config = AutoConfig.for_model("qwen3", **{**SHAPES[shape], **changes})
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def make_plan(name: str, num_layers: int) -> SharingPlan:
    """One of `PLANS`."""
    if name.startswith("g="):
        return SharingPlan.every(int(name[2:]), num_layers)
    parts = {"front half": 2, "front quarter": 4}
    return SharingPlan.from_leaders(range(max(1, num_layers // parts[name])), num_layers)


class Output:
    """Rows of figures, each written as soon as it is known, and the time that is left."""

    def __init__(self, path: Path | None, minutes: float, common: dict[str, Any]) -> None:
        self.path = path
        self.common = common
        self.began = time.monotonic()
        self.ends = self.began + 60 * minutes

    def has(self, seconds: float) -> bool:
        """Whether so much time is left."""
        return time.monotonic() + seconds < self.ends

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def write(self, row: dict[str, Any]) -> None:
        """Add a row to the file; print one that is easy to read."""
        row = {**row, "at_s": round(self.elapsed(), 1), **self.common}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        hidden = {*self.common, "leaders"}
        shown = ", ".join(f"{key} {_shown(key, value)}" for key, value in row.items() if key not in hidden)
        print(shown, flush=True)


def _shown(key: str, value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and key.endswith("_bytes"):
        return format_bytes(value)
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def cap_memory(num_bytes: float) -> int:
    """Let this process allocate so much of the GPU. The limit in force."""
    total = torch.cuda.get_device_properties(0).total_memory
    limit = int(min(num_bytes, total))
    torch.cuda.set_per_process_memory_fraction(limit / total)
    return limit


def copy_bandwidth(device: torch.device, num_bytes: int = 4 * 2**30) -> float:
    """Bytes read and written per second by copies from device to device, the best of ten."""
    if device.type != "cuda":
        num_bytes = 2**24
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        best = min(best, seconds_of(lambda: target.copy_(source), device))
    return 2 * num_bytes / best


def seconds_of(run: Any, device: torch.device) -> float:
    """Of one call, on a GPU by its own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    run()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000

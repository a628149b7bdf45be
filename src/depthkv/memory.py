"""Bytes that a KV cache needs, from the config and the plan alone, and bytes that a real cache holds."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import torch

from depthkv.architectures import LayerKind, layer_kinds
from depthkv.errors import DepthKVError, PlanError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig

    from depthkv.plan import SharingPlan

_UNITS = {"B": 0, "KIB": 1, "MIB": 2, "GIB": 3, "TIB": 4}


def kv_bytes_per_layer(kind: LayerKind, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token in one layer: 2 x kv_heads x head_dim x bytes per element."""
    return 2 * kind.kv_heads * kind.head_dim * int(dtype.itemsize)


def kv_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype, plan: SharingPlan | None = None) -> int:
    """Bytes that one more token adds to the cache, over all layers that keep one (all without `plan`).

    Sliding-window layers count fully: that is their price until the window is full.
    """
    kinds = _leader_kinds(config, plan)
    return sum(kv_bytes_per_layer(kind, dtype) for kind in kinds)


def cache_bytes(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    num_tokens: int,
    batch: int = 1,
    plan: SharingPlan | None = None,
) -> int:
    """Bytes of the cache of `batch` sequences of `num_tokens` tokens.

    A sliding or chunked layer keeps at most `window - 1` past tokens, as transformers' dynamic cache does.
    """
    return batch * sum(layer_cache_bytes(kind, dtype, num_tokens) for kind in _leader_kinds(config, plan))


def layer_cache_bytes(kind: LayerKind, dtype: torch.dtype, num_tokens: int) -> int:
    """Bytes of one layer's cache of one sequence, see `cache_bytes`."""
    tokens = num_tokens if kind.window is None else min(num_tokens, kind.window - 1)
    return tokens * kv_bytes_per_layer(kind, dtype)


def _leader_kinds(config: PreTrainedConfig, plan: SharingPlan | None) -> list[LayerKind]:
    kinds = layer_kinds(config)
    if plan is None:
        return list(kinds)
    if plan.num_layers != len(kinds):
        raise PlanError(f"expected a plan for {len(kinds)} layers, got one for {plan.num_layers}")
    return [kinds[leader] for leader in plan.leaders]


def measured_cache_bytes(cache: Cache) -> int:
    """Bytes of the storage that a transformers cache really holds, each storage counted once."""
    storages: dict[int, int] = {}

    def visit(value: object, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            # a view pins the whole storage behind it, so the storage is what counts
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (list, tuple)) and depth < 4:
            for item in value:
                visit(item, depth + 1)
        elif isinstance(value, dict) and depth < 4:
            visit(list(value.values()), depth + 1)

    for layer in cache.layers:
        for name, value in vars(layer).items():
            if name not in {"cumulative_length", "_sliding_window_tensor"}:  # counters, not cache
                visit(value, 0)
    return sum(storages.values())


def num_parameters(config: PreTrainedConfig) -> int | None:
    """Parameters of the model that `config` describes, without its weights; None where it cannot be built."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # a config alone may lack what its model code needs; the caller shows "unknown"
        return None
    return sum(int(parameter.numel()) for parameter in model.parameters())


def parse_bytes(text: str) -> int:
    """`"24GiB"`, `"512 MiB"`, `"1.5e9"` in bytes; KB, MB, GB, TB mean powers of 1000."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?I?B)?\s*", text, re.IGNORECASE)
    try:
        if match is None:
            raise ValueError
        number = float(match[1])
        unit = (match[2] or "B").upper()
        scale = 1024 ** _UNITS[unit] if unit in _UNITS else 1000 ** ("KMGT".index(unit[0]) + 1)
        if not math.isfinite(number) or number * scale < 1:
            raise ValueError
    except ValueError:
        raise DepthKVError(f"expected a size such as 24GiB or 512MiB, got {text!r}") from None
    return int(number * scale)


def format_bytes(num_bytes: float) -> str:
    """`42949672960` as `"40.00 GiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.2f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} TiB"

"""Bytes of a cache, of weights and of a prefill, from the config and the plan alone, and bytes that a cache holds."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING

import torch

from depthkv.architectures import FAMILIES, Family, LayerKind, layer_kinds, text_config
from depthkv.errors import DepthKVError, PlanError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig

    from depthkv.plan import SharingPlan

__all__ = [
    "cache_bytes",
    "device_room",
    "format_bytes",
    "kv_bytes_per_token",
    "measured_cache_bytes",
    "parse_bytes",
    "prefill_activation_bytes",
    "weight_bytes",
]

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
    from depthkv.compress.packing import PackedTensor, PlainTensor

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
        elif isinstance(value, (PackedTensor, PlainTensor)):
            visit(value.tensors(), depth)

    for layer in cache.layers:
        # a layer of an adaptive cache keeps its pairs in one of transformers'
        for name, value in vars(getattr(layer, "own", layer)).items():
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


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int | None:
    """Bytes of all parameters at `dtype`, tied ones once; None where the model cannot be built from its config.

    Exact for a model that was loaded in one dtype, but for some hundred bytes of rotary frequencies. A follower's K and
    V projections count: `share` leaves them in memory.
    """
    parameters = num_parameters(config)
    return None if parameters is None else parameters * int(dtype.itemsize)


def prefill_activation_bytes(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    context: int,
    batch: int = 1,
    plan: SharingPlan | None = None,
) -> int:
    """Peak bytes of a prefill beside the weights and the cache that it leaves (`cache_bytes`).

    The prefill is `generate()`'s: one forward over the whole prompts, without padding, SDPA, logits of the last
    position. What is alive at once was counted in transformers' code, phase by phase; the largest phase is the peak:

    - MLP: embeddings, residuals and norm (`Family.mlp_hidden`), inner tensors (`Family.mlp_inner`). Nearly always it.
    - attention: queries while they are rotated, or normed in fp32; the output and its copy; K and V repeated for all
      query heads and a mask in `dtype`, where a mask is needed.
    - norm of the residual stream, in fp32.
    - logits of the last position and, in fp32, their copy and that of the token before (so also of a decoding step).

    Throughout live positions, cosines and sines, from a window's length on a boolean mask of `context` x `context`
    (windowed layers), and K and V of windowed leaders for the whole prompt, since their cache is a view until the next
    token. The last is all that `plan` changes: layers above the last leader run for one position, but the last leader
    itself has the same peak.

    Accuracy, against the live tensors of a real prefill: exact but for some hundred bytes in Llama, Mistral, Qwen,
    Phi-3, GPT-2 and most others of `FAMILIES`; within 10 % in OLMo and Cohere (rotation in fp32), Gemma 3 (a last layer
    of another kind) and mixtures of experts, counted as the grouped products that transformers makes of them, of which
    some weight the results in fp32. A family that is not in the table counts as Llama. Not counted: scores of attention
    that is not SDPA (Gemma 2, gpt-oss), workspaces of the libraries, rounding and fragmentation of the allocator.

    Args:
        config: of a causal language model.
        dtype: of weights and activations.
        context: tokens of each prompt.
        batch: prompts in one forward.
        plan: what the layers share; every layer keeps its cache without.

    Raises:
        DepthKVError: less than one token or prompt.
        PlanError: a plan for another number of layers.
    """
    if context < 1 or batch < 1:
        raise DepthKVError(f"expected a context and batch of at least 1, got {context} and {batch}")
    kinds, inner = layer_kinds(config), text_config(config)
    family = FAMILIES.get(inner.model_type, Family())
    tokens, size = batch * context, int(dtype.itemsize)
    hidden = tokens * inner.hidden_size * size
    heads: int = inner.num_attention_heads
    query = tokens * heads * max(kind.head_dim for kind in kinds) * size
    pair = max(tokens * kv_bytes_per_layer(kind, dtype) for kind in kinds)
    fused = query + pair if family.fused else 0  # queries are views of it, which keep all of it alive

    throughout: int = 16 * tokens  # positions and the mask of padding, 8 bytes each
    for rope, head_dim in {(kind.rope, kind.head_dim) for kind in kinds}:
        settings = {} if rope == "none" else json.loads(rope)
        if settings:  # learned positions have none
            throughout += int(2 * tokens * head_dim * size * settings.get("partial_rotary_factor", 1))
    masked = {kind.window for kind in kinds if kind.window is not None and context >= kind.window}
    throughout += len(masked) * context**2
    for kind in _leader_kinds(config, plan):
        if kind.window is not None:
            throughout += batch * max(0, context - (kind.window - 1)) * kv_bytes_per_layer(kind, dtype)

    phases = [
        3 * hidden + 2 * tokens * inner.hidden_size * 4,  # norm
        3 * hidden + 4 * query,  # rotation
        3 * hidden + 3 * query + fused,  # attention: queries, output, its copy
        family.mlp_hidden * hidden + tokens * _mlp_bytes_per_token(inner, family, size),
        hidden + batch * inner.vocab_size * (size + 2 * 4),  # logits
    ]
    if family.k_norm:
        # norm of the queries, before the layer has K and V
        phases.append(3 * hidden + query + 2 * query // size * 4 - pair)
    if masked:
        repeated = 0 if all(kind.kv_heads == heads for kind in kinds) else 2 * query
        scores = batch * context**2 * size + 4 * tokens * heads
        phases.append(3 * hidden + 2 * query + fused + repeated + scores)
    return int(throughout + max(phases))


def _mlp_bytes_per_token(config: PreTrainedConfig, family: Family, size: int) -> int:
    """What lives inside the MLP at most, of the experts that a token uses where there are any."""
    hidden: int = config.hidden_size
    sizes = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    width = int(max(sizes) if isinstance(sizes, (list, tuple)) else sizes)  # some families list one per layer
    if not (getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)):
        return family.mlp_inner * width * size
    experts = int(getattr(config, "num_experts_per_tok", None) or 1)
    width = int(getattr(config, "moe_intermediate_size", None) or width)
    # a copy of each token for every expert that it uses, then either gate and up, activation and product, or the
    # results, weighted in fp32 and put back into the order of the tokens
    return experts * (hidden * size + max(4 * width * size, hidden * (size + 2 * 4)))


def device_room(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    memory: int,
    context: int,
    batch: int,
    plan: SharingPlan | None = None,
) -> int:
    """Bytes that remain for the cache beside `weight_bytes` and `prefill_activation_bytes`.

    Args:
        config: of a causal language model.
        dtype: of weights, activations and cache.
        memory: bytes of one device that this process may use.
        context: tokens of each prompt.
        batch: prompts that one forward reads: all of them in `generate()`, 1 in an engine that prefills one at a time.
        plan: what the layers share. Without, the activations are those of the full cache, never less than a plan's.

    Raises:
        DepthKVError: nothing remains, or the weights cannot be counted.
    """
    weights = weight_bytes(config, dtype)
    if weights is None:
        raise DepthKVError(f"expected a config that its model can be built from, got {type(config).__name__}")
    activations = prefill_activation_bytes(config, dtype, context, batch, plan)
    room = memory - weights - activations
    if room <= 0:
        raise DepthKVError(
            f"expected memory for a cache beside weights of {format_bytes(weights)} and prefill activations of "
            f"{format_bytes(activations)} ({batch} x {context:,} tokens), got {format_bytes(memory)}"
        )
    return room


def parse_bytes(text: str) -> int:
    """`"24GiB"`, `"512 MiB"`, `"1.5e9"` in bytes; KB, MB, GB, TB mean powers of 1000."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?I?B)?\s*", text, re.IGNORECASE)
    try:
        if match is None:
            raise ValueError
        number = float(match[1])
        unit = (match[2] or "B").upper()
        scale = 1024 ** _UNITS[unit] if unit in _UNITS else 1000 ** ("KMGT".index(unit[0]) + 1)
        if not math.isfinite(number * scale) or number * scale < 1:
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

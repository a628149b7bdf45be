"""Ways for one new token to attend to a static cache whose length lies on the device, by name for transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

VARIANTS = ("triton", "flash", "flex", "sdpa")
"""`sdpa` is transformers' own, with a mask, which repeats K and V for all query heads."""

Attention = Callable[..., tuple[torch.Tensor, None]]


def _positions(kwargs: dict[str, Any]) -> torch.Tensor:
    position: torch.Tensor = kwargs["position_ids"]
    return position.reshape(-1)


def triton_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """The kernel of gpu_kernel.py."""
    result = torch.ops.depthkv_bench.decode_attention(query, key, value, _positions(kwargs), scaling)
    return result, None


def flash_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """torch's FlashAttention in its form for sequences of several lengths; K and V lie as token x head (`lay_out`)."""
    batch, heads, _, dim = query.shape
    kv_heads, tokens = key.shape[1:3]
    lengths = (_positions(kwargs) + 1).to(torch.int32)
    first = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    result = torch.ops.aten._flash_attention_forward(
        query.transpose(1, 2).reshape(batch, heads, dim),
        key.transpose(1, 2).reshape(batch * tokens, kv_heads, dim),
        value.transpose(1, 2).reshape(batch * tokens, kv_heads, dim),
        first,
        first * tokens,
        1,
        tokens,
        0.0,
        False,
        False,
        scale=scaling,
        seqused_k=lengths,
    )[0]
    return result.view(batch, 1, heads, dim), None


def flex_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """torch's FlexAttention, which reads the unused tokens, too; compile it."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    position = _positions(kwargs)

    def seen(score: torch.Tensor, b: Any, h: Any, q: Any, t: Any) -> torch.Tensor:
        return torch.where(t <= position[b], score, -math.inf)

    result = flex(query, key, value, score_mod=seen, scale=scaling, enable_gqa=True)
    return result.transpose(1, 2), None


FUNCTIONS: dict[str, Attention] = {"triton": triton_attention, "flash": flash_attention, "flex": flex_attention}


def name_of(variant: str) -> str:
    """For transformers; it makes no mask for names that it has none for."""
    return "sdpa" if variant == "sdpa" else f"bench_{variant}"


def use(model: PreTrainedModel, variant: str) -> None:
    """Let `model` attend by one of `VARIANTS`. All but `sdpa` take one token of each sequence with `position_ids`."""
    if variant == "triton":
        import gpu_kernel  # noqa: F401  (registers the operator)
    if variant != "sdpa" and name_of(variant) not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name_of(variant), FUNCTIONS[variant])
    model.config._attn_implementation = name_of(variant)


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The slow, obvious one, in fp32. Shapes as in `gpu_kernel.decode_attention`."""
    group = query.shape[1] // key.shape[1]
    results = []
    for row in range(len(query)):
        length = int(position[row]) + 1
        k = key[row, :, :length].float().repeat_interleave(group, 0)
        v = value[row, :, :length].float().repeat_interleave(group, 0)
        weights = (query[row].float() @ k.transpose(1, 2) * scaling).softmax(-1)
        results.append((weights @ v).transpose(0, 1))
    return torch.stack(results)


def lay_out(cache: StaticCache, model: PreTrainedModel, batch: int, by_token: bool) -> None:
    """Allocate the layers that are still to be filled, with random values, so that no page is shared or empty.

    Args:
        cache: followers' place-holders are passed over.
        by_token: lay `[batch, kv_heads, tokens, head_dim]` out as `[batch, tokens, kv_heads, head_dim]`.
    """
    config, device = model.config, model.device
    for layer in cache.layers:
        if layer.is_initialized:
            continue
        heads, tokens, dim = config.num_key_value_heads, layer.max_cache_len, config.head_dim
        one = torch.zeros(batch, heads, 1, dim, dtype=model.dtype, device=device)
        shape = (batch, tokens, heads, dim) if by_token else (batch, heads, tokens, dim)
        pair = [torch.empty(shape, dtype=model.dtype, device=device).normal_() for _ in range(2)]
        layer.max_cache_len = 1  # its own allocation is replaced at once
        layer.lazy_initialization(one, one)
        layer.max_cache_len = tokens
        layer.keys, layer.values = (part.transpose(1, 2) if by_token else part for part in pair)
        layer.cumulative_length = torch.zeros((), dtype=torch.long, device=device)


def set_length(cache: StaticCache, tokens: int) -> None:
    """How many tokens the cache holds, from the next step on."""
    for layer in cache.layers:
        if getattr(layer, "cumulative_length", None) is not None:
            layer.cumulative_length.fill_(tokens)

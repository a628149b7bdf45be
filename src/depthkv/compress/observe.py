"""What the last queries of a layer attend to, read off while its attention runs, for every family of models.

Eager attention returns its weights. With SDPA the queries, the mask and the scale are seen on their way into
`scaled_dot_product_attention`, and the weights of the last queries are computed from them once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from depthkv.errors import RecipeError


class _Queries(TorchFunctionMode):
    """Remembers the arguments of the last `scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.call: dict[str, Any] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
            self.call = {**dict(zip(names, args, strict=False)), **kwargs}
        return func(*args, **kwargs)


def run_observed(original: Callable[[], Any], keys: Callable[[], torch.Tensor], last: int) -> tuple[Any, torch.Tensor]:
    """The output of an attention module, and the weights `[batch, heads, queries, tokens]` of its last queries.

    Args:
        original: calls the module.
        keys: gives the keys that it read, `[batch, kv_heads, tokens, head_dim]`, once it has run.
        last: queries, at most.

    Raises:
        RecipeError: the attention is neither eager nor SDPA.
    """
    with _Queries() as seen:
        output = original()
    if seen.call is None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, torch.Tensor):
            raise RecipeError(
                'expected attn_implementation "sdpa" or "eager" for a rule that needs attention, got another one'
            )
        return output, weights[:, :, -last:]
    return output, _weights(seen.call, keys(), last)


def _weights(call: dict[str, Any], keys: torch.Tensor, last: int) -> torch.Tensor:
    query = call["query"][:, :, -last:].float()
    queries, tokens = call["query"].shape[2], keys.shape[2]
    scale = call.get("scale") or query.shape[-1] ** -0.5
    grouped = query.unflatten(1, (keys.shape[1], -1))  # [batch, kv_heads, heads of one, queries, head_dim]
    scores = (grouped @ keys.float()[:, :, None].transpose(-1, -2) * scale).flatten(1, 2)
    mask = call.get("attn_mask")
    if mask is not None:
        mask = mask[..., -last:, :]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    elif call.get("is_causal"):
        causal = torch.ones(queries, tokens, dtype=torch.bool, device=keys.device).tril(tokens - queries)[-last:]
        scores = scores.masked_fill(~causal, -torch.inf)
    weights: torch.Tensor = scores.softmax(dim=-1).nan_to_num()  # a query of padding may see nothing
    return weights

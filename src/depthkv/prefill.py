"""Prefill that stops early: layers above the last leader need no K and V of the prompt.

They run for those last positions only whose logits were asked for. With all leaders in the first half this halves the
work of prefill. The logits are the same; hidden states of the other positions are zeros that nobody reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from depthkv.architectures import text_config
from depthkv.attention import Context

if TYPE_CHECKING:
    from depthkv.decoder import Decoder
    from depthkv.plan import SharingPlan

_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


class Tail:
    """The layers above the last leader."""

    def __init__(self, context: Context, decoder: Decoder, plan: SharingPlan) -> None:
        self.context = context
        self.config = text_config(decoder.config)
        self.layers = tuple(range(plan.leaders[-1] + 1, plan.num_layers))
        self._asked_for: int | None = None

    def wrap_head(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The forward with `logits_to_keep`: remember how many positions the caller wants."""
        signature = inspect.signature(original)

        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            keep = bound.get("logits_to_keep", 0)
            options = {**bound, **bound.get("kwargs", {})}
            wanted = isinstance(keep, int) and keep > 0 and options.get("labels") is None and not self._outputs(options)
            self._asked_for = keep if wanted else None
            try:
                return original(*args, **kwargs)
            finally:
                self._asked_for = None

        return forward

    def _outputs(self, options: dict[str, Any]) -> bool:
        """Whether somebody wants hidden states, attention maps or router logits."""
        for name in _OUTPUTS:
            value = options.get(name)
            if value or (value is None and getattr(self.config, name, False)):
                return True
        return False

    def positions_needed(self) -> int | None:
        """How many last positions the tail runs for in this forward of the decoder; None means all."""
        keep = self._asked_for
        implementation = getattr(self.config, "_attn_implementation", None) or "eager"
        if keep is None:
            return None
        known = implementation in ("eager", "sdpa") or (keep == 1 and str(implementation).startswith("flash_attention"))
        return keep if known else None

    def wrap_layer(self, layer: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """A decoder layer that runs for the last positions only, where that is allowed."""
        first, last = layer == self.layers[0], layer == self.layers[-1]
        names = [
            name for name, p in inspect.signature(original).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD
        ]

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            step = self.context.current()
            keep = step.num_last_positions
            if keep is None:
                return original(hidden_states, *args, **kwargs)
            if first:
                step.tail_inputs["tokens"] = hidden_states.shape[1]
            tokens: int = step.tail_inputs["tokens"]
            if tokens <= keep:
                return original(hidden_states, *args, **kwargs)
            if first:
                hidden_states = hidden_states[:, -keep:]
            kwargs.update(zip(names[1:], args, strict=False))  # gpt2 passes the mask by position
            kwargs = {name: self._last(step.tail_inputs, name, value, keep, tokens) for name, value in kwargs.items()}
            num_keys = step.pairs[step.sources[layer]][0].shape[-2]
            if kwargs.get("attention_mask") is None and not (keep == 1 and num_keys == tokens):
                kwargs["attention_mask"] = _causal_mask(keep, tokens, num_keys, hidden_states.device)
            output = original(hidden_states, **kwargs)
            if not last:
                return output
            # the code after the layers expects as many positions as it put in
            hidden = output[0] if isinstance(output, tuple) else output
            padded = hidden.new_zeros(hidden.shape[0], tokens, hidden.shape[-1])
            padded[:, -keep:] = hidden
            return (padded, *output[1:]) if isinstance(output, tuple) else padded

        return forward

    def _last(self, done: dict[str, Any], name: str, value: Any, keep: int, tokens: int) -> Any:
        """A layer argument, cut to its last query positions; cut once, used by all layers of the tail."""
        key = f"{name}:{id(value)}"
        if key not in done:
            done[key] = (_cut(name, value, keep, tokens), value)  # holding `value` keeps its id from being reused
        return done[key][0]


def _cut(name: str, value: Any, keep: int, tokens: int) -> Any:
    if isinstance(value, (tuple, list)) and name == "position_embeddings":
        return type(value)(_cut(name, item, keep, tokens) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    if name == "attention_mask" and value.ndim == 4 and value.shape[-2] == tokens:  # [batch, 1, queries, keys]
        return value[..., -keep:, :]
    if name == "position_embeddings" and value.shape[-2] == tokens:  # [batch, queries, head_dim]
        return value[..., -keep:, :]
    if name in ("position_ids", "cache_position") and value.shape[-1] == tokens:
        return value[..., -keep:]
    return value


def _causal_mask(keep: int, tokens: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """`[1, 1, keep, num_keys]`, True = may attend.

    Without a mask, SDPA's `is_causal` aligns the first query with the first key. That is right for all `tokens` queries
    (a static cache has more keys than tokens, the rest is empty), and wrong for the last `keep` of them.
    """
    return torch.ones(keep, num_keys, dtype=torch.bool, device=device).tril(tokens - keep)[None, None]

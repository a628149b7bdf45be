"""The slow, obvious oracle that every fast path is tested against.

It patches nothing: transformers' own forward is given a cache that stores nothing over time and, for each layer,
returns the pair of the layer's source. Every layer computes its K and V, every position is recomputed for every new
token, all layers run for all positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer


class ReferenceCache(Cache):
    """Returns to each layer the keys and values that its source computed in this same forward."""

    def __init__(self, kv_source_layers: Sequence[int]) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)  # has no layers: lengths and masks are as without cache
        self.kv_source_layers = list(kv_source_layers)
        self.pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store this layer's pair, return its source's."""
        self.pairs[layer_idx] = (key_states, value_states)
        return self.pairs[self.kv_source_layers[layer_idx]]


class ReplayCache(Cache):
    """Keeps the pairs of all layers over time, and returns to each layer those of its source under the present map.

    So tokens keep the keys and values that they had under the maps before: what a sequence that has given up leaders
    reads, at full memory.
    """

    def __init__(self, config: PreTrainedConfig, kv_source_layers: Sequence[int]) -> None:
        super().__init__(layers=DynamicCache(config=config).layers)
        while len(self.layers) < len(kv_source_layers):  # made as they are needed, where no layer is windowed
            self.layers.append(DynamicLayer())
        self.kv_source_layers = list(kv_source_layers)
        """May be replaced between forwards."""
        self._pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store this layer's pair, return all that its source has stored."""
        self._pairs[layer_idx] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self._pairs[self.kv_source_layers[layer_idx]]


def reference_forward(
    model: PreTrainedModel, kv_source_layers: Sequence[int], input_ids: torch.Tensor, **kwargs: Any
) -> Any:
    """The model's output for `input_ids` `[batch, tokens]` when layer i reads layer `kv_source_layers[i]`."""
    return model(input_ids=input_ids, past_key_values=ReferenceCache(kv_source_layers), use_cache=True, **kwargs)


@torch.no_grad()
def reference_greedy(
    model: PreTrainedModel,
    kv_source_layers: Sequence[int],
    input_ids: torch.Tensor,
    num_new_tokens: int,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens `[batch, num_new_tokens]` and their logits `[batch, num_new_tokens, vocabulary]`.

    `attention_mask` `[batch, tokens]` is for left padding.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompt_tokens = input_ids.shape[1]
    logits = []
    for _ in range(num_new_tokens):
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        output = reference_forward(model, kv_source_layers, input_ids, attention_mask=mask, position_ids=position_ids)
        logits.append(output.logits[:, -1])
        input_ids = torch.cat([input_ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return input_ids[:, prompt_tokens:], torch.stack(logits, dim=1)

"""Sequences of unlike lengths and unlike plans, decoded in one batch.

Each sequence owns its keys and values, of exactly its own tokens: padding exists for one layer at a time only, while
that layer attends. A sequence can come, go and give up layers between any two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from depthkv.adaptive.cache import GroupedLayer, Pair
from depthkv.adaptive.ladder import Sources
from depthkv.architectures import LayerKind


@dataclass(kw_only=True, eq=False)
class SequenceCache:
    """What one sequence keeps."""

    sources: Sources
    """Its map: the layer that each layer reads."""
    pairs: dict[int, Pair]
    """By leader: keys and values, each `[1, kv_heads, tokens, head_dim]`; of a windowed layer the last ones."""
    num_tokens: int
    """Read by the model so far."""

    @classmethod
    def of_prompt(cls, layers: Sequence[GroupedLayer], num_tokens: int) -> SequenceCache:
        """Take over what a prefill of one sequence left."""
        sources = tuple(layer.sources[0] for layer in layers)
        pairs = {}
        for layer in layers:
            if layer.keys is not None and layer.values is not None:
                pairs[layer.layer] = (layer.keys, layer.values)
        return cls(sources=sources, pairs=pairs, num_tokens=num_tokens)

    @property
    def num_leaders(self) -> int:
        """Layers that keep a cache."""
        return len(self.pairs)

    @property
    def num_bytes(self) -> int:
        """Of the storage that is really held."""
        return sum(tensor.untyped_storage().nbytes() for pair in self.pairs.values() for tensor in pair)

    def assign(self, sources: Sources) -> None:
        """Go on with a map of fewer leaders; what no longer leads is freed at once."""
        self.sources = sources
        self.pairs = {layer: pair for layer, pair in self.pairs.items() if sources[layer] == layer}


class RaggedLayer(GroupedLayer):
    """One layer of all sequences in one decoding step, which adds one token to each.

    `depthkv.adaptive` takes it for one of its own; what is stored goes to the sequences.
    """

    def __init__(self, layer: int, window: int | None, sequences: Sequence[SequenceCache]) -> None:
        self.layer = layer
        self.sequences = sequences
        self.sources = [sequence.sources[layer] for sequence in sequences]
        self.num_tokens = max(sequence.num_tokens for sequence in sequences)
        self._window = window

    @property
    def is_sliding(self) -> bool:
        return self._window is not None

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def keys(self) -> torch.Tensor | None:
        return None

    @property
    def values(self) -> torch.Tensor | None:
        return None

    @property
    def window(self) -> int | None:
        """Past and present tokens that a query sees; None is all."""
        return self._window

    def get_max_length(self) -> int:
        return -1

    def store(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Add the batch's new pair to the sequences that lead here; returns theirs, filled up on the left."""
        width, _ = self.get_mask_sizes(1)
        rows = self.rows
        joined = [
            new.new_empty(len(rows), new.shape[1], width, new.shape[3]) for new in (key_states, value_states)
        ]
        for place, row in enumerate(rows):
            sequence = self.sequences[row]
            grown = []
            for whole, old, new in zip(joined, sequence.pairs[self.layer], (key_states, value_states), strict=True):
                both = torch.cat([old, new[row : row + 1]], dim=2)
                start = width - both.shape[2]
                whole[place, :, :start] = 0  # is masked, but must be a number
                whole[place, :, start:] = both[0]
                if self._window is not None and both.shape[2] >= self._window:
                    both = both[:, :, both.shape[2] - self._window + 1 :].clone()
                grown.append(both)
            sequence.pairs[self.layer] = (grown[0], grown[1])
        return joined[0], joined[1]


def joint_step(
    model: Any, kinds: Sequence[LayerKind], sequences: Sequence[SequenceCache], tokens: Sequence[int]
) -> torch.Tensor:
    """Read one more token of each sequence; returns the logits `[sequences, vocabulary]`.

    `model` is under `share(model, router)`.
    """
    widest = max(sequence.num_tokens for sequence in sequences)
    lengths = torch.tensor([sequence.num_tokens for sequence in sequences])
    mask = (torch.arange(widest + 1)[None] >= widest - lengths[:, None]).long()
    cache = Cache(layers=[RaggedLayer(layer, kind.window, sequences) for layer, kind in enumerate(kinds)])
    output = model(
        input_ids=torch.tensor(tokens, device=model.device)[:, None],
        attention_mask=mask.to(model.device),
        position_ids=lengths.to(model.device)[:, None],
        past_key_values=cache,
        use_cache=True,
    )
    for sequence in sequences:
        sequence.num_tokens += 1
    logits: torch.Tensor = output.logits[:, -1]
    return logits

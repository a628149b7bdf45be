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

from depthkv.adaptive.budget import KVBudget
from depthkv.adaptive.cache import GroupedLayer, Pair
from depthkv.adaptive.ladder import Sources
from depthkv.adaptive.model import AdaptiveModel
from depthkv.adaptive.router import Router
from depthkv.adaptive.steps import TokenStep
from depthkv.architectures import LayerKind
from depthkv.decoder import find_decoder
from depthkv.patches import adapter_switch


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

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Give those that lead here their own of the batch's new pair, `[batch, kv_heads, 1, head_dim]`."""
        for row in self.rows:
            keys, values = self.sequences[row].pairs[self.layer]
            keys = torch.cat([keys, key_states[row : row + 1]], dim=2)
            self.sequences[row].pairs[self.layer] = (keys, torch.cat([values, value_states[row : row + 1]], dim=2))

    def joined(self) -> Pair:
        """What the layer reads: each sequence's pair of its own source, filled up on the left."""
        pairs = [sequence.pairs[source] for sequence, source in zip(self.sequences, self.sources, strict=True)]
        if len(pairs) == 1:
            return pairs[0]
        width, _ = self.get_mask_sizes(1)
        sides = []
        for side in (0, 1):
            first = pairs[0][side]
            whole = first.new_empty(len(pairs), first.shape[1], width, first.shape[3])
            for row, pair in enumerate(pairs):
                start = width - pair[side].shape[2]
                whole[row, :, :start] = 0  # masked, but must be a number
                whole[row, :, start:] = pair[side][0]
            sides.append(whole)
        return sides[0], sides[1]

    def advance(self, num_tokens: int) -> None:
        """The step is over: of a windowed layer what the next token will not see goes."""
        super().advance(num_tokens)
        if self._window is None:
            return
        for row in self.rows:
            keys, values = self.sequences[row].pairs[self.layer]
            if (extra := keys.shape[2] - self._window + 1) > 0:
                self.sequences[row].pairs[self.layer] = (keys[:, :, extra:].clone(), values[:, :, extra:].clone())


class RaggedStep(TokenStep):
    """What the layers share in such a step. A joined pair lives until its last reader."""

    layers: Sequence[RaggedLayer]

    def __init__(self, layers: Sequence[RaggedLayer]) -> None:
        super().__init__(layers)
        self._joined: dict[tuple[int, ...], Pair] = {}
        self._last = {tuple(layer.sources): layer.layer for layer in layers}

    def pair(self, layer: int, keys: torch.Tensor, values: torch.Tensor, args: Any, kwargs: Any) -> Pair:
        """The pairs that the layer reads, each `[batch, kv_heads, tokens, head_dim]`."""
        entry = self.layers[layer]
        entry.append(keys, values)
        read = tuple(entry.sources)
        if read not in self._joined:
            self._joined[read] = entry.joined()
        pair = self._joined[read]
        if self._last[read] == layer:
            del self._joined[read]
        return pair[0].to(keys.device), pair[1].to(values.device)


class RaggedModel(AdaptiveModel):
    """`share(model, router)` for sequences whose caches are `SequenceCache`s."""

    @classmethod
    def of(cls, model: Any, router: Router) -> RaggedModel:
        """Share a model; `remove()` restores it."""
        return cls(find_decoder(model), router, KVBudget(), adapter_switch(model))

    def _token_step(self, layers: list[GroupedLayer]) -> TokenStep:
        return RaggedStep(layers)  # type: ignore[arg-type,unused-ignore]


def joint_step(
    model: Any, kinds: Sequence[LayerKind], sequences: Sequence[SequenceCache], tokens: Sequence[int]
) -> torch.Tensor:
    """Read one more token of each sequence; returns the logits `[sequences, vocabulary]`.

    `model` is under a `RaggedModel`.
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

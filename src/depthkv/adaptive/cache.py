"""A cache in which each sequence of the batch has its own sharing plan, and can give up layers while it grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from depthkv.cache import FollowerLayer
from depthkv.errors import CacheMismatchError

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each `[sequences, kv_heads, tokens, head_dim]`."""


class GroupedLayer(CacheLayerMixin):
    """One layer of such a cache: the keys and values of those sequences whose source here is the layer itself.

    They are kept by a layer of transformers', whose batch is these sequences alone: what a sequence does not keep takes
    no byte. All operations on the batch pass over the map as they do over the tensors.
    """

    supports_early_init = False
    is_croppable = True

    def __init__(self, layer: int, own: DynamicLayer) -> None:
        self.layer = layer
        self.own = own
        """Keeps the pairs; holds nothing where no sequence leads here."""
        self.sources: list[int] = []
        """For each sequence the layer that is read here. Empty: nothing is decided yet."""
        self.num_tokens = 0
        """Seen by the model so far, padding included."""

    @property
    def rows(self) -> list[int]:
        """Sequences that are kept here."""
        return [row for row, source in enumerate(self.sources) if source == self.layer]

    # What transformers asks

    @property
    def is_sliding(self) -> bool:
        return bool(self.own.is_sliding)

    @property
    def is_initialized(self) -> bool:
        return bool(self.own.is_initialized)

    @property
    def keys(self) -> torch.Tensor | None:
        keys: torch.Tensor | None = self.own.keys
        return keys

    @property
    def values(self) -> torch.Tensor | None:
        values: torch.Tensor | None = self.own.values
        return values

    @property
    def window(self) -> int | None:
        """Past and present tokens that a query sees; None is all."""
        return self.own.sliding_window if isinstance(self.own, DynamicSlidingWindowLayer) else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """What a model that is no longer shared calls."""
        raise CacheMismatchError(
            "expected a cache in which every layer has its own keys and values, got one that was filled under "
            "adaptive sharing"
        )

    def store(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Keep what belongs to `rows`, given the whole batch's; returns the pairs of `rows`, past tokens included."""
        rows = self.rows
        if len(rows) != len(self.sources):
            index = torch.tensor(rows, device=key_states.device)
            key_states, value_states = key_states[index], value_states[index]
        keys, values = self.own.update(key_states, value_states, *args, **kwargs)
        if self.window is not None and key_states.shape[-2] > 1:
            # transformers keeps a view of the whole prompt's pair, so that the part before the window is not freed
            self.own.keys, self.own.values = _compact(self.own.keys), _compact(self.own.values)
        return keys, values

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_max_length(self) -> int:
        return int(self.own.get_max_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        window = self.window
        if window is None:
            return self.num_tokens + query_length, 0
        return min(self.num_tokens, window - 1) + query_length, max(self.num_tokens - window + 1, 0)

    def advance(self, num_tokens: int) -> None:
        """So many tokens have passed through the model."""
        self.num_tokens += num_tokens

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise CacheMismatchError(f"expected a negative number of tokens to crop, got {tokens_to_remove}")
        if self.is_initialized:
            self.own.crop(tokens_to_remove)
        self.num_tokens = max(0, self.num_tokens + tokens_to_remove)
        if self.num_tokens == 0:
            self.reset()

    def reset(self) -> None:
        self.own.reset()
        self._forget()
        self.sources, self.num_tokens = [], 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select([int(row) for row in beam_idx])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(len(self.sources)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(torch.arange(len(self.sources))[torch.as_tensor(indices).cpu()].tolist())

    # What routing asks

    def assign(self, sources: Sequence[int]) -> None:
        """Give each sequence a source; what a sequence no longer keeps here is freed at once.

        Raises:
            CacheMismatchError: a sequence would have to be kept here that was not so far.
        """
        before = self.rows
        self.sources = list(sources)
        after = self.rows
        if not self.is_initialized or after == before:
            return
        if not set(after) <= set(before):
            raise CacheMismatchError(f"expected layer {self.layer} to keep no further sequence, got {after}")
        self._keep([before.index(row) for row in after])

    def fill(self, parts: list[Pair], num_tokens: int) -> None:
        """Take the pairs of `rows`, one of batch 1 for each, made from prompts of up to `num_tokens` tokens.

        Shorter ones are filled up on the left, where their padding was. `parts` is emptied meanwhile.
        """
        window = self.window
        width = num_tokens if window is None else min(num_tokens, window - 1)
        joined = []
        for side in (0, 1):
            first = parts[0][side]
            whole = first.new_zeros(len(parts), first.shape[1], width, first.shape[3])
            for row, part in enumerate(parts):
                tokens = part[side].shape[2]
                whole[row, :, width - tokens :] = part[side][0]
            joined.append(whole)
        parts.clear()
        self.own.lazy_initialization(*joined)
        self.own.keys, self.own.values = joined
        if window is not None:
            self.own.cumulative_length = num_tokens

    def bytes_after(self, num_tokens: int) -> int:
        """Bytes of one sequence's pair once so many more tokens have passed; 0 before the first."""
        keys, values = self.own.keys, self.own.values
        if keys is None or values is None:
            return 0
        tokens = self.num_tokens + num_tokens
        # while a windowed layer is written it holds the whole window, and afterwards a view of it
        tokens = tokens if self.window is None else min(tokens, self.window)
        per_token = keys.shape[1] * keys.shape[3] * keys.element_size()
        return int(tokens * (per_token + values.shape[1] * values.shape[3] * values.element_size()))

    def _select(self, rows: list[int]) -> None:
        before = self.rows
        self.sources = [self.sources[row] for row in rows]
        if self.is_initialized:
            self._keep([before.index(row) for row in rows if row in before])

    def _keep(self, places: list[int]) -> None:
        """Of the pairs kept so far those at `places`."""
        if not places:
            self._forget()
            return
        index = torch.tensor(places, device=self.own.keys.device)
        # one after the other, so that the old keys are gone when the values are copied
        self.own.keys = self.own.keys[index]
        self.own.values = self.own.values[index]

    def _forget(self) -> None:
        self.own.keys = self.own.values = None
        self.own.is_initialized = False


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size() else tensor


def grouped_layers(cache: Cache, num_layers: int) -> list[GroupedLayer]:
    """The layers of `cache`; those of a fresh dynamic cache are replaced first.

    Raises:
        CacheMismatchError: another sort of cache, or one that was filled under a plan or without sharing.
    """
    layers = cache.layers
    if getattr(cache, "offloading", False):
        raise CacheMismatchError("expected a dynamic cache for adaptive sharing, got an offloaded one")
    if getattr(cache, "layer_class_to_replicate", None) is not None:
        while len(layers) < num_layers:
            layers.append(cache.layer_class_to_replicate())
    if len(layers) != num_layers:
        raise CacheMismatchError(f"expected a cache of {num_layers} layers, got one of {len(layers)}")
    for i, layer in enumerate(layers):
        if isinstance(layer, GroupedLayer):
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            name = "one made under a sharing plan" if isinstance(layer, FollowerLayer) else type(layer).__name__
            raise CacheMismatchError(f"expected a dynamic cache for adaptive sharing, got {name} in layer {i}")
        if layer.get_seq_length() > 0:
            raise CacheMismatchError(
                f"expected an empty cache or one made under this router, got {layer.get_seq_length()} tokens in "
                f"layer {i}"
            )
        layers[i] = GroupedLayer(i, layer)
    return layers  # type: ignore[no-any-return]


def sources_of(layers: Sequence[GroupedLayer]) -> list[tuple[int, ...]]:
    """The map of each sequence, `[sequences][layers]`; none before the first forward."""
    return list(zip(*(layer.sources for layer in layers), strict=True)) if layers and layers[0].sources else []


def bytes_needed(layers: Sequence[GroupedLayer], maps: Sequence[Sequence[int]], num_tokens: int) -> list[int]:
    """For each sequence, the bytes of its cache under a map of `maps` once so many more tokens have passed."""
    prices = [layer.bytes_after(num_tokens) for layer in layers]
    return [sum(prices[layer] for layer, source in enumerate(sources) if source == layer) for sources in maps]

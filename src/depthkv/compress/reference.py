"""The slow, obvious oracle of recipes: every token stays in memory, and what is evicted is hidden by the mask.

As in `depthkv.reference`, nothing is patched: transformers' own forward runs with a cache that gives each layer its
source's pair, and with each family's own eager attention behind a mask. Quantised numbers are computed group by group.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from depthkv.architectures import layer_kinds
from depthkv.compress.recipe import Bits, CacheRecipe
from depthkv.compress.rules import Stored

_NAME = "depthkv_recipe_reference"


class ReferenceRecipeCache(Cache):
    """Keeps the pairs of all layers over time, as their readers see them, and which tokens of them are left."""

    def __init__(self, model: PreTrainedModel, recipe: CacheRecipe) -> None:
        kinds = layer_kinds(model.config)
        super().__init__(layers=[DynamicLayer() for _ in kinds])
        self.recipe = recipe
        self.sources = recipe.plan.kv_source_layers
        self.compressed = recipe.compressed(kinds)
        self.kept: dict[int, torch.Tensor] = {}
        """By leader, `[batch, kv_heads, tokens]`: not evicted."""
        self.packed: dict[int, int] = {}
        """By leader, how many tokens after the sinks are quantised."""
        self.attention: dict[int, torch.Tensor] = {}
        """By leader, `[batch, kv_heads, tokens]`."""
        self.padding = torch.zeros(0)
        self.prompt = 0
        """Tokens of the first step."""
        self._observing: set[int] = set()

    def begin(self, padding: torch.Tensor, new: int) -> None:
        """A step of `new` tokens follows. `padding` `[batch, tokens]`: where there is some, the step included."""
        self.padding = padding
        self.prompt = self.prompt or new
        self._observing = {leader for leader in self.compressed if self.recipe.observes(self.count(leader) + new)}

    def count(self, leader: int) -> int:
        """Tokens that are left; the same for all heads."""
        return int(self.kept[leader][0, 0].sum()) if leader in self.kept else 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store this layer's pair, return all that its source has stored."""
        super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self.compressed:
            new = torch.ones(key_states.shape[:3], dtype=torch.bool)
            old = self.kept.get(layer_idx, new[:, :, :0])
            self.kept[layer_idx] = torch.cat([old, new], dim=2)
        source = self.layers[self.sources[layer_idx]]
        return source.keys, source.values

    def attend(self, module: Any, query: Any, key: Any, value: Any, mask: torch.Tensor, **kwargs: Any) -> Any:
        """The family's own attention, evicted tokens hidden; remembers what is attended to."""
        source = self.sources[module.layer_idx]
        mask = mask.clamp(min=-1e30)  # queries of padding see nothing, and must stay finite
        if source in self.compressed:
            hidden = ~self.kept[source].repeat_interleave(query.shape[1] // key.shape[1], dim=1)[:, :, None]
            mask = mask.expand(-1, query.shape[1], -1, -1).masked_fill(hidden, -1e30)
        output, weights = sys.modules[type(module).__module__].eager_attention_forward(
            module, query, key, value, mask, **kwargs
        )
        if source in self._observing:
            last = weights[:, :, -self.recipe.recent :].sum(dim=2)
            heads = last.view(len(last), key.shape[1], -1, last.shape[-1]).sum(dim=2)
            before = self.attention.get(source, heads[..., :0])
            self.attention[source] = heads + torch.nn.functional.pad(before, (0, heads.shape[-1] - before.shape[-1]))
        return output, weights

    def end(self) -> None:
        """Evict and quantise, sequence by sequence and head by head."""
        recipe = self.recipe
        for leader in self.compressed:
            count = self.count(leader)
            if leader not in self.packed:  # after the prompt: padding is made like its last token
                self.packed[leader] = 0
                for row, padded in enumerate(self.padding):
                    for whole in (self.layers[leader].keys, self.layers[leader].values):
                        whole[row, :, padded.nonzero().flatten()] = whole[row, :, -1:].clone()
            if recipe.tokens is not None and count > recipe.tokens:
                groups = -(-(count - recipe.tokens) // recipe.group_size)
                self._evict(leader, groups * recipe.group_size)
            if leader in self.attention and not recipe.observes(self.count(leader)):
                del self.attention[leader]
            self._quantise(leader)

    def left(self, leader: int, row: int, head: int) -> list[int]:
        """Tokens that are left: the first of the prompt's text, padding, and the others."""
        tokens = self.kept[leader][row, head].nonzero().flatten().tolist()
        padded = [token for token in tokens if self.padding[row, token]]
        text = [token for token in tokens if not self.padding[row, token]]
        first = [token for token in text[: self.recipe.sinks] if token < self.prompt]
        return [*first, *padded, *text[len(first) :]]

    def _evict(self, leader: int, number: int) -> None:
        kept, scores = self.kept[leader], self._scores(leader)
        in_groups = self.packed[leader] >= number
        for row in range(kept.shape[0]):
            for head in range(kept.shape[1]):
                left = self.left(leader, row, head)
                worth = [
                    -float("inf") if self.padding[row, token] else float(scores[row, head, place])
                    for place, token in enumerate(left)
                ]
                for token in self._worst(left, worth, leader, row, number, in_groups):
                    kept[row, head, token] = False
        self.packed[leader] = self.packed[leader] - number if in_groups else 0

    def _worst(
        self, left: list[int], worth: list[float], leader: int, row: int, number: int, in_groups: bool
    ) -> list[int]:
        """The tokens to drop: packed groups with the lowest mean, or single ones, of equals the earlier."""
        recipe, places = self.recipe, range(len(left))
        if in_groups:
            size, first = recipe.group_size, recipe.sinks
            starts = range(first, first + self.packed[leader], size)
            starts_by_worth = sorted(starts, key=lambda at: sum(worth[at : at + size]) / size)
            return [token for at in starts_by_worth[: number // size] for token in left[at : at + size]]
        sinks = [place for place in places[: recipe.sinks] if not self.padding[row, left[place]]]
        protected = {*sinks, *places[len(left) - recipe.recent :]}
        ranked = sorted((place for place in places if place not in protected), key=lambda place: worth[place])
        return [left[place] for place in ranked[:number]]

    def _scores(self, leader: int) -> torch.Tensor:
        """A rule sees the tokens that are left, side by side."""
        layer, kept, recipe = self.layers[leader], self.kept[leader], self.recipe
        batch, heads, _ = kept.shape
        index = torch.tensor([[self.left(leader, row, head) for head in range(heads)] for row in range(batch)])

        def left(whole: torch.Tensor) -> torch.Tensor:
            return whole.gather(2, index if whole.ndim == 3 else index[..., None].expand(*index.shape, whole.shape[3]))

        attention = left(self.attention[leader]) if leader in self.attention else None
        return recipe.eviction.scores(Stored(keys=left(layer.keys), values=left(layer.values), attention=attention))

    def _quantise(self, leader: int) -> None:
        recipe, layer = self.recipe, self.layers[leader]
        done = self.packed.get(leader, 0)
        wanted = recipe.packed_tokens(self.count(leader))
        for start in range(done, wanted, recipe.group_size):
            for row in range(self.kept[leader].shape[0]):
                for head in range(self.kept[leader].shape[1]):
                    group = self.left(leader, row, head)[recipe.sinks :][start : start + recipe.group_size]
                    key_bits, value_bits = recipe.bits[leader]
                    for whole, bits, along in ((layer.keys, key_bits, 0), (layer.values, value_bits, 1)):
                        part = whole[row, head, group]
                        whole[row, head, group] = quantised(part, bits, recipe.group_size, along)
        self.packed[leader] = max(done, wanted)


def quantised(x: torch.Tensor, bits: Bits, group_size: int, along: int) -> torch.Tensor:
    """`[tokens, head_dim]` rounded to `bits`, in groups along tokens (0) or channels (1)."""
    if bits == 16:
        return x
    x = x.clone()
    if bits == "fp8":
        for token in range(len(x)):
            scale = x[token].abs().max() / torch.finfo(torch.float8_e4m3fn).max
            x[token] = (x[token] / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale
        return x
    if along == 1:
        width = x.shape[1]
        size = next(size for size in range(min(group_size, width), 0, -1) if width % size == 0)
        for token in range(len(x)):
            for start in range(0, width, size):
                x[token, start : start + size] = _rounded(x[token, start : start + size], bits)
        return x
    for channel in range(x.shape[1]):
        x[:, channel] = _rounded(x[:, channel], bits)
    return x


def _rounded(group: torch.Tensor, bits: int) -> torch.Tensor:
    low, high = group.min(), group.max()
    step = (high - low) / (2**bits - 1)
    return group if step == 0 else low + ((group - low) / step).round() * step


@contextmanager
def reference_attention(model: PreTrainedModel, cache: ReferenceRecipeCache) -> Iterator[None]:
    """Let the model's attention go through `cache.attend`."""
    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, lambda module, *args, **kwargs: cache.attend(module, *args, **kwargs))
    AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def reference_recipe_logits(
    model: PreTrainedModel, recipe: CacheRecipe, pieces: list[torch.Tensor], attention_mask: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Logits of every piece `[batch, tokens]`, read one after the other through the cache of a recipe, in fp32.

    `attention_mask` `[batch, tokens of the first piece]` is for left padding.
    """
    cache, logits = ReferenceRecipeCache(model, recipe), []
    mask = torch.ones_like(pieces[0]) if attention_mask is None else attention_mask
    with reference_attention(model, cache):
        for number, piece in enumerate(pieces):
            if number:
                mask = torch.cat([mask, torch.ones_like(piece)], dim=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -piece.shape[1] :]
            cache.begin(mask == 0, piece.shape[1])
            output = model(
                input_ids=piece, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache.end()
            logits.append(output.logits)
    return logits

"""A cache layer that keeps a leader's keys and values in few bits, and no more tokens than a recipe says.

Three parts in the order of the text: the sinks and the recent tokens as they were computed, and in between what is
packed. The attention of all readers in a step sees the same unpacked pair, made once in `update`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from depthkv.attention import Pair
from depthkv.compress.packing import PackedTensor, PlainTensor, keep_groups
from depthkv.compress.recipe import ALONG, CacheRecipe
from depthkv.compress.rules import Stored, Window
from depthkv.errors import CacheMismatchError, RecipeError

Store = PackedTensor | PlainTensor


class CompressedLayer(CacheLayerMixin):
    """One leader with full attention under a recipe.

    Between `update` and `compress`, which the last reader of the step calls, the step's tokens are kept as they came.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, recipe: CacheRecipe, leader: int) -> None:
        self.recipe = recipe
        self.leader = leader
        self.is_read = False
        """The attention of a layer under the recipe is about to read it."""
        self.seen = 0
        """Tokens of each sequence that passed, padding included."""
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.sinks: Pair | None = None
        self.packed: tuple[Store, Store] | None = None
        self.recent: Pair | None = None
        self.valid: torch.Tensor | None = None
        """False where padding is kept, `[batch, kv_heads, tokens]`; None: there is none."""
        self.attention: torch.Tensor | None = None
        """As `Stored.attention`."""
        self._least = 0
        """Tokens that cannot be taken back, since others were evicted for them."""
        self.num_new = 0
        """Tokens of the present step, not compressed yet."""
        self._new_valid: torch.Tensor | None = None

    # What is stored

    @property
    def num_kept(self) -> int:
        """Tokens that are stored, those of the present step included."""
        return self._tokens(self.sinks) + self._num_packed + self._tokens(self.recent)

    @property
    def num_past(self) -> int:
        """Tokens that were stored before the present step."""
        return self.num_kept - self.num_new

    @property
    def _num_packed(self) -> int:
        return 0 if self.packed is None else self.packed[0].num_tokens

    @staticmethod
    def _tokens(pair: Pair | None) -> int:
        return 0 if pair is None else int(pair[0].shape[2])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Pair:
        """Take the step's pair; returns all that is kept and it, unpacked."""
        if not self.is_read:
            raise CacheMismatchError(
                "expected a cache that was filled under the plan in force, got one that was filled under a recipe"
            )
        self.is_initialized = True
        self.seen += key_states.shape[2]
        self.num_new += key_states.shape[2]
        new = (key_states.detach(), value_states.detach())
        if self.sinks is None:
            self.sinks = (new[0][:, :, :0], new[1][:, :, :0])
        self.recent = new if self.recent is None else (_join(self.recent[0], new[0]), _join(self.recent[1], new[1]))
        if self.num_past == 0:
            return key_states, value_states
        return self._with_gradient(key_states, value_states)

    def _with_gradient(self, keys: torch.Tensor, values: torch.Tensor) -> Pair:
        """All that is kept; a gradient reaches the step's own pair."""
        whole = self._unpacked()
        if not keys.requires_grad:
            return whole
        past = whole[0].shape[2] - keys.shape[2]
        return torch.cat([whole[0][:, :, :past], keys], dim=2), torch.cat([whole[1][:, :, :past], values], dim=2)

    def _unpacked(self) -> Pair:
        """Everything that is kept, in one tensor for keys and one for values."""
        assert self.sinks is not None and self.recent is not None
        pair = []
        first, last = self._tokens(self.sinks), self._tokens(self.recent)
        for side in (0, 1):
            recent = self.recent[side]
            whole = recent.new_empty(*recent.shape[:2], first + self._num_packed + last, recent.shape[3])
            whole[:, :, :first] = self.sinks[side]
            if self.packed is not None:
                self.packed[side].unpack(whole[:, :, first : first + self._num_packed])
            whole[:, :, first + self._num_packed :] = recent
            pair.append(whole)
        return pair[0], pair[1]

    # After a step

    def mask(self, mask: torch.Tensor | None, num_heads: int) -> torch.Tensor | None:
        """transformers' attention mask `[batch, 1, queries, seen]`, for the tokens that are kept.

        Every query comes after all that was kept before the step, so only padding and the step itself need a mask.
        """
        past = self.num_past
        if mask is None or (self.seen == self.num_kept and self.valid is None):
            return mask
        new = mask.shape[-1] - (self.seen - self.num_new)
        yes = torch.ones((), dtype=torch.bool) if mask.dtype == torch.bool else torch.zeros((), dtype=mask.dtype)
        batch, _, queries, _ = mask.shape
        if self.valid is None:
            visible = yes.to(mask.device).expand(batch, mask.shape[1], queries, past)
            return torch.cat([visible, mask[..., -new:]], dim=-1)
        # a follower may be on another device than its leader
        valid = self.valid.to(mask.device).repeat_interleave(num_heads // self.valid.shape[1], dim=1)[:, :, None]
        if mask.dtype != torch.bool:
            valid = torch.zeros(valid.shape, dtype=mask.dtype, device=valid.device).masked_fill(
                ~valid, torch.finfo(mask.dtype).min
            )
        shape = (len(valid), num_heads, queries)
        return torch.cat([valid.expand(*shape, past), mask[..., -new:].expand(*shape, new)], dim=-1)

    def note_padding(self, mask: torch.Tensor | None, batch: int) -> None:
        """Remember which of the step's tokens are padding, from transformers' mask before `mask` cut it."""
        if mask is None:
            self._new_valid = None
            return
        new = mask[:, 0, -1, self.seen :].expand(batch, -1)  # called before `update`
        new = new if new.dtype == torch.bool else new == 0
        self._new_valid = None if bool(new.all()) else new

    def wants_attention(self, num_new: int) -> bool:
        """Whether `observe` has to be called in a step of so many tokens, asked before `update`."""
        return self.recipe.observes(self.num_past + num_new)

    def observe(self, weights: torch.Tensor) -> None:
        """Add what one reader's last queries attend to, `[batch, heads, queries, kept]`."""
        assert self.recent is not None
        per_head = weights.float().sum(dim=2).to(self.recent[0].device)
        grouped = per_head.view(len(per_head), self.recent[0].shape[1], -1, per_head.shape[-1]).sum(dim=2)
        if self.attention is None:
            self.attention = grouped
        else:
            missing = grouped.shape[-1] - self.attention.shape[-1]
            self.attention = torch.nn.functional.pad(self.attention, (0, missing)) + grouped

    def compress(self) -> None:
        """Evict and pack what the step made too much: once all readers are done."""
        if self.recent is None:
            return
        self._keep_padding()
        self.num_new, self.is_read, recipe = 0, False, self.recipe
        count = self.num_kept
        if recipe.tokens is not None and count > recipe.tokens:
            groups = -(-(count - recipe.tokens) // recipe.group_size)
            self._least = self.seen - recipe.recent
            self._evict(groups * recipe.group_size)
        if self.attention is not None and not recipe.observes(self.num_kept):
            self.attention = None
        self._pack()

    def _keep_padding(self) -> None:
        new, self._new_valid = self._new_valid, None
        if new is not None:
            if self.num_past:
                raise CacheMismatchError(
                    "expected padding in the first piece of a prompt only, got some in a later one; read padded "
                    "prompts at once, without prefill_chunk_size"
                )
            new = self._sort_padding(new)
        if new is None and self.valid is None:
            return
        assert self.recent is not None
        batch, heads = self.recent[0].shape[:2]
        everything = torch.ones(batch, heads, self.num_kept, dtype=torch.bool, device=self.recent[0].device)
        past = everything[..., : self.num_past] if self.valid is None else self.valid
        latest = everything[..., self.num_past :]
        self.valid = torch.cat([past, latest if new is None else latest & new[:, None]], dim=-1)

    def _sort_padding(self, valid: torch.Tensor) -> torch.Tensor:
        """Move the padding of a prompt behind its sinks, and make it copies of its last token.

        So the sinks are the first tokens of the text, and no scale is spent on numbers that nobody reads. Keys carry
        their positions, so their order is free.
        """
        assert self.recent is not None
        sinks, (batch, tokens) = self.recipe.sinks, valid.shape
        rank = valid.long().cumsum(dim=1) - 1
        place = torch.where(rank < sinks, rank, rank + tokens).masked_fill(~valid, sinks)
        order = place.argsort(dim=1, stable=True)
        valid = valid.gather(1, order)
        heads, width = self.recent[0].shape[1], self.recent[0].shape[3]
        index = order.masked_fill(~valid, tokens - 1)[:, None, :, None].expand(batch, heads, tokens, width)
        self.recent = (self.recent[0].gather(2, index), self.recent[1].gather(2, index))
        if self.attention is not None:
            self.attention = self.attention.gather(2, order[:, None].expand(batch, heads, tokens))
        return valid

    def _evict(self, number: int) -> None:
        """Drop `number` tokens of each sequence and head.

        Of a prompt the tokens with the lowest scores. Later those packed groups whose tokens have the lowest mean: so
        nothing is rounded twice, unless more goes at once than is packed.
        """
        recipe = self.recipe
        in_groups = self._num_packed >= number
        if in_groups and isinstance(recipe.eviction, Window) and self.valid is None:
            for store in self.packed or ():  # the oldest are the first that are packed: no need to unpack any
                store.drop_first(number)
            return
        keys, values = self._unpacked()
        count = keys.shape[2]
        scores = recipe.eviction.scores(Stored(keys=keys, values=values, attention=self.attention)).double()
        if scores.shape != keys.shape[:3]:
            raise RecipeError(
                f"expected scores of shape {list(keys.shape[:3])} from {recipe.rule_name}, got {list(scores.shape)}"
            )
        scores = scores.clone()
        scores[..., : recipe.sinks] = torch.inf
        if self.valid is not None:
            scores = scores.masked_fill(~self.valid, -torch.inf)
        if in_groups:
            self._evict_groups(scores, number)
            return
        scores[..., count - recipe.recent :] = torch.inf
        kept = _best(scores, count - number)
        self.sinks, self.packed = (keys[:, :, :0], values[:, :, :0]), None
        self.recent = (keep_groups(keys, kept, count), keep_groups(values, kept, count))
        self._keep_beside(kept)

    def _evict_groups(self, scores: torch.Tensor, number: int) -> None:
        """Drop whole packed groups, each head its own."""
        assert self.packed is not None
        size, first = self.recipe.group_size, self._tokens(self.sinks)
        groups = self._num_packed // size
        inner = scores[..., first : first + self._num_packed]
        means = inner.reshape(*inner.shape[:2], groups, size).mean(dim=-1)
        kept = _best(means, groups - number // size)
        last = torch.arange(first + self._num_packed, scores.shape[-1], device=kept.device)
        inside = (first + kept[..., None] * size + torch.arange(size, device=kept.device)).flatten(2)
        shape = (*kept.shape[:2], -1)
        tokens = torch.cat([last.new_tensor(range(first)).expand(*shape), inside, last.expand(*shape)], dim=-1)
        for store in self.packed:
            store.keep_groups(kept, size)
        self._keep_beside(tokens)

    def _keep_beside(self, kept: torch.Tensor) -> None:
        """Of what is known of the tokens, only that of those in `kept`, `[batch, kv_heads, number]`."""
        if self.valid is not None:
            self.valid = self.valid.gather(-1, kept)
            if bool(self.valid.all()):
                self.valid = None
        if self.attention is not None:
            self.attention = self.attention.gather(-1, kept)

    def _pack(self) -> None:
        """Move what is neither sink nor recent, in whole groups."""
        assert self.sinks is not None and self.recent is not None
        recipe = self.recipe
        to_sinks = min(recipe.sinks - self._tokens(self.sinks), self._tokens(self.recent))
        if to_sinks > 0:
            self.sinks = (
                _join(self.sinks[0], self.recent[0][:, :, :to_sinks]),
                _join(self.sinks[1], self.recent[1][:, :, :to_sinks]),
            )
            self.recent = (self.recent[0][:, :, to_sinks:], self.recent[1][:, :, to_sinks:])
        number = recipe.packed_tokens(self.num_kept) - self._num_packed
        if number > 0:
            made = (self._store(0, number), self._store(1, number))
            if self.packed is None:
                self.packed = made
            else:
                for store, more in zip(self.packed, made, strict=True):
                    store.append(more)  # type: ignore[arg-type]
            self.recent = (self.recent[0][:, :, number:], self.recent[1][:, :, number:])
        # views would keep the whole step alive
        self.recent = (_owned(self.recent[0]), _owned(self.recent[1]))
        self.sinks = (_owned(self.sinks[0]), _owned(self.sinks[1]))

    def _store(self, side: int, number: int) -> Store:
        """The first recent tokens of keys (0) or values (1), in the bits of the recipe."""
        assert self.recent is not None
        part, bits = self.recent[side][:, :, :number], self.recipe.bits[self.leader][side]
        if bits == 16:
            return PlainTensor(part)
        return PackedTensor.pack(part, bits=bits, group_size=self.recipe.group_size, along=ALONG[side])

    # What transformers asks and does

    @property
    def keys(self) -> torch.Tensor | None:
        return None if self.recent is None else self.recent[0]

    @property
    def values(self) -> torch.Tensor | None:
        return None if self.recent is None else self.recent[1]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise CacheMismatchError(f"expected a negative number of tokens to crop, got {tokens_to_remove}")
        number = min(-tokens_to_remove, self.seen)
        if number == 0 or self.recent is None:
            return
        if number == self.seen:
            self.reset()
            return
        if self.seen - number < self._least:
            raise CacheMismatchError(
                f"expected to crop at most {self.seen - self._least} tokens of a cache from which some were evicted, "
                f"got {number}"
            )
        if number > self._tokens(self.recent):
            self.recent, self.packed = self._unpacked(), None
            self.sinks = (self.recent[0][:, :, :0], self.recent[1][:, :, :0])
        self.recent = (self.recent[0][:, :, :-number], self.recent[1][:, :, :-number])
        self.valid = None if self.valid is None else self.valid[..., :-number].clone()
        self.attention = None if self.attention is None else self.attention[..., :-number].clone()
        self.seen -= number
        self._pack()

    def reset(self) -> None:
        self.seen = 0
        self._clear()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._each(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._each(lambda part: part[torch.as_tensor(indices, device=part.device)])

    def offload(self) -> None:
        if self.recent is not None:
            self.device = self.recent[0].device
            self._each(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.recent is not None:
            device = getattr(self, "device", self.recent[0].device)
            self._each(lambda part: part.to(device, non_blocking=True))

    def _each(self, change: Any) -> None:
        """Do the same to every tensor; all of them begin with the batch."""
        if self.recent is None or self.sinks is None:
            return
        self.sinks = (change(self.sinks[0]), change(self.sinks[1]))
        self.recent = (change(self.recent[0]), change(self.recent[1]))
        for store in self.packed or ():
            store.change(change)
        self.valid = None if self.valid is None else change(self.valid)
        self.attention = None if self.attention is None else change(self.attention)


def _join(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.cat([first, second], dim=2) if first.shape[2] else second


def _best(scores: torch.Tensor, number: int) -> torch.Tensor:
    """Places of the `number` highest, ascending; of equal ones the later, so that every device takes the same."""
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    return (scores.shape[-1] - 1 - order[..., :number]).sort(dim=-1).values


def _owned(part: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it fills its storage."""
    fits = part.untyped_storage().nbytes() == part.numel() * part.element_size()
    return part if fits else part.clone(memory_format=torch.contiguous_format)

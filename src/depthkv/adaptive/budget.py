"""A limit on the bytes of a cache, and who gives up a layer when the next tokens would pass it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from depthkv.adaptive.cache import GroupedLayer, bytes_needed, sources_of
from depthkv.adaptive.ladder import Ladder, Sources
from depthkv.architectures import LayerKind
from depthkv.errors import DepthKVError, KVBudgetError
from depthkv.memory import format_bytes, kv_bytes_per_layer, parse_bytes

Size = int | str
"""Bytes, or text such as "64MiB"."""

Limit = Size | Callable[[], Size]
"""A size, or what is asked for one before every step, such as a server that has less room than before."""


@dataclass(frozen=True, kw_only=True)
class KVBudget:
    """Limits of one cache; None is no limit."""

    total: Limit | None = None
    """All sequences of the batch together."""
    sequence: Limit | None = None
    """Each sequence."""

    def now(self) -> tuple[int | None, int | None]:
        """Bytes of the batch and of a sequence, asked for anew.

        Raises:
            DepthKVError: a size that is none.
        """
        return _bytes(self.total), _bytes(self.sequence)


def _bytes(limit: Limit | None) -> int | None:
    value = limit() if callable(limit) else limit
    if value is None:
        return None
    # numpy's integers pass, booleans and floats do not
    if isinstance(value, bool) or not (isinstance(value, str) or hasattr(value, "__index__")):
        raise DepthKVError(f'expected a KV budget such as "64MiB" or a number of bytes, got {value!r}')
    size = parse_bytes(value) if isinstance(value, str) else value.__index__()
    if size < 1:
        raise DepthKVError(f"expected a KV budget of at least 1 byte, got {value!r}")
    return size


def map_bytes(sources: Sequence[int], kinds: Sequence[LayerKind], dtype: torch.dtype, num_tokens: int) -> int:
    """Bytes of one sequence's cache of so many tokens under a map; a windowed layer counts its whole window."""
    leaders = (kind for layer, kind in enumerate(kinds) if sources[layer] == layer)
    return sum(
        kv_bytes_per_layer(kind, dtype) * (num_tokens if kind.window is None else min(num_tokens, kind.window))
        for kind in leaders
    )


def shed(
    layers: Sequence[GroupedLayer], ladder: Ladder, total: int | None, sequence: int | None, num_tokens: int
) -> list[Sources]:
    """Maps under which the cache stays within its limits for so many more tokens.

    While there is too much, the sequence that takes most gives up one leader. Nothing is freed yet.

    Raises:
        KVBudgetError: not even the smallest maps fit.
    """
    maps = sources_of(layers)
    if total is None and sequence is None:
        return maps
    needs = bytes_needed(layers, maps, num_tokens)
    below: dict[int, Sources | None] = {}  # only asked for where something must go

    def smaller(row: int) -> Sources | None:
        if row not in below:
            below[row] = ladder.smaller(maps[row])
        return below[row]

    while True:
        too_large = [row for row, need in enumerate(needs) if sequence is not None and need > sequence]
        if not too_large and (total is None or sum(needs) <= total):
            return maps
        candidates = [row for row in too_large or range(len(maps)) if smaller(row) is not None]
        if not candidates:
            tokens = layers[0].num_tokens + num_tokens
            raise _too_small(needs, total, sequence, tokens)
        row = max(candidates, key=lambda row: (needs[row], -row))
        found = below.pop(row)
        assert found is not None
        maps[row] = found
        needs[row] = bytes_needed(layers, [found], num_tokens)[0]


def require_room(needs: Sequence[int], total: int | None, sequence: int | None, num_tokens: int) -> None:
    """Refuse prompts that have no room even with the fewest leaders.

    Raises:
        KVBudgetError: they have none.
    """
    if (total is not None and sum(needs) > total) or (sequence is not None and max(needs) > sequence):
        raise _too_small(needs, total, sequence, num_tokens)


def _too_small(needs: Sequence[int], total: int | None, sequence: int | None, num_tokens: int) -> KVBudgetError:
    if total is not None and sum(needs) > total:
        least, budget, whose = sum(needs), total, f"{len(needs)} sequence{'s' * (len(needs) != 1)}"
    else:
        assert sequence is not None
        least, budget, whose = max(needs), sequence, "a sequence"
    return KVBudgetError(
        f"expected a KV budget of at least {format_bytes(least)} for {whose} of {num_tokens} tokens, "
        f"got {format_bytes(budget)}"
    )

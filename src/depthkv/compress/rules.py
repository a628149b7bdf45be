"""Which tokens of a leader's cache stay when there are too many: a rule scores them, the lowest are evicted.

The first and last tokens of a recipe (`sinks`, `recent`) stay whatever a rule says. A rule is one small class with one
method; `CacheRecipe(rule=...)` takes one of your own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

__all__ = ["RULES", "KeyNorm", "ObservedAttention", "Rule", "Stored", "Window"]

OBSERVED_STEPS = 8
"""So many last steps before an eviction, rules that need attention are told what the readers attend to."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a leader keeps, in the order of the text."""

    keys: torch.Tensor
    """After the rotary embedding, `[batch, kv_heads, tokens, head_dim]`."""
    values: torch.Tensor
    """`[batch, kv_heads, tokens, head_dim]`."""
    attention: torch.Tensor | None
    """For rules that need it: weights that all layers which read this cache gave to each token, summed over these
    layers, their query heads and the last queries, fp32, `[batch, kv_heads, tokens]`."""


@runtime_checkable
class Rule(Protocol):
    """Anything with these two."""

    needs_attention: bool
    """Whether `Stored.attention` has to be there."""

    def scores(self, stored: Stored) -> torch.Tensor:
        """The higher, the sooner a token stays: `[batch, kv_heads, tokens]`."""
        ...


class Window:
    """The latest tokens (StreamingLLM, arXiv:2309.17453: with the first ones, which a recipe keeps as its sinks)."""

    needs_attention = False

    def scores(self, stored: Stored) -> torch.Tensor:
        """The position."""
        tokens = stored.keys.shape[2]
        return torch.arange(tokens, device=stored.keys.device).expand(*stored.keys.shape[:2], tokens)


class KeyNorm:
    """Tokens whose keys are short: heads attend to them more (arXiv:2406.11430)."""

    needs_attention = False

    def scores(self, stored: Stored) -> torch.Tensor:
        """The negative norm."""
        lengths: torch.Tensor = torch.linalg.vector_norm(stored.keys.float(), dim=-1)
        return -lengths


class ObservedAttention:
    """Tokens that the last queries attend to, and those beside them (SnapKV, arXiv:2404.14469).

    SnapKV asks each layer alone. Here all layers that read a cache have a say in it.
    """

    needs_attention = True

    def __init__(self, pooled: int = 5) -> None:
        self.pooled = pooled
        """Tokens over which scores are averaged, so that what belongs together stays together; odd."""

    def scores(self, stored: Stored) -> torch.Tensor:
        """The attention, smoothed over neighbours."""
        assert stored.attention is not None
        return torch.nn.functional.avg_pool1d(
            stored.attention, self.pooled, stride=1, padding=self.pooled // 2, count_include_pad=False
        )


RULES: dict[str, Rule] = {"window": Window(), "key-norm": KeyNorm(), "attention": ObservedAttention()}
"""By the name that a recipe's file gives them."""

"""What decides, in the prefill of one sequence, which layers keep their keys and values. Write one in a few lines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from depthkv.adaptive.ladder import Ladder, Sources
from depthkv.architectures import LayerKind
from depthkv.errors import PlanError

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each `[kv_heads, tokens, head_dim]`."""


@dataclass(kw_only=True, eq=False)
class Prompt:
    """What a router sees of one sequence while its prompt runs through the layers.

    There is no padding and no other sequence in it, so a decision cannot depend on the batch.
    """

    kinds: tuple[LayerKind, ...]
    num_tokens: int
    sources: list[int] = field(default_factory=list)
    """Of the layers so far."""
    pairs: dict[int, Pair] = field(default_factory=dict)
    """Of the leaders so far, as the layers read them (keys are rotated)."""
    tokens: torch.Tensor | None = None
    """Token ids, `[tokens]`; None where embeddings were given."""
    hidden: torch.Tensor | None = None
    """What the attention of the present layer is given (after its norm), `[tokens, hidden_size]`."""
    notes: dict[str, Any] = field(default_factory=dict)
    """The router's own, from one layer to the next."""
    may_lead: bool = True
    """There is room for the present layer's pair beside those that must be kept."""

    def leaders(self, layer: int) -> list[int]:
        """The layers so far that `layer` may read: leaders of its kind, ascending."""
        return [i for i, source in enumerate(self.sources) if source == i and self.kinds[i] == self.kinds[layer]]

    def positions(self, count: int) -> torch.Tensor:
        """At most `count` positions of the prompt, evenly spaced, the last one among them."""
        count = min(count, self.num_tokens)
        return torch.linspace(0, self.num_tokens - 1, count).round().long() if count > 1 else torch.tensor([-1])


class Router(ABC):
    """Decides layer by layer; each decision holds for the sequence's later tokens, too.

    The first layer of each kind always leads and is not asked about. Called under `torch.no_grad`.
    """

    needs_kv: bool = True
    """False: the decision is made before the layer's keys and values are computed, which saves them where it joins."""

    ladder: Ladder | None = None
    """How sequences give up leaders under pressure; None is the rule for any map."""

    def start(self, prompt: Prompt) -> Sources | None:
        """The whole map, where it is known before the first layer; otherwise None."""
        return None

    @abstractmethod
    def source(self, layer: int, prompt: Prompt, own: Pair | None) -> int:
        """The layer that `layer` reads: itself, or one of `prompt.leaders(layer)`.

        Where `prompt.may_lead` is False, an answer of itself counts as the nearest leader.

        Args:
            layer: the present layer.
            prompt: what is known so far.
            own: the layer's own pair; None where `needs_kv` is False.
        """

    def check(self, kinds: Sequence[LayerKind], hidden_size: int) -> None:  # noqa: B027 most routers fit any model
        """Raise `PlanError` unless the router was made for such a model."""


class MadeRouter(Router):
    """A router that was made for one model.

    Args:
        kinds: of its layers.
        order: for giving up leaders, see `Ladder`.
        hidden_size: of the hidden states that it looks at; None where it looks at none.
    """

    def __init__(self, kinds: Sequence[LayerKind], order: Sequence[int], hidden_size: int | None = None) -> None:
        self.kinds = tuple(kinds)
        self.hidden_size = hidden_size
        self.ladder: Ladder = Ladder(kinds, order)

    def check(self, kinds: Sequence[LayerKind], hidden_size: int) -> None:
        if tuple(kinds) != self.kinds or self.hidden_size not in (None, hidden_size):
            raise PlanError(
                f"expected a model with the {len(self.kinds)} layers that the router was made for, got other layers"
            )


class FixedRouter(Router):
    """The same map for every input: the largest rung of a ladder that there is room for."""

    needs_kv = False

    def __init__(self, sources: Sources, ladder: Ladder) -> None:
        self.sources = sources
        self.ladder = ladder

    def start(self, prompt: Prompt) -> Sources:
        return self.sources

    def source(self, layer: int, prompt: Prompt, own: Pair | None) -> int:
        return self.sources[layer]

    def check(self, kinds: Sequence[LayerKind], hidden_size: int) -> None:
        if len(self.sources) != len(kinds):
            raise PlanError(f"expected a plan for {len(kinds)} layers, got one for {len(self.sources)}")

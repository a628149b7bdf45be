"""Who keeps how many layers: the plan that a request begins with, and who gives up a layer when room is short."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from depthkv.adaptive.budget import map_bytes
from depthkv.adaptive.ladder import Ladder, Sources
from depthkv.adaptive.router import Pair, Prompt, Router
from depthkv.architectures import LayerKind
from depthkv.errors import DepthKVError
from depthkv.plan import SharingPlan

LEAST_RETENTION = 0.25
"""Of a checkpoint that has a plan, where the operator says nothing; one without a plan is not shared at all."""


class Depths:
    """The plans of one server.

    Args:
        kinds: one for each layer of the model.
        dtype: of keys and values.
        plan: the checkpoint's own; what a request gets that asks for nothing.
        min_retention: least share of layers, whatever is asked for and however short room is; None is the default.
        max_retention: largest share of layers.

    Raises:
        DepthKVError: bounds that contradict each other.
    """

    def __init__(
        self,
        kinds: Sequence[LayerKind],
        dtype: torch.dtype,
        plan: SharingPlan | None = None,
        min_retention: float | None = None,
        max_retention: float = 1.0,
    ) -> None:
        self.kinds = tuple(kinds)
        self.dtype = dtype
        self.plan = plan
        if min_retention is None:
            min_retention = max_retention if plan is None else min(LEAST_RETENTION, plan.retention, max_retention)
        if min_retention > max_retention:
            raise DepthKVError(
                f"expected a least retention of at most the largest, {max_retention:g}, got {min_retention:g}"
            )
        self.min_retention = min_retention
        self.max_retention = max_retention
        own = max_retention if plan is None else plan.retention
        self.default = min(max(own, min_retention), max_retention)
        """Retention of a request that asks for none."""
        self.ladder = Ladder(self.kinds) if plan is None else Ladder.of(plan, self.kinds)
        self._fewest = max(math.ceil(min_retention * len(self.kinds) - 1e-9), len(self.ladder.required))

    def start(self, retention: float) -> Sources:
        """The map that a request of this retention begins with.

        The checkpoint's own plan, or the one below it that its planner measured, where they have about as many leaders;
        otherwise evenly spaced layers.

        Raises:
            DepthKVError: outside the server's bounds.
        """
        # a plan has a whole number of leaders, so that 0.25 of 30 layers is 8 of them
        if not self.min_retention - 1e-9 <= retention <= self.max_retention + 1e-9:
            raise DepthKVError(
                f"expected kv_retention from {self.min_retention:g} to {self.max_retention:g}, got {retention:g}"
            )
        sources = SharingPlan.for_retention(retention, self.kinds).kv_source_layers
        for known in () if self.plan is None else (self.plan, *self.ladder.plans):
            if len(known.leaders) == len(set(sources)) or known.retention == retention:
                sources = known.kv_source_layers
                break
        return sources

    def smaller(self, sources: Sources) -> Sources | None:
        """The map with one leader fewer; None at the least retention."""
        return self.ladder.smaller(sources) if len(set(sources)) > self._fewest else None

    def smallest(self, sources: Sources) -> Sources:
        """The last map on the way down."""
        while (below := self.smaller(sources)) is not None:
            sources = below
        return sources

    def num_bytes(self, sources: Sources, num_tokens: int) -> int:
        """Of a sequence's cache of so many tokens."""
        return map_bytes(sources, self.kinds, self.dtype, num_tokens)

    def fit(self, wanted: Sequence[Need], budget: int | None) -> bool:
        """Lower maps until the whole is within the budget: whoever takes most gives up one leader.

        False if that is not enough; the maps are then left as they were.
        """
        if budget is None:
            return True
        maps = [need.sources for need in wanted]
        sizes = [self.num_bytes(need.sources, need.num_tokens) for need in wanted]
        while sum(sizes) > budget:
            for row in sorted(range(len(maps)), key=lambda row: -sizes[row]):
                if (below := self.smaller(maps[row])) is not None:
                    maps[row], sizes[row] = below, self.num_bytes(below, wanted[row].num_tokens)
                    break
            else:
                return False
        for need, sources in zip(wanted, maps, strict=True):
            need.sources = sources
        return True


@dataclass(kw_only=True, eq=False)
class Need:
    """A map, and of how many tokens room is needed."""

    sources: Sources
    num_tokens: int


class RequestRouter(Router):
    """What the request in prefill gets: a plan that is known, or the choice of another router.

    Args:
        depths: of the server.
        chooser: for requests with an adaptive plan; None refuses those elsewhere.
    """

    def __init__(self, depths: Depths, chooser: Router | None) -> None:
        self.ladder = depths.ladder
        self.chooser = chooser
        self.sources: Sources = ()
        self.choose(())

    def choose(self, sources: Sources | None) -> None:
        """For the next prompt; None lets the other router choose."""
        self._chooser = self.chooser if sources is None else None
        self.sources = sources or ()
        self.needs_kv = self._chooser is not None and self._chooser.needs_kv

    def start(self, prompt: Prompt) -> Sources | None:
        return self.sources if self._chooser is None else self._chooser.start(prompt)

    def source(self, layer: int, prompt: Prompt, own: Pair | None) -> int:
        return self.sources[layer] if self._chooser is None else self._chooser.source(layer, prompt, own)

    def check(self, kinds: Sequence[LayerKind], hidden_size: int) -> None:
        if self.chooser is not None:
            self.chooser.check(kinds, hidden_size)

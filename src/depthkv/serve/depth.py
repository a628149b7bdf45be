"""Who keeps how many layers: the plan that a request begins with, and who gives up a layer when room is short."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from depthkv.adaptive.budget import map_bytes
from depthkv.adaptive.ladder import Ladder, Sources
from depthkv.adaptive.router import FixedRouter, Pair, Prompt, Router
from depthkv.architectures import LayerKind
from depthkv.errors import DepthKVError
from depthkv.plan import SharingPlan

LEAST_RETENTION = 0.25
"""Of a checkpoint that has a plan, where the operator says nothing; one without a plan is not shared at all."""


class Depths:
    """The plans of one server.

    Where the largest retention is that of the checkpoint's plan or less, every map keeps to the leaders of that plan:
    so an export without the other layers' K and V weights is served, and prefill stops early above the last leader.

    Args:
        kinds: one for each layer of the model.
        dtype: of keys and values.
        plan: the checkpoint's own; what a request gets that asks for nothing.
        min_retention: least share of layers, whatever is asked for and however short room is; None is the default.
        max_retention: largest share of layers; None is all that can lead.
        can_lead: layers that have K and V weights; None is all of them.

    Raises:
        DepthKVError: bounds that contradict each other, or a leader that has no K and V weights.
    """

    def __init__(
        self,
        kinds: Sequence[LayerKind],
        dtype: torch.dtype,
        plan: SharingPlan | None = None,
        min_retention: float | None = None,
        max_retention: float | None = None,
        can_lead: Sequence[int] | None = None,
    ) -> None:
        self.kinds = tuple(kinds)
        self.dtype = dtype
        self.plan = plan
        everyone = range(len(self.kinds))
        can_lead = everyone if can_lead is None else can_lead
        if max_retention is None:
            max_retention = 1.0 if len(can_lead) == len(self.kinds) or plan is None else plan.retention
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
        self.top: Sources = tuple(everyone)
        """A map that has all leaders of any other map of this server."""
        if plan is not None and max_retention <= plan.retention:
            self.top = plan.kv_source_layers
        if lacking := sorted(set(self.top) - set(can_lead)):
            raise DepthKVError(
                f"expected a largest retention of at most {len(can_lead) / len(self.kinds):g}, since layer "
                f"{lacking[0]} and others have no K and V weights (an export leaves them out), got {max_retention:g}"
            )
        self.ladder = Ladder(self.kinds) if plan is None else Ladder.of(plan, self.kinds)
        self._fewest = max(math.ceil(min_retention * len(self.kinds) - 1e-9), len(self.ladder.required))
        self._most = max(math.floor(max_retention * len(self.kinds) + 1e-9), self._fewest)

    def start(self, retention: float) -> Sources:
        """The map that a request of this retention begins with.

        The checkpoint's own plan, or the one below it that its planner measured, where they have as many leaders;
        otherwise evenly spaced layers, or what is left of the plan where these are none of its leaders.

        Raises:
            DepthKVError: outside the server's bounds.
        """
        if not self.min_retention - 1e-9 <= retention <= self.max_retention + 1e-9:
            raise DepthKVError(
                f"expected kv_retention from {self.min_retention:g} to {self.max_retention:g}, got {retention:g}"
            )
        if self.plan is not None and retention == self.plan.retention:
            return self.plan.kv_source_layers
        even = SharingPlan.for_retention(retention, self.kinds)
        wanted = min(max(len(even.leaders), self._fewest), self._most)
        if len(even.leaders) != wanted:  # rounded across a bound
            even = SharingPlan.for_retention(wanted / len(self.kinds), self.kinds)
        for known in () if self.plan is None else (self.plan, *self.ladder.plans):
            if len(known.leaders) == wanted and set(known.leaders) <= set(self.top):
                return known.kv_source_layers
        if len(even.leaders) == wanted and set(even.leaders) <= set(self.top):
            return even.kv_source_layers
        sources = self.top
        while len(set(sources)) > wanted and (below := self.ladder.smaller(sources)) is not None:
            sources = below
        return sources

    def smaller(self, sources: Sources) -> Sources | None:
        """The map with one leader fewer; None at the least retention."""
        return self.ladder.smaller(sources) if len(set(sources)) > self._fewest else None

    def smallest(self, sources: Sources) -> Sources:
        """The last map on the way down."""
        while (below := self.smaller(sources)) is not None:
            sources = below
        return sources

    @property
    def least(self) -> Sources:
        """The last map of a request that asks for nothing."""
        return self.smallest(self.start(self.default))

    def num_bytes(self, sources: Sources, num_tokens: int) -> int:
        """Of a sequence's cache of so many tokens."""
        return map_bytes(sources, self.kinds, self.dtype, num_tokens)

    def most_tokens(self, num_prompt: int, wanted: int, budget: int | None) -> int:
        """So many tokens after a prompt as the budget has room for with the fewest layers; 1 to `wanted`."""
        if budget is None:
            return wanted
        least, sizes = self.least, range(num_prompt, num_prompt + wanted)
        return max(1, bisect_right(sizes, budget, key=lambda tokens: self.num_bytes(least, tokens)))

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


class RequestRouter(FixedRouter):
    """What the request in prefill gets: a plan that is known, or the choice of another router.

    Args:
        depths: of the server.
        router: for requests with an adaptive plan; None where there are none.

    Raises:
        DepthKVError: a router that could choose a leader that the server has not.
    """

    def __init__(self, depths: Depths, router: Router | None) -> None:
        super().__init__(depths.top, depths.ladder)
        if router is not None and len(set(depths.top)) < len(depths.top):
            raise DepthKVError(
                f"expected a largest retention above the plan's with a router, got {depths.max_retention:g}"
            )
        self.router = router
        self.choose(depths.top)

    def choose(self, sources: Sources | None) -> None:
        """For the next prompt; None lets the other router choose."""
        self._known = sources
        self._active = self.router if sources is None else None
        self.needs_kv = self._active is not None and self._active.needs_kv

    def start(self, prompt: Prompt) -> Sources | None:  # type: ignore[override]
        return self._known if self._active is None else self._active.start(prompt)

    def source(self, layer: int, prompt: Prompt, own: Pair | None) -> int:
        if self._active is not None:
            return self._active.source(layer, prompt, own)
        assert self._known is not None
        return self._known[layer]

    def check(self, kinds: Sequence[LayerKind], hidden_size: int) -> None:
        super().check(kinds, hidden_size)
        if self.router is not None:
            self.router.check(kinds, hidden_size)

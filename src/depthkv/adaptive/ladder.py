"""The order in which a sequence gives up leaders, one at a time, from any map that it has."""

from __future__ import annotations

from collections.abc import Sequence

from depthkv.architectures import LayerKind
from depthkv.errors import PlanError
from depthkv.plan import SharingPlan
from depthkv.sharing import check_plan

Sources = tuple[int, ...]
"""Entry l is the layer whose keys and values layer l reads."""


class Ladder:
    """From a map to the next smaller one, down to the first layer of each kind.

    A sequence on one of the nested `plans` goes to the next of them. Any other map gives up the first layer of `order`
    that leads in it, and then the leader whose readers have the shortest way to the one below it, each weighed by what
    it frees; the readers go on with the nearest leader that remains.

    Args:
        kinds: one for each layer.
        order: layers, the least valuable first, as the planner writes it into `provenance["order"]`.
        plans: nested, each with one leader fewer than the one before.

    Raises:
        PlanError: plans that are not nested or do not fit, or an order that names other layers.
    """

    def __init__(
        self, kinds: Sequence[LayerKind], order: Sequence[int] = (), plans: Sequence[SharingPlan] = ()
    ) -> None:
        self.kinds = tuple(kinds)
        self.order = tuple(order)
        self.plans = tuple(plans)
        for plan in self.plans:
            check_plan(plan, self.kinds)
        for larger, smaller in zip(self.plans, self.plans[1:], strict=False):
            if not set(smaller.leaders) < set(larger.leaders):
                raise PlanError(f"expected nested plans, got leaders {smaller.leaders} after {larger.leaders}")
        layers = all(isinstance(i, int) and not isinstance(i, bool) for i in self.order)
        if not layers or len({i for i in self.order if 0 <= i < len(self.kinds)}) != len(self.order):
            raise PlanError(f"expected an order of layers from 0 to {len(self.kinds) - 1}, got {list(self.order)}")
        self.required = frozenset(self.kinds.index(kind) for kind in set(self.kinds))
        """The first layer of each kind always leads."""
        self._next = {
            larger.kv_source_layers: smaller.kv_source_layers
            for larger, smaller in zip(self.plans, self.plans[1:], strict=False)
        }

    @classmethod
    def of(cls, plan: SharingPlan, kinds: Sequence[LayerKind]) -> Ladder:
        """The ladder below a plan: what the planner wrote into its provenance, or else the rule for any map."""
        written = plan.provenance.get("nested", [])
        order = plan.provenance.get("order", [])
        if not isinstance(written, list) or not isinstance(order, list):
            raise PlanError("expected lists of nested plans and of layers in the plan's provenance, got something else")
        return cls(kinds, order, [plan, *(SharingPlan(sources) for sources in written)] if written else ())

    def smaller(self, sources: Sources) -> Sources | None:
        """The map with one leader fewer; None where none can be given up."""
        if (known := self._next.get(sources)) is not None:
            return known
        leaders = [layer for layer, source in enumerate(sources) if source == layer]
        removable = [layer for layer in leaders if layer not in self.required]
        if not removable:
            return None
        ranked = [layer for layer in self.order if layer in removable]
        out = ranked[0] if ranked else min(removable, key=lambda layer: (self._price(sources, leaders, layer), -layer))
        return self._without(sources, out)

    def smallest(self, sources: Sources) -> Sources:
        """The last map on the way down."""
        while (below := self.smaller(sources)) is not None:
            sources = below
        return sources

    def _nearest(self, leaders: Sequence[int], layer: int, out: int) -> int:
        return max(i for i in leaders if i < layer and i != out and self.kinds[i] == self.kinds[layer])

    def _price(self, sources: Sources, leaders: Sequence[int], out: int) -> float:
        readers = [layer for layer, source in enumerate(sources) if source == out]
        freed = self.kinds[out].kv_heads * self.kinds[out].head_dim
        return sum(out - self._nearest(leaders, layer, out) for layer in readers) / freed

    def _without(self, sources: Sources, out: int) -> Sources:
        leaders = [layer for layer, source in enumerate(sources) if source == layer]
        return tuple(self._nearest(leaders, i, out) if source == out else source for i, source in enumerate(sources))


def nearest_sources(leaders: Sequence[int], kinds: Sequence[LayerKind]) -> Sources:
    """The map in which every other layer reads the nearest leader of its kind below it."""
    return SharingPlan.from_leaders(leaders, len(kinds), kinds).kv_source_layers

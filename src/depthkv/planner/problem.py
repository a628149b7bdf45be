"""What a plan must obey: a budget, layers that must lead, pipeline stages; and what it is judged by."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from depthkv.architectures import layer_kinds
from depthkv.errors import PlanError
from depthkv.memory import format_bytes, kv_bytes_per_layer, layer_cache_bytes
from depthkv.plan import SharingPlan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the leaders may cost. Both limits hold where both are given."""

    leader_bytes: tuple[int, ...]
    """What each layer's own cache takes: of one token, or of a whole context, see `max_bytes`."""
    max_bytes: int | None = None
    """Most bytes of all leaders together, in the unit of `leader_bytes`."""
    max_leaders: tuple[tuple[Hashable, int], ...] = ()
    """Pairs of a kind of layers and how many of them may lead; kinds that are not named may all lead."""
    even_leaders: tuple[int, ...] = ()
    """Where the budget is a retention: the evenly spaced leaders whose bytes it is."""
    words: str = ""
    """For people: "half of the layers"."""

    @classmethod
    def of_retention(cls, retention: float, config: PreTrainedConfig, dtype: torch.dtype) -> Budget:
        """As many leaders of each kind as `SharingPlan.for_retention` keeps: every kind's cache shrinks alike, so the
        bytes are at most that plan's at any context."""
        kinds = layer_kinds(config)
        even = SharingPlan.for_retention(retention, kinds)
        counts = {kind: sum(1 for leader in even.leaders if kinds[leader] == kind) for kind in kinds}
        return cls(
            leader_bytes=tuple(kv_bytes_per_layer(kind, dtype) for kind in kinds),
            max_leaders=tuple(counts.items()),
            even_leaders=even.leaders,
            words=f"{len(even.leaders)} of {len(kinds)} layers",
        )

    @classmethod
    def of_bytes(
        cls, limit: int, config: PreTrainedConfig, dtype: torch.dtype, *, context: int, batch: int = 1
    ) -> Budget:
        """At most `limit` bytes for `batch` sequences of `context` tokens. A sliding layer costs its window only."""
        kinds = layer_kinds(config)
        sequences = "1 sequence" if batch == 1 else f"{batch} sequences"
        of = "per token" if context == batch == 1 else f"for {sequences} of {context:,} tokens"
        return cls(
            leader_bytes=tuple(batch * layer_cache_bytes(kind, dtype, context) for kind in kinds),
            max_bytes=limit,
            words=f"{format_bytes(limit)} {of} in {str(dtype).removeprefix('torch.')}",
        )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Which plans are allowed, and what they are judged by: their loss, and `prefill_weight`.

    Raises:
        PlanError: layers that do not exist, or no plan can be allowed.
    """

    kinds: tuple[Hashable, ...]
    """Of each layer; a layer reads its own kind."""
    budget: Budget
    keep: frozenset[int] = frozenset()
    """Layers that must lead."""
    stages: tuple[int, ...] = (0,)
    """First layer of each pipeline stage: a source must lie in its reader's stage."""
    prefill_weight: float = 0.0
    """Nats that running all layers for the whole prompt counts as. Prefill ends at the last leader: with 0.2, halving
    the prompt's work is worth a loss 0.1 higher."""
    any_source: bool = True
    """A follower may read any earlier leader, otherwise the nearest one alone."""

    def __post_init__(self) -> None:
        size = len(self.kinds)
        if len(self.budget.leader_bytes) != size:
            raise PlanError(f"expected a budget for {size} layers, got one for {len(self.budget.leader_bytes)}")
        for layer in sorted(self.keep):
            if not 0 <= layer < size:
                raise PlanError(f"expected layers to keep between 0 and {size - 1}, got {layer}")
        if not self.stages or self.stages[0] != 0 or list(self.stages) != sorted(set(self.stages)):
            raise PlanError(f"expected pipeline stages to start at 0 and to ascend, got {list(self.stages)}")
        if self.stages[-1] >= size:
            raise PlanError(f"expected pipeline stages to start below layer {size}, got {self.stages[-1]}")
        if not self.prefill_weight >= 0:
            raise PlanError(f"expected a prefill weight of at least 0, got {self.prefill_weight}")
        if not self.affords(self.required):
            short = ""
            if self.budget.max_bytes is not None:
                short = f", where they take {format_bytes(self.bytes(self.required))}"
            raise PlanError(
                f"expected a budget for the {len(self.required)} layers that must lead ({_listed(self.required)}), got "
                f"one of {self.budget.words}{short}"
            )

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.kinds)

    @property
    def words(self) -> str:
        """Budget and constraints, for people."""
        said = [self.budget.words]
        if self.keep:
            said.append(f"layers {_listed(sorted(self.keep))} lead")
        if len(self.stages) > 1:
            said.append(f"pipeline stages begin at {_listed(self.stages)}")
        if self.prefill_weight:
            said.append(f"prefill weight {self.prefill_weight:g}")
        if not self.any_source:
            said.append("nearest source")
        return "; ".join(said)

    @cached_property
    def members(self) -> dict[Hashable, list[int]]:
        """Layers of each kind, ascending; kinds in the order of their first layers."""
        found: dict[Hashable, list[int]] = {}
        for layer, kind in enumerate(self.kinds):
            found.setdefault(kind, []).append(layer)
        return found

    @cached_property
    def required(self) -> tuple[int, ...]:
        """Layers that lead in every allowed plan: the first of each kind in each stage, and `keep`."""
        seen: set[Hashable] = set()
        first = []
        for layer, kind in enumerate(self.kinds):
            place = (kind, self.stage(layer))
            if place not in seen:
                first.append(layer)
            seen.add(place)
        return tuple(sorted({*first, *self.keep}))

    def stage(self, layer: int) -> int:
        """Number of the layer's pipeline stage."""
        return sum(1 for start in self.stages if start <= layer) - 1

    def may_read(self, layer: int, source: int) -> bool:
        """Whether a layer may read an earlier one that leads."""
        return self.kinds[layer] == self.kinds[source] and self.stage(layer) == self.stage(source)

    def bytes(self, leaders: Iterable[int]) -> int:
        """What these leaders cost, in the budget's unit."""
        return sum(self.budget.leader_bytes[layer] for layer in leaders)

    def affords(self, leaders: Iterable[int]) -> bool:
        """Whether the budget is enough for them."""
        chosen = list(leaders)
        if self.budget.max_bytes is not None and self.bytes(chosen) > self.budget.max_bytes:
            return False
        return all(
            sum(1 for layer in chosen if self.kinds[layer] == kind) <= most for kind, most in self.budget.max_leaders
        )

    def allows(self, plan: SharingPlan) -> bool:
        """Whether a plan obeys everything."""
        if plan.num_layers != self.num_layers or not self.affords(plan.leaders):
            return False
        sources = plan.kv_source_layers
        if not set(self.required) <= set(plan.leaders):
            return False
        if not all(self.may_read(layer, source) for layer, source in enumerate(sources)):
            return False
        return self.any_source or sources == self.nearest(plan.leaders).kv_source_layers

    def nearest(self, leaders: Iterable[int]) -> SharingPlan:
        """Followers read the nearest leader below them; it is in their stage, whose first layer of each kind leads."""
        return SharingPlan.from_leaders(leaders, self.num_layers, self.kinds)

    def assign(self, leaders: Iterable[int], cost: torch.Tensor) -> SharingPlan:
        """The best plan with these leaders: the nearest ones, or with `any_source` the cheapest for each follower."""
        kept = set(leaders)
        if not self.any_source:
            return self.nearest(kept)
        rows = cost.tolist()
        sources = []
        for layer in range(self.num_layers):
            choices = [j for j in range(layer) if j in kept and self.may_read(layer, j)]
            # of equal costs the nearest
            sources.append(layer if layer in kept else min(choices, key=lambda j: (rows[layer][j], -j)))
        return SharingPlan(sources)

    def prefill_cost(self, leaders: Iterable[int]) -> float:
        """`prefill_weight` times the share of the layers that run for the whole prompt."""
        return self.prefill_weight * (max(leaders) + 1) / self.num_layers

    def predicted(self, plan: SharingPlan, cost: torch.Tensor) -> float:
        """Sum over the followers of `cost[layer, source]`: the loss increase if costs add up."""
        readers = list(plan.followers)
        return float(cost[readers, [plan.kv_source_layers[i] for i in readers]].sum()) if readers else 0.0

    def objective(self, plan: SharingPlan, loss: float) -> float:
        """What plans are ranked by: a loss or its increase, and what prefill costs."""
        return loss + self.prefill_cost(plan.leaders)


def stage_starts(text: str, num_layers: int) -> tuple[int, ...]:
    """First layers of pipeline stages: from their number ("4": sizes that differ by one layer at most), or from the
    layers of each ("8,8,7,7").

    Raises:
        PlanError: stages that do not make up the model.
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise PlanError(
            f"expected pipeline stages as a number or as layers of each, such as 8,8,7,7, got {text!r}"
        ) from None
    if len(sizes) == 1:
        if not 1 <= sizes[0] <= num_layers:
            raise PlanError(f"expected from 1 to {num_layers} pipeline stages, got {sizes[0]}")
        return tuple(i * num_layers // sizes[0] for i in range(sizes[0]))
    if min(sizes) < 1 or sum(sizes) != num_layers:
        raise PlanError(f"expected pipeline stages of {num_layers} layers together, got {text}: {sum(sizes)}")
    return tuple(accumulate(sizes[:-1], initial=0))


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))

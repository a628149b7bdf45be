"""Further samplers beside `RandomCrossLayer`: the paper's baselines, the distribution that serving sees, mixtures.

Each is one small class whose docstring states its distribution. All are pure functions of their fields and the step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from depthkv.errors import DepthKVError
from depthkv.plan import SharingPlan
from depthkv.routing import RandomCrossLayer, Sampler, step_rng

__all__ = [
    "SAMPLERS",
    "SERVED",
    "CrossLayerAttention",
    "FullCache",
    "LeaderSubset",
    "Mixture",
    "PerSequence",
    "PlanWeighted",
    "RandomGroupAttention",
    "ScheduledCrossLayer",
    "default_sampler",
    "independent",
    "parse_sampler",
]


@dataclass(frozen=True, kw_only=True)
class FullCache:
    """Every layer reads its own KV: ordinary fine-tuning, the paper's "Base". One map with probability 1."""

    def draw(self, step: int, kinds: Sequence[Hashable]) -> list[int]:
        """See `Sampler.draw`."""
        return list(range(len(kinds)))


@dataclass(frozen=True, kw_only=True)
class CrossLayerAttention:
    """CLA@k (arXiv:2405.12981): fixed groups of `group_size` layers read the first of their group.

    Distribution: one map with probability 1. Groups are counted within each kind of layer.
    """

    group_size: int = 2

    def __post_init__(self) -> None:
        _whole("group_size", self.group_size)

    def draw(self, step: int, kinds: Sequence[Hashable]) -> list[int]:
        """See `Sampler.draw`."""
        return list(SharingPlan.every(self.group_size, len(kinds), kinds).kv_source_layers)


@dataclass(frozen=True, kw_only=True)
class RandomGroupAttention:
    """RD-CLA@k (arXiv:2604.22782): CLA@k's groups, but each layer flips a coin in each step.

    Distribution: independently for each layer, the first layer of its group with probability `cross_layer_prob`,
    otherwise its own.
    """

    group_size: int = 2
    cross_layer_prob: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        _whole("group_size", self.group_size)
        _probability("cross_layer_prob", self.cross_layer_prob)

    def draw(self, step: int, kinds: Sequence[Hashable]) -> list[int]:
        """See `Sampler.draw`."""
        rng = step_rng(self.seed, step)
        grouped = CrossLayerAttention(group_size=self.group_size).draw(step, kinds)
        return [source if rng.random() < self.cross_layer_prob else i for i, source in enumerate(grouped)]


@dataclass(frozen=True, kw_only=True)
class LeaderSubset:
    """What serving does: some layers lead, each other one reads the nearest leader below it.

    Distribution: a retention r, uniform over `retentions`; then with probability `even_prob` the leaders of
    `SharingPlan.for_retention(r, kinds)`, otherwise, of the layers that are not the first of their kind, a uniform
    subset so large that round(r * layers) lead (the first of each kind always does).
    """

    retentions: tuple[float, ...] = (1.0, 0.7, 0.5, 0.4, 0.33, 0.25)
    even_prob: float = 0.0
    """0 trains for any set of leaders alike, 1 for the evenly spaced ones only."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.retentions:
            raise DepthKVError("expected at least one retention, got none")
        for retention in self.retentions:
            _probability("retention", retention)
        _probability("even_prob", self.even_prob)

    def draw(self, step: int, kinds: Sequence[Hashable]) -> list[int]:
        """See `Sampler.draw`."""
        rng = step_rng(self.seed, step)
        retention = rng.choice(self.retentions)
        if rng.random() < self.even_prob:
            return list(SharingPlan.for_retention(retention, kinds).kv_source_layers)
        first = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
        others = [layer for layer, kind in enumerate(kinds) if first[kind] != layer]
        wanted = max(0, round(retention * len(kinds)) - len(first))
        leaders = set(first.values()) | set(rng.sample(others, min(wanted, len(others))))
        nearest: dict[Hashable, int] = {}
        sources = []
        for layer, kind in enumerate(kinds):
            if layer in leaders:
                nearest[kind] = layer
            sources.append(nearest[kind])
        return sources


@dataclass(frozen=True, kw_only=True)
class PlanWeighted:
    """A plan that is known already, and randomness around it that keeps the other plans usable.

    Distribution: with probability `plan_prob` the plan's own map, otherwise R-CLA with `cross_layer_prob`.
    """

    plan: SharingPlan
    plan_prob: float = 0.5
    cross_layer_prob: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        _probability("plan_prob", self.plan_prob)
        _probability("cross_layer_prob", self.cross_layer_prob)

    def draw(self, step: int, kinds: Sequence[Hashable]) -> list[int]:
        """See `Sampler.draw`."""
        if self.plan.num_layers != len(kinds):
            raise DepthKVError(f"expected a plan for {len(kinds)} layers, got one for {self.plan.num_layers}")
        # another stream than the map's: a coin from the same one would bias the map's first layer
        if step_rng(self.seed, ~step).random() < self.plan_prob:
            return list(self.plan.kv_source_layers)
        return RandomCrossLayer(cross_layer_prob=self.cross_layer_prob, seed=self.seed).draw(step, kinds)


@dataclass(frozen=True, kw_only=True)
class ScheduledCrossLayer:
    """R-CLA whose `cross_layer_prob` goes in a straight line from `start` to `end` over `num_steps`, then stays.

    Distribution in step s: R-CLA with probability `start + (end - start) * min(1, s / num_steps)`.
    """

    start: float
    end: float
    num_steps: int
    """Forwards of the model, not optimizer steps."""
    seed: int = 0

    def __post_init__(self) -> None:
        _probability("start", self.start)
        _probability("end", self.end)
        _whole("num_steps", self.num_steps)

    def draw(self, step: int, kinds: Sequence[Hashable]) -> list[int]:
        """See `Sampler.draw`."""
        probability = self.start + (self.end - self.start) * min(1.0, step / self.num_steps)
        return RandomCrossLayer(cross_layer_prob=probability, seed=self.seed).draw(step, kinds)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """One of several samplers in each step. Distribution: sampler i with probability `weights[i] / sum(weights)`."""

    samplers: tuple[Sampler, ...]
    weights: tuple[float, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.samplers or len(self.samplers) != len(self.weights):
            raise DepthKVError(f"expected one weight per sampler, got {len(self.weights)} for {len(self.samplers)}")
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise DepthKVError(f"expected weights of at least 0, one above, got {self.weights}")

    def draw(self, step: int, kinds: Sequence[Hashable]) -> list[int]:
        """See `Sampler.draw`."""
        (chosen,) = step_rng(self.seed, ~step).choices(self.samplers, self.weights)
        return chosen.draw(step, kinds)


@dataclass(frozen=True, kw_only=True)
class PerSequence:
    """A map of its own for each sequence of a batch, instead of one for all: less noisy gradients, more KV computed.

    Distribution: sequence b of step s gets what `sampler` draws in step `s * 2**20 + b`, so sequences are independent.
    """

    sampler: Sampler

    def draw(self, step: int, kinds: Sequence[Hashable]) -> list[int]:
        """The first sequence's map."""
        return self.draw_batch(step, kinds, 1)[0]

    def draw_batch(self, step: int, kinds: Sequence[Hashable], batch_size: int) -> list[list[int]]:
        """One map per sequence."""
        return [self.sampler.draw((step << 20) + row, kinds) for row in range(batch_size)]


def independent(sampler: Sampler, rank: int) -> Sampler:
    """The same distribution from a stream of its own, for ranks that shall not draw what rank 0 draws."""
    if rank == 0:
        return sampler
    changes: dict[str, Any] = {}
    fields = getattr(sampler, "__dataclass_fields__", {})
    for name in fields:
        value = getattr(sampler, name)
        if name == "seed":
            changes[name] = step_rng(value, -1 - rank).getrandbits(62)
        elif name == "sampler":
            changes[name] = independent(value, rank)
        elif name == "samplers":
            changes[name] = tuple(independent(part, rank) for part in value)
    if not fields or (not changes and not isinstance(sampler, (FullCache, CrossLayerAttention))):
        raise DepthKVError(f"expected a sampler with a field `seed` for independent maps, got {sampler!r}")
    return replace(sampler, **changes) if changes else sampler  # type: ignore[type-var]


SERVED = (1.0, 0.5, 1 / 3, 0.25)
"""Retentions of every k-th layer, k from 1 to 4."""


def default_sampler(seed: int = 0, *, for_adapter: bool = False) -> LeaderSubset:
    """What recovered most per training token (docs/results.md): served retentions, half of the sets evenly spaced.

    Args:
        seed: of the draws.
        for_adapter: leave out retention 1, in which an adapter of sharing is off.
    """
    return LeaderSubset(retentions=SERVED[1:] if for_adapter else SERVED, even_prob=0.5, seed=seed)


def parse_sampler(
    text: str, *, cross_layer_prob: float = 0.5, seed: int = 0, plan: SharingPlan | None = None
) -> Sampler:
    """The sampler that a word on the command line names, such as "r-cla", "cla:2" or "r-cla+leader-subset".

    Args:
        text: a key of `SAMPLERS`; ":K" sets the size of groups; "+" mixes two or more evenly; a leading "per-sequence:"
            draws a map for each sequence.
        cross_layer_prob: for the samplers that have one.
        seed: for the samplers that have one.
        plan: for "plan".

    Raises:
        DepthKVError: an unknown name; the error lists the choices.
    """
    if text.startswith("per-sequence:"):
        inner = parse_sampler(
            text.removeprefix("per-sequence:"), cross_layer_prob=cross_layer_prob, seed=seed, plan=plan
        )
        return PerSequence(sampler=inner)
    if "+" in text:
        parts = [
            parse_sampler(part, cross_layer_prob=cross_layer_prob, seed=seed, plan=plan) for part in text.split("+")
        ]
        return Mixture(samplers=tuple(parts), weights=(1.0,) * len(parts), seed=seed)
    name, _, size = text.partition(":")
    if name not in SAMPLERS or (size and name not in ("cla", "rd-cla")):
        raise DepthKVError(f"expected a sampler among {', '.join(SAMPLERS)}, got {text!r}")
    if name == "plan" and plan is None:
        raise DepthKVError('expected a plan for the sampler "plan", got none')
    if size and not size.isdigit():
        raise DepthKVError(f"expected a whole number after {name}:, got {size!r}")
    group = {"group_size": int(size)} if size else {}
    return SAMPLERS[name]({"cross_layer_prob": cross_layer_prob, "seed": seed, "plan": plan, **group})


def _make(kind: Any) -> Callable[[dict[str, Any]], Sampler]:
    names = set(kind.__dataclass_fields__)
    return lambda values: kind(**{name: value for name, value in values.items() if name in names})


SAMPLERS: Mapping[str, Callable[[dict[str, Any]], Sampler]] = {
    "r-cla": _make(RandomCrossLayer),
    "leader-subset": _make(LeaderSubset),
    "even": lambda values: default_sampler(values["seed"]),
    "cla": _make(CrossLayerAttention),
    "rd-cla": _make(RandomGroupAttention),
    "plan": _make(PlanWeighted),
    "none": _make(FullCache),
}
"""What `parse_sampler` knows."""


def _probability(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise DepthKVError(f"expected {name} between 0 and 1, got {value!r}")


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DepthKVError(f"expected {name} of at least 1, got {value!r}")

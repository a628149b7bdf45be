"""What a plan's loss will be, from the costs of single pairs and from plans that were measured.

Costs of pairs, each measured with all other layers on their own keys and values, seldom add up to a plan's. The model
keeps the sum over pairs, which planning needs, and corrects its terms: a Gaussian process whose prior mean is the
measured cost and whose errors are shared by pairs of the same reader and by pairs as far apart. For an adapter that was
never trained with the full cache, the sum of measured costs does not even rank plans (docs/results.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from depthkv.plan import SharingPlan

_FACTORS = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Tried for each scale, relative to the spread of the losses for each follower."""
_NOISE_FACTORS = (0.02, 0.06, 0.2)
"""Tried for what no sum over pairs explains, relative to the spread of the losses."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A plan and its loss increase over the full cache, nats."""

    plan: SharingPlan
    increase: float


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Standard deviations of the errors of the prior, nats."""

    pair: float
    """Of one reader of one source."""
    reader: float
    """Common to all sources of a reader."""
    distance: float
    """Common to all pairs as many layers apart."""
    noise: float
    """Of a plan's loss, around the sum over its pairs."""


class CostModel:
    """Costs corrected by measured plans.

    Args:
        cost: measured alone, `[layers, layers]`; inf where a layer must not read.
        measured: at least one plan.
        scales: of the prior; None chooses those under which the measured plans are likeliest.
    """

    def __init__(self, cost: torch.Tensor, measured: Sequence[Measured], scales: Scales | None = None) -> None:
        self.measured = tuple(measured)
        self._cost = cost
        self._size = len(cost)
        target = torch.tensor([entry.increase for entry in measured], dtype=torch.float64)
        self._pairs = torch.stack([_pairs(entry.plan, self._size) for entry in measured])  # [plans, layers, layers]
        self._readers = self._pairs.sum(dim=2)
        self._distances = _by_distance(self._pairs)
        finite = torch.where(cost.isfinite(), cost, torch.zeros_like(cost))
        sums = self._predict(finite)
        # costs of many followers add up to a share of their sum, or to nothing
        scale = max(0.0, float((sums @ target) / (sums @ sums).clamp(min=1e-12)))
        self._prior = scale * finite
        self._residual = target - self._predict(self._prior)
        self._grams = [m.flatten(1) @ m.flatten(1).T for m in (self._pairs, self._readers, self._distances)]
        spread = float(target.std()) if len(target) > 2 else float(target.abs().mean())
        self._offset_scale = 10 * float(target.abs().max()) + 1e-3
        self.scales = scales or self._likeliest(max(spread, 1e-4))
        self._factor = self._factored(self.scales)
        self._weights = torch.cholesky_solve(self._residual[:, None], self._factor)[:, 0]
        self._mean = self._table(self._prior + self._correction(self._weights))

    def cost(self) -> torch.Tensor:
        """The most likely costs, `[layers, layers]`; inf where a layer must not read, 0 on the diagonal."""
        return self._mean.clone()

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        """Costs that the measured plans allow for, drawn from the posterior (Matheron's rule)."""
        size, scales = self._size, self.scales

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        error = scales.pair * normal(size, size) + scales.reader * normal(size, 1)
        error = error + _spread_distance(scales.distance * normal(size))
        rest = self._offset_scale * normal(1) + scales.noise * normal(len(self._residual))
        apart = (self._residual - self._predict(error) - rest)[:, None]
        weights = torch.cholesky_solve(apart, self._factor)[:, 0]
        return self._table(self._prior + error + self._correction(weights))

    def predicted(self, plan: SharingPlan) -> float:
        """The likely loss increase of a plan, nats."""
        offset = self._offset_scale**2 * float(self._weights.sum())
        return offset + float((_pairs(plan, self._size) * self._mean.nan_to_num(posinf=0.0)).sum())

    def _predict(self, cost: torch.Tensor) -> torch.Tensor:
        """Of each measured plan, without the offset."""
        return (self._pairs * cost).sum(dim=(1, 2))

    def _correction(self, weights: torch.Tensor) -> torch.Tensor:
        """The prior covariance of all pairs with the measured plans, times weights `[plans]`."""
        scales = self.scales
        own = torch.einsum("p,pij->ij", weights, self._pairs)
        found = scales.pair**2 * own + scales.reader**2 * (weights @ self._readers)[:, None]
        return found + _spread_distance(scales.distance**2 * (weights @ self._distances))

    def _likeliest(self, spread: float) -> Scales:
        """Coordinate ascent of the marginal likelihood over a grid."""
        unit = spread / math.sqrt(max(1.0, float(self._readers.sum(dim=1).mean())))
        noises = [factor * spread for factor in _NOISE_FACTORS]
        values = {"pair": [0.0], "reader": [0.0], "distance": [0.0], "noise": noises}
        for name in ("pair", "reader", "distance"):
            values[name] += [factor * unit for factor in _FACTORS]
        best = {"pair": unit, "reader": unit, "distance": unit, "noise": noises[1]}
        for _ in range(2):
            for name, choices in values.items():
                best[name] = max(choices, key=lambda value: self._likelihood(Scales(**{**best, name: value})))
        return Scales(**best)

    def _likelihood(self, scales: Scales) -> float:
        factor = self._factored(scales)
        solved = torch.cholesky_solve(self._residual[:, None], factor)[:, 0]
        return float(-0.5 * self._residual @ solved - factor.diagonal().log().sum())

    def _factored(self, scales: Scales) -> torch.Tensor:
        parts = zip((scales.pair, scales.reader, scales.distance), self._grams, strict=True)
        gram = self._offset_scale**2 + torch.stack([scale**2 * gram for scale, gram in parts]).sum(dim=0)
        diagonal = scales.noise**2 + 1e-10 * float(gram.diagonal().max())
        factor: torch.Tensor = torch.linalg.cholesky(gram + diagonal * torch.eye(len(gram), dtype=torch.float64))
        return factor

    def _table(self, costs: torch.Tensor) -> torch.Tensor:
        table: torch.Tensor = torch.where(self._cost.isfinite(), costs, self._cost).fill_diagonal_(0.0)
        return table


def _pairs(plan: SharingPlan, size: int) -> torch.Tensor:
    """1 for each follower and its source, `[layers, layers]`."""
    found = torch.zeros(size, size, dtype=torch.float64)
    readers = list(plan.followers)
    found[readers, [plan.kv_source_layers[i] for i in readers]] = 1.0
    return found


def _by_distance(pairs: torch.Tensor) -> torch.Tensor:
    """Sums over the pairs as many layers apart: from `[n, layers, layers]` to `[n, layers]`."""
    size = pairs.shape[-1]
    return torch.stack([pairs.diagonal(-apart, dim1=1, dim2=2).sum(-1) for apart in range(size)], dim=1)


def _spread_distance(values: torch.Tensor) -> torch.Tensor:
    """`[layers]` by distance to `[layers, layers]`."""
    size = len(values)
    layers = torch.arange(size)
    return values[(layers[:, None] - layers[None, :]).clamp(min=0)]

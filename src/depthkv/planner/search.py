"""Search with measured losses, where costs do not add up.

Each measured plan says how far the sum of its pairs' costs is off. A Gaussian model of the costs, whose prior is the
measured cost of each pair alone, is corrected by all plans measured so far; the exact planner solves a sample from it
(Thompson sampling), and what it proposes is measured next. So a proposal may differ from the best plan in any number of
layers, and pairs that interact badly are found out after a few. Half of the proposals are neighbours of the best plan.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from depthkv.errors import PlanError
from depthkv.plan import SharingPlan
from depthkv.planner.exact import exact_plan
from depthkv.planner.problem import Problem

NOISE = 0.01
"""Standard deviation of what the model cannot explain, as a share of the plans' mean loss increase."""

_SHARED_SHARES = (0.0, 0.5, 0.9)
"""Tried for the prior: how much of a pair's error is its reader's, whatever it reads."""
_WIDTHS = (0.1, 0.3, 1.0)
"""Tried for the prior: standard deviation of a pair's error, as a share of its cost."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A plan and its loss increase over the full cache, nats."""

    plan: SharingPlan
    increase: float


class CostModel:
    """Additive costs, corrected by measured plans: a linear Gaussian model of the loss increase.

    Args:
        cost: measured alone, `[layers, layers]`; inf where a layer must not read.
        measured: at least one plan.
    """

    def __init__(self, cost: torch.Tensor, measured: Sequence[Measured]) -> None:
        self.size = len(cost)
        self.shape = cost
        finite = torch.where(cost.isfinite(), cost, torch.zeros_like(cost))
        self.features = torch.stack([_features(entry.plan, self.size) for entry in measured])
        target = torch.tensor([entry.increase for entry in measured], dtype=torch.float64)
        sums = self.features @ finite.flatten()
        # costs of many followers rarely add up to their sum, but mostly to a share of it
        self.scale = max(0.05, float((sums @ target) / (sums @ sums).clamp(min=1e-12)))
        self.mean = self.scale * finite.flatten()
        magnitude = self.mean.abs()
        self.magnitude = magnitude + 0.1 * magnitude[magnitude > 0].mean().nan_to_num(1e-3)
        self.noise = max(NOISE * float(target.abs().mean()), 1e-6)
        self.residual = target - self.features @ self.mean
        best = -math.inf
        for width in _WIDTHS:
            for shared in _SHARED_SHARES:
                covariance = self._times(self.features.T, width, shared)  # [pairs, plans]
                gram = self.features @ covariance + self.noise**2 * torch.eye(len(target), dtype=torch.float64)
                factor = torch.linalg.cholesky(gram)
                solved = torch.cholesky_solve(self.residual[:, None], factor)[:, 0]
                likelihood = float(-0.5 * self.residual @ solved - factor.diagonal().log().sum())
                if likelihood > best:
                    best, self.width, self.shared = likelihood, width, shared
                    self.covariance, self.factor, self.solved = covariance, factor, solved

    def _times(self, columns: torch.Tensor, width: float, shared: float) -> torch.Tensor:
        """The prior covariance of the pairs' errors, times columns `[pairs, n]`."""
        scaled = self.magnitude[:, None] * columns
        by_reader = scaled.view(self.size, self.size, -1).sum(dim=1, keepdim=True).expand(-1, self.size, -1)
        mixed = (1 - shared) * scaled + shared * by_reader.reshape(scaled.shape)
        return width**2 * self.magnitude[:, None] * mixed

    def corrected(self) -> torch.Tensor:
        """The most likely costs, `[layers, layers]`; inf where a layer must not read, 0 on the diagonal."""
        return self._table(self.mean + self.covariance @ self.solved)

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        """Costs that the measured plans allow for, drawn from the posterior (Matheron's rule)."""
        own = torch.randn(self.size * self.size, generator=generator, dtype=torch.float64)
        common = torch.randn(self.size, 1, generator=generator, dtype=torch.float64).expand(-1, self.size).flatten()
        error = self.width * self.magnitude * (math.sqrt(1 - self.shared) * own + math.sqrt(self.shared) * common)
        noise = self.noise * torch.randn(len(self.residual), generator=generator, dtype=torch.float64)
        apart = (self.residual - self.features @ error - noise)[:, None]
        return self._table(self.mean + error + self.covariance @ torch.cholesky_solve(apart, self.factor)[:, 0])

    def predicted(self, plan: SharingPlan) -> float:
        """The likely loss increase of a plan."""
        return float((_features(plan, self.size) @ (self.mean + self.covariance @ self.solved)).sum())

    def _table(self, flat: torch.Tensor) -> torch.Tensor:
        table = torch.where(self.shape.isfinite(), flat.view(self.size, self.size), self.shape)
        return table.fill_diagonal_(0.0)


def _features(plan: SharingPlan, size: int) -> torch.Tensor:
    """1 for each pair of a follower and its source, `[layers x layers]`."""
    found = torch.zeros(size, size, dtype=torch.float64)
    readers = list(plan.followers)
    found[readers, [plan.kv_source_layers[i] for i in readers]] = 1.0
    return found.flatten()


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to."""

    plan: SharingPlan
    """The best of those that were measured."""
    measured: tuple[Measured, ...]
    """In the order measured, those of the start first."""
    cost: torch.Tensor
    """Corrected costs, `[layers, layers]`."""


def search(
    problem: Problem,
    cost: torch.Tensor,
    start: Sequence[SharingPlan],
    measure: Callable[[SharingPlan], float],
    *,
    evaluations: int,
    seed: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> Found:
    """The plan with the lowest measured objective.

    The same arguments and losses propose the same plans, so a search over losses that were kept goes on where it was.

    Args:
        problem: what plans must obey.
        cost: measured alone, `[layers, layers]`.
        start: plans to begin with, such as the exact plan and the evenly spaced ones; those not allowed are left out.
        measure: the loss increase of a plan over the full cache, nats.
        evaluations: how many plans to measure beyond those of the start.
        seed: of the proposals.
        advance: called with 1 after each measurement.

    Raises:
        PlanError: no plan to start with is allowed.
    """
    done: dict[tuple[int, ...], Measured] = {}

    def add(plan: SharingPlan) -> None:
        increase = measure(plan)
        if not math.isfinite(increase):
            raise PlanError(f"expected a finite loss, got {increase} for {plan}")
        done[plan.kv_source_layers] = Measured(plan=plan, increase=increase)
        advance(1)

    for plan in dict.fromkeys(start):
        if problem.allows(plan) and plan.kv_source_layers not in done:
            add(plan)
    if not done:
        raise PlanError("expected a plan to start with that obeys the budget, got none")
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    for turn in range(evaluations):
        model = CostModel(cost, list(done.values()))
        proposal = _propose(problem, model, done, turn, generator, rng)
        if proposal is None:  # every allowed plan near the best one is measured
            advance(evaluations - turn)
            break
        add(proposal)
    best = min(done.values(), key=lambda m: (problem.objective(m.plan, m.increase), m.plan.kv_source_layers))
    corrected = CostModel(cost, list(done.values())).corrected()
    return Found(plan=best.plan, measured=tuple(done.values()), cost=corrected)


def _propose(
    problem: Problem,
    model: CostModel,
    done: dict[tuple[int, ...], Measured],
    turn: int,
    generator: torch.Generator,
    rng: random.Random,
) -> SharingPlan | None:
    """A plan that is not measured yet: the best of a sampled model, or the likeliest neighbour of the best plans."""
    if turn % 2 == 0:
        for attempt in range(4):
            costs = model.corrected() if attempt == 0 else model.sample(generator)
            plan = exact_plan(problem, costs)
            plan = problem.assign(plan.leaders, costs) if problem.any_source else plan
            if plan.kv_source_layers not in done:
                return plan
    ranked = sorted(done.values(), key=lambda m: problem.objective(m.plan, m.increase))
    for best in ranked[:3]:
        near = [plan for plan in neighbours(problem, best.plan) if plan.kv_source_layers not in done]
        if near:
            # what a change is likely to bring, seen from the measured plan; a little luck lets others be tried
            return min(near, key=lambda p: problem.objective(p, model.predicted(p)) * (1 + 0.02 * rng.random()))
    return None


def neighbours(problem: Problem, plan: SharingPlan) -> Iterator[SharingPlan]:
    """Allowed plans that differ in one leader, moved elsewhere, or with `any_source` in one follower's source."""
    leaders, required = set(plan.leaders), set(problem.required)
    for out in sorted(leaders - required):
        for into in sorted(set(range(problem.num_layers)) - leaders):
            changed = leaders - {out} | {into}
            if not problem.affords(changed):
                continue
            yield problem.nearest(changed)
            if problem.any_source:
                yield _moved(problem, plan, changed)
    if problem.any_source:
        for follower in plan.followers:
            for source in plan.leaders:
                if (
                    source < follower
                    and source != plan.kv_source_layers[follower]
                    and problem.may_read(follower, source)
                ):
                    sources = list(plan.kv_source_layers)
                    sources[follower] = source
                    yield SharingPlan(sources)


def _moved(problem: Problem, plan: SharingPlan, leaders: set[int]) -> SharingPlan:
    """The plan's sources where they still lead, otherwise the nearest leader."""
    nearest = problem.nearest(leaders).kv_source_layers
    return SharingPlan(
        [i if i in leaders else s if s in leaders else nearest[i] for i, s in enumerate(plan.kv_source_layers)]
    )

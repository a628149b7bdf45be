"""Search with measured losses, where costs do not add up.

A model of the costs is corrected by all plans measured so far; the plan that is cheapest by it, or by a sample from it
(Thompson sampling), is measured next. So a proposal may differ from the best plan in any number of layers, and pairs
that interact badly are found out after a few. Every fourth proposal is a neighbour of the best plan.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from depthkv.errors import PlanError
from depthkv.plan import SharingPlan
from depthkv.planner.model import CostModel, Measured
from depthkv.planner.problem import Problem
from depthkv.planner.swaps import cheapest_plan

__all__ = ["Found", "search"]

_RANKED = 20
"""Of the best plans, those whose neighbours are tried."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to."""

    plan: SharingPlan
    """The best of those that were measured."""
    measured: tuple[Measured, ...]
    """In the order measured, those of the start first."""
    model: CostModel
    """Predicts plans that were not measured."""


def search(
    problem: Problem,
    cost: torch.Tensor,
    start: Sequence[SharingPlan],
    measure: Callable[[SharingPlan], float],
    *,
    evaluations: int,
    known: Sequence[Measured] = (),
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
        known: plans measured before, such as for another budget; they inform the model.
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
    others = [entry for entry in known if entry.plan.kv_source_layers not in done]
    model = CostModel(cost, [*others, *done.values()])
    for turn in range(evaluations):
        proposal = _propose(problem, model, done, turn, generator)
        if proposal is None:  # every allowed plan near the best one is measured
            advance(evaluations - turn)
            break
        add(proposal)
        # the scales settle early, and finding them is the slow part
        scales = model.scales if turn % 8 else None
        rest = [entry for entry in others if entry.plan.kv_source_layers not in done]
        model = CostModel(cost, [*rest, *done.values()], scales)
    best = min(done.values(), key=lambda m: (problem.objective(m.plan, m.increase), m.plan.kv_source_layers))
    return Found(plan=best.plan, measured=tuple(done.values()), model=model)


def _propose(
    problem: Problem,
    model: CostModel,
    done: dict[tuple[int, ...], Measured],
    turn: int,
    generator: torch.Generator,
) -> SharingPlan | None:
    """A plan that is not measured yet: the best by the model or by a sample of it, or a neighbour of the best plans."""
    corrected = model.cost()
    if turn % 4 != 3:
        first = [corrected] if turn % 2 == 0 else []
        if (plan := _solved(problem, done, itertools.chain(first, _samples(model, generator, 5)))) is not None:
            return plan
    ranked = sorted(done.values(), key=lambda m: problem.objective(m.plan, m.increase))
    for best in ranked[:_RANKED]:
        near = [plan for plan in neighbours(problem, best.plan) if plan.kv_source_layers not in done]
        if near:
            return min(near, key=lambda plan: problem.objective(plan, problem.predicted(plan, corrected)))
    return _solved(problem, done, _samples(model, generator, 20))


def _samples(model: CostModel, generator: torch.Generator, count: int) -> Iterator[torch.Tensor]:
    return (model.sample(generator) for _ in range(count))


def _solved(
    problem: Problem, done: Mapping[tuple[int, ...], Measured], costs: Iterable[torch.Tensor]
) -> SharingPlan | None:
    """The best plan under the first of some costs whose best plan is not measured yet."""
    for cost in costs:
        plan = cheapest_plan(problem, cost)
        if plan.kv_source_layers not in done:
            return plan
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

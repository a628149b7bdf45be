"""Nested plans: an order in which leaders are given up, so that every smaller plan's leaders are a subset."""

from __future__ import annotations

from itertools import pairwise

import torch

from depthkv.plan import SharingPlan
from depthkv.planner.problem import Problem


def nested_plans(problem: Problem, cost: torch.Tensor, through: SharingPlan) -> list[SharingPlan]:
    """From the full cache down to the layers that must lead, one leader fewer each time, by way of a given plan.

    Each step gives up the leader whose loss costs least for the bytes that it frees. The last plan is the smallest.

    Args:
        problem: its budget limits no plan here.
        cost: additive, `[layers, layers]`.
        through: one of the plans; its sources are kept as they are.
    """
    plans = [SharingPlan.full(problem.num_layers)]
    required = set(problem.required)
    leaders = set(range(problem.num_layers))
    for goal in (set(through.leaders), required):
        while removable := sorted(leaders - goal):
            before = _objective(problem, cost, leaders)
            prices = {layer: _price(problem, cost, leaders, layer, before) for layer in removable}
            leaders.remove(min(removable, key=lambda layer: (prices[layer], -layer)))
            plans.append(through if leaders == set(through.leaders) else problem.assign(leaders, cost))
    return plans


def given_up(plans: list[SharingPlan]) -> list[int]:
    """The leaders in the order in which nested plans give them up."""
    order = []
    for larger, smaller in pairwise(plans):
        (layer,) = set(larger.leaders) - set(smaller.leaders)
        order.append(layer)
    return order


def _objective(problem: Problem, cost: torch.Tensor, leaders: set[int]) -> float:
    return problem.objective(plan := problem.assign(leaders, cost), problem.predicted(plan, cost))


def _price(problem: Problem, cost: torch.Tensor, leaders: set[int], layer: int, before: float) -> float:
    """Loss of a leader's giving up, for each byte that it frees."""
    added = _objective(problem, cost, leaders - {layer}) - before
    # a gain is the larger the better, whatever it frees
    return added / max(1, problem.budget.leader_bytes[layer]) if added > 0 else added

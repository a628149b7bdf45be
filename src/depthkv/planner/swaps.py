"""The best plan when costs add up and followers may read any earlier leader: exchanges of leaders, from the exact plan.

With free sources this is the k-median problem, which is NP-hard, so the answer is a local optimum: no exchange of one
leader for another layer, and no further leader that the budget allows, would lower the cost.
"""

from __future__ import annotations

import numpy as np
import torch

from depthkv.plan import SharingPlan
from depthkv.planner.exact import exact_plan
from depthkv.planner.problem import Problem

_MOST_ROUNDS = 100


def cheapest_plan(problem: Problem, cost: torch.Tensor) -> SharingPlan:
    """The allowed plan that costs least, as far as it can be found: exactly where followers read the nearest leader.

    Args:
        problem: what the plan must obey.
        cost: of layer l reading j, `[layers, layers]`, additive; inf where it must not.

    Raises:
        PlanError: no allowed plan has a finite cost.
    """
    start = exact_plan(problem, cost)
    if not problem.any_source:
        return start
    table = cost.double().cpu().numpy()
    leaders = set(start.leaders)
    least = _total(problem, table, leaders)
    for _ in range(_MOST_ROUNDS if len(leaders) < problem.num_layers else 0):
        found = _best_exchange(problem, table, leaders)
        if found is None or not found[0] < least - 1e-9:
            break
        least, leaders = found
    return problem.assign(leaders, cost)


def _total(problem: Problem, cost: np.ndarray, leaders: set[int]) -> float:
    followers = [layer for layer in range(problem.num_layers) if layer not in leaders]
    return float(cost[np.ix_(followers, sorted(leaders))].min(axis=1).sum()) + problem.prefill_cost(leaders)


def _best_exchange(problem: Problem, cost: np.ndarray, leaders: set[int]) -> tuple[float, set[int]] | None:
    """The cheapest set of leaders that differs in one exchange, or in one more, and its cost."""
    others = [layer for layer in range(problem.num_layers) if layer not in leaders]
    best: tuple[float, set[int]] | None = None
    for out in (None, *sorted(leaders - set(problem.required))):
        rest = leaders - {out}
        # what each layer pays without `out`, and then with each of the others as one more leader
        pays = np.minimum(cost[:, sorted(rest)].min(axis=1)[:, None], cost[:, others])
        pays[sorted(rest)] = 0.0  # also where reading another layer would be a gain: leaders read themselves
        pays[others, range(len(others))] = 0.0
        totals = pays.sum(axis=0)
        for place in np.argsort(totals, kind="stable"):
            changed = rest | {others[place]}
            if best is not None and not totals[place] < best[0]:
                break
            if problem.affords(changed):
                total = float(totals[place]) + problem.prefill_cost(changed)
                if best is None or total < best[0]:
                    best = (total, changed)
                if problem.prefill_weight == 0:
                    break
    return best

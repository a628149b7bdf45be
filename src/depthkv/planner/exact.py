"""The best plan when costs add up: exact, by dynamic programming.

With followers reading the nearest leader below them, a plan's cost is a sum over stretches from one leader to the next,
so the best plan with k leaders extends the best ones with k - 1. Kinds of layers are solved apart and joined by what
they cost in bytes. O(layers^3), tested against trying every plan.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch

from depthkv.errors import PlanError
from depthkv.plan import SharingPlan
from depthkv.planner.problem import Problem


@dataclass(frozen=True)
class _Choice:
    cost: float
    num_bytes: int
    leaders: tuple[int, ...]


def exact_plan(problem: Problem, cost: torch.Tensor) -> SharingPlan:
    """The allowed plan with followers reading the nearest leader that costs least; of equal ones the smallest cache.

    Args:
        problem: `any_source` is not looked at.
        cost: of layer l reading j, `[layers, layers]`, additive; inf where it must not.

    Raises:
        PlanError: no allowed plan has a finite cost.
    """
    solver = _Solver(problem, cost)
    size = problem.num_layers
    # prefill ends at the last leader: try every end, which without a price on it is the top layer alone
    ends = range(size) if problem.prefill_weight > 0 else (size - 1,)
    best: tuple[float, int, tuple[int, ...]] | None = None
    for end in ends:
        for choice in solver.front(end):
            found = (choice.cost + problem.prefill_cost(choice.leaders), choice.num_bytes, choice.leaders)
            if best is None or _less(found, best):
                best = found
    if best is None:
        raise PlanError(f"expected a plan within {problem.budget.words}, got none with measured costs")
    return problem.nearest(best[2])


def _less(one: tuple[float, int, tuple[int, ...]], other: tuple[float, int, tuple[int, ...]]) -> bool:
    # sums in another order differ in the last digits
    if abs(one[0] - other[0]) > 1e-12 * (1 + abs(one[0])):
        return one[0] < other[0]
    return one[1:] < other[1:]


class _Solver:
    def __init__(self, problem: Problem, cost: torch.Tensor) -> None:
        self.problem = problem
        self.required = set(problem.required)
        table = cost.double().cpu().numpy()
        self.stretches = {kind: self._stretch(table, layers) for kind, layers in problem.members.items()}

    def _stretch(self, cost: np.ndarray, layers: list[int]) -> np.ndarray:
        """`[n, n + 1]`: entry [a, b] is what the layers between the a-th and the b-th cost as readers of the a-th."""
        size = len(layers)
        found = np.full((size, size + 1), math.inf)
        for a in range(size):
            total = 0.0
            found[a, a + 1] = 0.0
            for b in range(a + 1, size):
                layer = layers[b]
                if layer in self.required or not self.problem.may_read(layer, layers[a]):
                    break
                total += float(cost[layer, layers[a]])
                if not total < math.inf:
                    break
                found[a, b + 1] = total
        return found

    def front(self, end: int) -> list[_Choice]:
        """Over all kinds: for each number of bytes the least cost, of plans whose leaders lie at or below `end`."""
        if max(self.required) > end:
            return []
        most = dict(self.problem.budget.max_leaders)
        limit = self.problem.budget.max_bytes
        joined = [_Choice(0.0, 0, ())]
        for kind, layers in self.problem.members.items():
            options = self._by_count(kind, layers, end, most.get(kind, len(layers)))
            by_bytes: dict[int, _Choice] = {}
            for one in joined:
                for other in options:
                    num_bytes = one.num_bytes + other.num_bytes
                    if limit is not None and num_bytes > limit:
                        continue
                    total = one.cost + other.cost
                    if num_bytes not in by_bytes or total < by_bytes[num_bytes].cost:
                        leaders = tuple(sorted((*one.leaders, *other.leaders)))
                        by_bytes[num_bytes] = _Choice(total, num_bytes, leaders)
            joined = _pareto(by_bytes)
        return joined

    def _by_count(self, kind: Hashable, layers: list[int], end: int, most: int) -> list[_Choice]:
        """The best leaders of one kind for each number of them."""
        stretch = self.stretches[kind]
        size = len(layers)
        usable = np.array([layer <= end for layer in layers])
        price = self.problem.budget.leader_bytes[layers[0]]
        # least[a]: of the layers below the a-th, when it is the latest of so many leaders
        least = np.full(size, math.inf)
        least[0] = 0.0 if usable[0] else math.inf
        before: list[np.ndarray] = []
        choices = []
        for count in range(1, min(most, size) + 1):
            closing = least + stretch[:, size]
            last = int(closing.argmin())
            if closing[last] < math.inf:
                chain = [last]
                for back in reversed(before):
                    chain.append(int(back[chain[-1]]))
                leaders = tuple(layers[i] for i in reversed(chain))
                choices.append(_Choice(float(closing[last]), count * price, leaders))
            extended = least[:, None] + stretch[:, :size]
            before.append(extended.argmin(axis=0))
            least = np.where(usable, extended.min(axis=0), math.inf)
        return choices


def _pareto(by_bytes: dict[int, _Choice]) -> list[_Choice]:
    """Choices that no other beats in bytes and cost at once, by ascending bytes."""
    kept: list[_Choice] = []
    for num_bytes in sorted(by_bytes):
        if not kept or by_bytes[num_bytes].cost < kept[-1].cost:
            kept.append(by_bytes[num_bytes])
    return kept

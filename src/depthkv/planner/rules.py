"""Plans to compare with, which need no measured losses: evenly spaced, random, what similarity alone would choose."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

import torch

from depthkv.errors import PlanError
from depthkv.plan import SharingPlan
from depthkv.planner.problem import Problem

__all__ = ["distance_of", "evenly_spaced", "paired", "random_plan"]

_MOST_SHIFT = 4
"""Layers that evenly spaced leaders are shifted by: every shift is a plan to measure."""


def evenly_spaced(problem: Problem) -> list[SharingPlan]:
    """As many leaders of each kind as the budget allows, evenly spaced: first as `SharingPlan.for_retention` and the
    paper space them (arXiv:2604.22782, section 4), then the same with all leaders but the first shifted by some layers.

    Those that obey the problem; where layers to keep or pipeline stages allow none, one as even as they leave it.
    """
    spacing = _even_places(problem)
    plans: list[SharingPlan] = []
    members = problem.members
    widest = min(_MOST_SHIFT, max(len(members[kind]) // len(places) for kind, places in spacing.items()))
    for shift in sorted(range(-widest, widest + 1), key=lambda shift: (abs(shift), shift)):
        leaders: list[int] = []
        for kind, places in spacing.items():
            shifted = [0, *(place + shift for place in places[1:])]
            if len(set(shifted)) == len(places) and all(0 <= place < len(members[kind]) for place in shifted):
                leaders += [members[kind][place] for place in shifted]
        plan = problem.nearest(leaders) if set(problem.required) <= set(leaders) else None
        if plan is not None and problem.affords(leaders) and plan not in plans:
            plans.append(plan)
    return plans or [_even_around_required(problem)]


def _even_places(problem: Problem) -> dict[Hashable, list[int]]:
    """By kind: which of its layers lead, counted among them, from 0 on."""
    found = {}
    for kind, count in _even_counts(problem).items():
        layers = problem.members[kind]
        stride = round(len(layers) / count)
        if problem.budget.even_leaders:
            found[kind] = [place for place, layer in enumerate(layers) if layer in problem.budget.even_leaders]
        elif len(layers[::stride]) == count:
            found[kind] = list(range(0, len(layers), stride))
        else:
            found[kind] = [i * len(layers) // count for i in range(count)]
    return found


def _even_counts(problem: Problem) -> dict[Hashable, int]:
    """Leaders of each kind under the budget: equal shares of each kind, as large as it allows."""
    sizes = {kind: len(layers) for kind, layers in problem.members.items()}
    limits = dict(problem.budget.max_leaders)
    most = {kind: min(size, limits.get(kind, size)) for kind, size in sizes.items()}
    counts = most
    for share in range(problem.num_layers, 0, -1):
        counts = {kind: max(1, min(most[kind], size * share // problem.num_layers)) for kind, size in sizes.items()}
        firsts = [layer for kind, count in counts.items() for layer in problem.members[kind][:count]]
        if problem.affords(firsts):
            break
    return counts


def _even_around_required(problem: Problem) -> SharingPlan:
    """Starting from the layers that must lead, the middle of the longest stretch of followers leads next."""
    leaders = set(problem.required)
    while True:
        plan = problem.nearest(leaders)
        for leader in sorted(plan.leaders, key=lambda leader: (-len(plan.readers(leader)), leader)):
            readers = plan.readers(leader)
            middle = readers[len(readers) // 2]
            if len(readers) > 1 and problem.affords({*leaders, middle}):
                leaders.add(middle)
                break
        else:
            return plan


def random_plan(problem: Problem, seed: int = 0) -> SharingPlan:
    """A uniformly drawn set of leaders, as many as the budget allows."""
    rng = random.Random(f"random plan {seed}")
    leaders = set(problem.required)
    others = [layer for layer in range(problem.num_layers) if layer not in leaders]
    rng.shuffle(others)
    for layer in others:
        if problem.affords({*leaders, layer}):
            leaders.add(layer)
    return problem.nearest(leaders)


def paired(problem: Problem, distance: torch.Tensor, *, most_alike_first: bool) -> SharingPlan:
    """KVSharer's greedy rule (arXiv:2410.18517), without its threshold: pairs of layers by distance, the most unlike
    first as the paper has it, or the reverse. The later layer of a pair reads the earlier one, or what that one reads,
    and so do the later one's readers; it ends when the budget is met. Sources need not be the nearest leaders.

    Raises:
        PlanError: the layers that may share run out first.
    """
    rows = distance.tolist()
    pairs = [(rows[i][j], i, j) for i in range(problem.num_layers) for j in range(i) if problem.may_read(i, j)]
    pairs.sort(key=lambda pair: (pair[0] if most_alike_first else -pair[0], pair[1], pair[2]))
    sources = list(range(problem.num_layers))
    required = set(problem.required)
    for _, later, earlier in pairs:
        if problem.affords(SharingPlan(sources).leaders):
            break
        if sources[later] == later and later not in required:
            sources = [sources[earlier] if source == later else source for source in sources]
    plan = SharingPlan(sources)
    if not problem.affords(plan.leaders):
        left = len(plan.leaders)
        raise PlanError(f"expected {problem.budget.words} to be met by pairing layers, got {left} leaders left")
    return plan


def distance_of(matrix: Sequence[Sequence[float | None]], *, is_similarity: bool) -> torch.Tensor:
    """A measure of `depthkv.calibrate` as a distance `[layers, layers]`; inf where it is not defined."""
    infinity = float("inf")
    rows = [
        [infinity if value is None else (1.0 - value if is_similarity else value) for value in row] for row in matrix
    ]
    return torch.tensor(rows, dtype=torch.float64)

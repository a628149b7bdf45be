"""Why this plan: the search from start to end, what other rules would have chosen, and how sure the choice is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from depthkv.calibrate import Calibration, Calibrator
from depthkv.calibrate.run import Bar, no_bar
from depthkv.errors import DepthKVError
from depthkv.evaluate.intervals import Score, score
from depthkv.plan import SharingPlan
from depthkv.planner.exact import exact_plan
from depthkv.planner.model import Measured
from depthkv.planner.nested import given_up, nested_plans
from depthkv.planner.problem import Problem
from depthkv.planner.rules import distance_of, evenly_spaced, paired, random_plan
from depthkv.planner.search import Found, search
from depthkv.planner.swaps import cheapest_plan

THIS_PLAN, EVEN = "this plan", "evenly spaced"
_KNOWN_STARTS = 3
"""Plans of earlier searches that a search begins with."""
_MOST_KNOWN = 400
"""Plans of earlier searches that inform the model: its work grows with the cube of their number."""
RESAMPLES = 1000
"""Bootstrap samples of the calibration documents."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A chosen plan, and everything that speaks for and against it. Losses are in nats per token."""

    problem: Problem
    plan: SharingPlan
    cost: torch.Tensor
    """Of each pair alone, `[layers, layers]`."""
    found: Found
    """The search; its model has the same costs as measured plans correct them, and predicts others."""
    nested: tuple[SharingPlan, ...]
    """From the full cache to the smallest plan, by way of `plan`."""
    rivals: tuple[tuple[str, SharingPlan], ...]
    """Other rules' plans of at most as many bytes, by name; evenly spaced is the first."""
    certainty: dict[str, Any] | None
    """See `how_sure`; None with one document."""

    @property
    def order(self) -> list[int]:
        """Layers in the order in which leaders are given up."""
        return given_up(list(self.nested))


def make_plan(
    calibrator: Calibrator, problem: Problem, *, evaluations: int, seed: int = 0, bar: Bar = no_bar
) -> Planned:
    """Choose a plan by what was calibrated and by measuring more plans.

    Args:
        calibrator: with similarities and costs measured.
        problem: what the plan must obey.
        evaluations: plans to measure beyond those of the rules.
        seed: of the proposals and of the random rival.
        bar: shows progress.

    Raises:
        PlanError: nothing obeys the problem.
        DepthKVError: the costs are not measured.
    """
    calibration = calibrator.calibration
    cost = forbid(problem, calibration.cost())
    rivals = rival_plans(problem, calibration, cost, seed)
    full = calibrator.plan_loss(SharingPlan.full(problem.num_layers))
    even = evenly_spaced(problem)
    start = [exact_plan(problem, cost), *even, *(plan for _, plan in rivals)]
    if problem.any_source:
        start.insert(1, cheapest_plan(problem, cost))
    known = _known(calibration, problem, full, seed)
    ranked = sorted(known, key=lambda entry: problem.objective(entry.plan, entry.increase))
    start += [entry.plan for entry in ranked if problem.allows(entry.plan)][:_KNOWN_STARTS]
    start = [plan for plan in dict.fromkeys(start) if problem.allows(plan)]
    with bar("measuring plans", len(start) + evaluations) as advance:
        found = search(
            problem,
            cost,
            start,
            lambda plan: calibrator.plan_loss(plan) - full,
            evaluations=evaluations,
            known=known[-_MOST_KNOWN:],
            seed=seed,
            advance=advance,
        )
    calibrator.save()
    # every evenly spaced plan was measured: the best of them is the one to beat
    best_even = min(even, key=calibrator.plan_loss)
    if best_even != even[0]:
        rivals = [rivals[0], ("evenly spaced, best shift", best_even), *rivals[1:]]
    return Planned(
        problem=problem,
        plan=found.plan,
        cost=cost,
        found=found,
        nested=tuple(nested_plans(problem, found.model.cost(), found.plan)),
        rivals=tuple(rivals),
        certainty=how_sure(problem, calibration, found.plan, even[0], [entry.plan for entry in found.measured], seed),
    )


def _known(calibration: Calibration, problem: Problem, full: float, seed: int) -> list[Measured]:
    """Plans that were measured before this search began; a search that goes on after a stop finds the same ones."""
    search_for = (problem.budget, problem.required, problem.stages, problem.prefill_weight, problem.any_source, seed)
    key = hashlib.sha256(repr(search_for).encode()).hexdigest()[:16]
    first = calibration.searches.setdefault(key, len(calibration.plan_losses))
    plans = [SharingPlan(sources) for sources in list(calibration.plan_losses)[:first]]
    return [Measured(plan=plan, increase=(calibration.plan_loss(plan) or 0.0) - full) for plan in plans]


def forbid(problem: Problem, cost: torch.Tensor) -> torch.Tensor:
    """The costs, inf where the problem does not let a layer read another."""
    allowed = torch.tensor(
        [
            [j == i or (j < i and problem.may_read(i, j)) for j in range(problem.num_layers)]
            for i in range(problem.num_layers)
        ]
    )
    return torch.where(allowed, cost, torch.full_like(cost, math.inf))


def rival_plans(
    problem: Problem, calibration: Calibration, cost: torch.Tensor, seed: int = 0
) -> list[tuple[str, SharingPlan]]:
    """What other rules choose for the same budget. Evenly spaced is the first; rules whose figures are missing, or that
    find no plan, are left out."""
    rivals: list[tuple[str, Callable[[], SharingPlan]]] = [
        (EVEN, lambda: evenly_spaced(problem)[0]),
        ("sum of costs, not searched", lambda: exact_plan(problem, cost)),
        ("random leaders", lambda: random_plan(problem, seed)),
    ]
    measures = calibration.similarity
    if "key_r2" in measures:
        keys, values = (distance_of(measures[name], is_similarity=True) for name in ("key_r2", "value_r2"))
        alike = forbid(problem, (keys + values) / 2).clamp(min=0).fill_diagonal_(0.0)
        apart = forbid(problem, distance_of(measures["kv_distance"], is_similarity=False))
        rivals += [
            ("K/V similarity only", lambda: exact_plan(problem, alike)),
            ("KVSharer: most unlike first", lambda: paired(problem, apart, most_alike_first=False)),
            ("its reverse: most alike first", lambda: paired(problem, apart, most_alike_first=True)),
        ]
    if "output_error" in measures:
        error = forbid(problem, distance_of(measures["output_error"], is_similarity=False))
        rivals.append(("attention outputs only", lambda: exact_plan(problem, error)))
    plans = []
    for name, choose in rivals:
        try:
            plans.append((name, choose()))
        except DepthKVError:
            continue
    return plans


def how_sure(
    problem: Problem,
    calibration: Calibration,
    plan: SharingPlan,
    even: SharingPlan,
    measured: Sequence[SharingPlan],
    seed: int = 0,
) -> dict[str, Any] | None:
    """Draw the calibration documents again and choose among the measured plans each time.

    Returns:
        None with one document, else `resamples`; `leader_share`, for each layer how often the plan chosen then lets it
        lead; `same_plan`, how often it is `plan`; `better_than_even`, how often `plan` is below `even`.
    """
    documents = list(dict.fromkeys(calibration.block_documents))
    if len(documents) < 2:
        return None
    numbers = torch.tensor([documents.index(name) for name in calibration.block_documents])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(documents), (RESAMPLES, len(documents)), generator=generator)
    counts = torch.zeros(RESAMPLES, len(documents), dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(RESAMPLES, len(documents), dtype=torch.float64)
    )
    weights = counts[:, numbers]
    weights /= weights.sum(dim=1, keepdim=True)
    plans = [entry for entry in measured if problem.allows(entry)]
    rows = [calibration.full_losses if p.is_full else calibration.plan_losses[p.kv_source_layers] for p in plans]
    losses = torch.tensor(rows, dtype=torch.float64)
    prices = torch.tensor([problem.prefill_cost(p.leaders) for p in plans], dtype=torch.float64)
    totals = weights @ losses.T + prices
    choices = totals.argmin(dim=1)
    leads = torch.tensor([[layer in set(p.leaders) for layer in range(problem.num_layers)] for p in plans]).double()
    found: dict[str, Any] = {
        "resamples": RESAMPLES,
        "leader_share": [round(share, 4) for share in leads[choices].mean(dim=0).tolist()],
        "same_plan": round(float((choices == plans.index(plan)).double().mean()), 4),
        "better_than_even": None,
    }
    if even in plans and even != plan:
        better = totals[:, plans.index(plan)] < totals[:, plans.index(even)]
        found["better_than_even"] = round(float(better.double().mean()), 4)
    return found


def compare_held_out(
    planned: Planned, losses: Mapping[SharingPlan, Sequence[float]], documents: Sequence[str], seed: int = 0
) -> list[tuple[str, SharingPlan, Score, Score]]:
    """Label, plan, loss on held-out text against the full cache's, and against the evenly spaced plan's.

    Args:
        planned: the plan and its rivals.
        losses: of each block, for every plan of `planned.rivals`, the plan itself and the full one.
        documents: of each block.
        seed: of the resampling.
    """
    full = losses[SharingPlan.full(planned.problem.num_layers)]
    even = losses[planned.rivals[0][1]]
    rows = []
    for label, plan in ((THIS_PLAN, planned.plan), *planned.rivals):
        against = [score(losses[plan], documents, baseline, seed=seed) for baseline in (full, even)]
        rows.append((label, plan, against[0], against[1]))
    return rows

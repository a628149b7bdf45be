"""The planner: exact where costs add up, right where they do not, and never outside of what was allowed."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthkv import SharingPlan
from depthkv.architectures import layer_kinds
from depthkv.calibrate import Calibration, Calibrator
from depthkv.errors import PlanError
from depthkv.memory import cache_bytes, kv_bytes_per_token
from depthkv.planner import Budget, Problem, cheapest_plan, exact_plan, make_plan, nested_plans, search
from depthkv.planner.explain import forbid, how_sure, rival_plans
from depthkv.planner.figures import plan_figures, sizes_to_measure
from depthkv.planner.model import CostModel, Measured, Scales
from depthkv.planner.nested import given_up
from depthkv.planner.problem import stage_starts
from depthkv.planner.rules import distance_of, evenly_spaced, paired, random_plan
from depthkv.planner.search import neighbours
from families import tiny_config, tiny_model

INFINITY = math.inf


@st.composite
def problems(draw: st.DrawFn, most_layers: int = 8, any_source: bool | None = None) -> Problem:
    """Any budget, kinds, stages, layers to keep, weight of prefill; those that allow no plan are left out."""
    num_layers = draw(st.integers(1, most_layers))
    kinds = tuple(draw(st.lists(st.integers(0, 1), min_size=num_layers, max_size=num_layers)))
    prices = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    leader_bytes = tuple(prices[kind] for kind in kinds)
    stages = sorted({0, *draw(st.sets(st.integers(0, num_layers - 1), max_size=1))})
    keep = frozenset(draw(st.sets(st.integers(0, num_layers - 1), max_size=2)))
    loose = Problem(
        kinds=kinds,
        budget=Budget(leader_bytes=leader_bytes),
        stages=tuple(stages),
        keep=keep,
        prefill_weight=draw(st.sampled_from([0.0, 0.0, 0.3, 2.0])),
        any_source=draw(st.booleans()) if any_source is None else any_source,
    )
    least = loose.required
    limits: dict[str, Any] = {}
    if draw(st.booleans()):
        limits["max_bytes"] = loose.bytes(least) + draw(st.integers(0, 10))
    if not limits or draw(st.booleans()):
        limits["max_leaders"] = tuple(
            (kind, sum(1 for layer in least if kinds[layer] == kind) + draw(st.integers(0, 3)))
            for kind in dict.fromkeys(kinds)
        )
    return replace(loose, budget=Budget(leader_bytes=leader_bytes, **limits))


def costs_of(problem: Problem, seed: int, *, gaps: float = 0.0, integers: bool = False) -> torch.Tensor:
    """Random costs of all allowed pairs, some of them impossible."""
    rng = random.Random(seed)
    size = problem.num_layers
    cost = torch.full((size, size), INFINITY, dtype=torch.float64)
    for i in range(size):
        cost[i, i] = 0.0
        for j in range(i):
            if problem.may_read(i, j) and rng.random() >= gaps:
                cost[i, j] = rng.randint(-2, 6) if integers else rng.gauss(1, 1)
    return cost


def allowed_plans(problem: Problem) -> list[SharingPlan]:
    """Every allowed plan whose followers read the nearest leader."""
    found = []
    for count in range(1, problem.num_layers + 1):
        for leaders in itertools.combinations(range(problem.num_layers), count):
            if set(problem.required) <= set(leaders) and problem.affords(leaders):
                found.append(problem.nearest(leaders))
    return found


# Exact plans


@settings(max_examples=1000, deadline=None)
@given(problems(most_layers=10), st.integers(0, 10**6), st.sampled_from([0.0, 0.2]), st.booleans())
def test_exact_plan_is_the_best_of_all(problem: Problem, seed: int, gaps: float, integers: bool) -> None:
    problem = replace(problem, any_source=False)
    cost = costs_of(problem, seed, gaps=gaps, integers=integers)
    scores = {p: problem.objective(p, problem.predicted(p, cost)) for p in allowed_plans(problem)}
    best = min(scores.values(), default=INFINITY)
    if best == INFINITY:
        with pytest.raises(PlanError, match="expected a plan within"):
            exact_plan(problem, cost)
        return
    plan = exact_plan(problem, cost)
    assert problem.allows(plan) and scores[plan] == pytest.approx(best, abs=1e-9)


def test_exact_plan_finds_what_is_obviously_right() -> None:
    # layers 4 to 9 can read 3 for nothing; every other sharing is dear
    cost = torch.full((10, 10), 1.0, dtype=torch.float64)
    cost[4:, 3] = 0.01
    cost = torch.tril(cost, -1) + torch.triu(torch.full_like(cost, INFINITY), 1)
    problem = Problem(kinds=(0,) * 10, budget=Budget(leader_bytes=(1,) * 10, max_bytes=4))
    assert exact_plan(problem, cost).leaders == (0, 1, 2, 3)


def test_prefill_weight_moves_leaders_down() -> None:
    torch.manual_seed(0)
    problem = Problem(kinds=(0,) * 12, budget=Budget(leader_bytes=(1,) * 12, max_bytes=6))
    cost = torch.tril(torch.rand(12, 12, dtype=torch.float64), -1) + torch.triu(torch.full((12, 12), INFINITY), 1)
    lasts = [exact_plan(replace(problem, prefill_weight=w), cost).leaders[-1] for w in (0.0, 1.0, 5.0, 100.0)]
    assert lasts == sorted(lasts, reverse=True) and lasts[-1] == 0 < lasts[0]


def test_any_source_is_near_the_best_of_all() -> None:
    best_found = 0
    for seed in range(30):
        problem = Problem(kinds=(0,) * 8, budget=Budget(leader_bytes=(1,) * 8, max_bytes=4))
        cost = costs_of(problem, seed).abs()
        totals = []
        for rest in itertools.combinations(range(1, 8), 3):
            plan = problem.assign((0, *rest), cost)
            totals.append(problem.predicted(plan, cost))
        found = problem.predicted(cheapest_plan(problem, cost), cost)
        best_found += found <= min(totals) + 1e-9
        assert found <= problem.predicted(exact_plan(problem, cost), cost) + 1e-9
    assert best_found >= 25


# Constraints


@settings(max_examples=1000, deadline=None)
@given(problems(), st.integers(0, 10**6))
def test_everything_that_is_proposed_is_allowed(problem: Problem, seed: int) -> None:
    cost = costs_of(problem, seed)
    start = exact_plan(problem, cost)
    cheapest = cheapest_plan(problem, cost)
    plans = [start, problem.assign(start.leaders, cost), cheapest, *evenly_spaced(problem), random_plan(problem, seed)]
    plans += itertools.islice(neighbours(problem, start), 40)
    for plan in plans:
        assert problem.allows(plan)
    totals = [problem.objective(plan, problem.predicted(plan, cost)) for plan in plans[:3]]
    assert totals[2] <= min(totals) + 1e-9
    largest = max((plan.leaders for plan in plans), key=problem.bytes)
    nested = nested_plans(problem, cost, start)
    assert nested[0].is_full and start in nested and nested[-1].leaders == problem.required
    for larger, smaller in itertools.pairwise(nested):
        assert set(smaller.leaders) < set(larger.leaders) and len(larger.leaders) == len(smaller.leaders) + 1
    for plan in nested:
        assert all(problem.may_read(i, j) for i, j in enumerate(plan.kv_source_layers))
        assert problem.affords(plan.leaders) or (problem.bytes(plan.leaders) > 0 and plan != start)
    order = given_up(nested)
    assert sorted(order) == sorted(set(range(problem.num_layers)) - set(problem.required)) and largest


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 10**6), st.integers(0, 6))
def test_a_search_obeys_too(problem: Problem, seed: int, evaluations: int) -> None:
    cost = costs_of(problem, seed)
    asked: list[SharingPlan] = []

    def measure(plan: SharingPlan) -> float:
        asked.append(plan)
        return problem.predicted(plan, cost) + 0.3 * len(plan.followers) ** 0.5

    found = search(problem, cost, [exact_plan(problem, cost)], measure, evaluations=evaluations, seed=seed)
    assert len(asked) == len(set(asked)) <= evaluations + 1 and all(problem.allows(plan) for plan in asked)
    best = min(problem.objective(m.plan, m.increase) for m in found.measured)
    assert problem.objective(found.plan, measure(found.plan)) == pytest.approx(best)


def test_what_may_not_be() -> None:
    budget = Budget(leader_bytes=(1,) * 4, max_bytes=2, words="two layers")
    problem = Problem(kinds=("a",) * 4, budget=budget, stages=(0, 2))
    assert problem.required == (0, 2) and not problem.may_read(3, 1) and problem.may_read(3, 2)
    assert not problem.allows(SharingPlan([0, 0, 0, 0])) and problem.allows(SharingPlan([0, 0, 2, 2]))
    assert not problem.allows(SharingPlan([0, 0, 2, 3])) and not problem.allows(SharingPlan([0, 0, 2]))
    nearest = Problem(kinds=("a",) * 4, budget=replace(budget, max_bytes=3), any_source=False)
    assert not nearest.allows(SharingPlan([0, 1, 2, 0])) and nearest.allows(SharingPlan([0, 1, 2, 2]))
    for changes, message in (
        ({"keep": {1, 2}}, r"for the 3 layers that must lead \(0, 1, 2\), got one of two layers, where they take 3 B"),
        ({"keep": {4}}, "layers to keep between 0 and 3, got 4"),
        ({"stages": (1,)}, "stages to start at 0"),
        ({"stages": (0, 4)}, "stages to start below layer 4"),
        ({"prefill_weight": -1.0}, "prefill weight of at least 0"),
        ({"kinds": ("a",) * 5}, "a budget for 5 layers, got one for 4"),
        ({"budget": replace(budget, max_leaders=(("a", 0),))}, "got one of two layers"),
    ):
        with pytest.raises(PlanError, match=message):
            Problem(**{"kinds": ("a",) * 4, "budget": budget, **changes})


def test_stages() -> None:
    assert stage_starts("4", 30) == (0, 7, 15, 22) and stage_starts("8,8,7,7", 30) == (0, 8, 16, 23)
    assert stage_starts("1", 3) == (0,) and stage_starts("3", 3) == (0, 1, 2)
    for text in ("0", "4", "1,1", "1,2,0", "a", "", "1.5", "-1"):
        with pytest.raises(PlanError, match=r"expected .*pipeline stages"):
            stage_starts(text, 3)


# Budgets


def test_budget_of_a_retention_is_what_evenly_spaced_layers_take() -> None:
    for family, context in (("llama", 100), ("gemma3_text", 4), ("gemma3_text", 100), ("mistral", 100)):
        config = tiny_config(family)
        kinds = layer_kinds(config)
        for retention in (0.25, 0.33, 0.5, 0.66, 1.0):
            budget = Budget.of_retention(retention, config, torch.float32)
            problem = Problem(kinds=kinds, budget=budget)
            even = SharingPlan.for_retention(retention, kinds)
            assert problem.allows(even) and evenly_spaced(problem)[0] == even
            most = cache_bytes(config, torch.float32, context, 1, even)
            for plan in (random_plan(problem, 3), exact_plan(problem, costs_of(problem, 1))):
                assert cache_bytes(config, torch.float32, context, 1, plan) <= most


def test_budget_in_bytes_counts_windows() -> None:
    config = tiny_config("gemma3_text", num_hidden_layers=12)  # every third layer is full, the others see 8 tokens
    kinds = layer_kinds(config)
    full = cache_bytes(config, torch.float32, 1000, 3)
    budget = Budget.of_bytes(full // 2, config, torch.float32, context=1000, batch=3)
    problem = Problem(kinds=kinds, budget=budget)
    assert "for 3 sequences of 1,000 tokens" in budget.words
    for seed in range(20):
        cost = costs_of(problem, seed).abs()
        cost[[layer for layer in range(12) if kinds[layer].window is None]] += 100
        cost.fill_diagonal_(0.0)
        plan = exact_plan(problem, cost)
        taken = cache_bytes(config, torch.float32, 1000, 3, plan)
        assert taken == problem.bytes(plan.leaders) <= full // 2
        # a window takes next to nothing: as many full layers as fit are worth more
        assert sum(1 for layer in plan.leaders if kinds[layer].window is None) == 2
    per_token = Budget.of_bytes(512, tiny_config("llama"), torch.float32, context=1)
    assert per_token.words == "512 B per token in float32" and set(per_token.leader_bytes) == {128}
    plan = exact_plan(
        problem := Problem(kinds=layer_kinds(tiny_config("llama")), budget=per_token), costs_of(problem, 1)
    )
    assert kv_bytes_per_token(tiny_config("llama"), torch.float32, plan) <= 512


# Rules to compare with


def test_evenly_spaced_plans() -> None:
    problem = Problem(kinds=(0,) * 12, budget=Budget(leader_bytes=(1,) * 12, max_leaders=((0, 4),)))
    plans = evenly_spaced(problem)
    assert plans[0] == SharingPlan.every(3, 12) and len(set(plans)) == len(plans)
    assert {plan.leaders for plan in plans} == {(0, 3, 6, 9), (0, 2, 5, 8), (0, 4, 7, 10), (0, 1, 4, 7), (0, 5, 8, 11)}
    kept = Problem(kinds=(0,) * 12, budget=problem.budget, keep=frozenset({11, 10}))
    (plan,) = evenly_spaced(kept)
    assert (
        set(plan.leaders) >= {0, 10, 11}
        and len(plan.leaders) == 4
        and 4 <= (set(plan.leaders) - {0, 10, 11}).pop() <= 6
    )


def test_pairs_by_distance() -> None:
    distance = torch.tensor([[0.0] * 4, [1.0, 0, 0, 0], [5.0, 2.0, 0, 0], [3.0, 9.0, 4.0, 0]], dtype=torch.float64)
    problem = Problem(kinds=(0,) * 4, budget=Budget(leader_bytes=(1,) * 4, max_bytes=2))
    # 9: layer 3 reads 1; 5: layer 2 reads 0
    assert paired(problem, distance, most_alike_first=False) == SharingPlan([0, 1, 0, 1])
    # 1: layer 1 reads 0; 2: layer 2 reads what 1 reads
    assert paired(problem, distance, most_alike_first=True) == SharingPlan([0, 0, 0, 3])
    tight = Problem(kinds=("a", "b", "a", "b"), budget=Budget(leader_bytes=(1,) * 4, max_bytes=2))
    assert paired(tight, distance, most_alike_first=True) == SharingPlan([0, 1, 0, 1])
    matrix = [[1.0, None], [0.75, 1.0]]
    assert distance_of(matrix, is_similarity=True).tolist() == [[0.0, INFINITY], [0.25, 0.0]]


# Where costs do not add up


def interacting(seed: int, size: int = 12) -> tuple[torch.Tensor, Any]:
    """Costs measured alone, and a loss in which far sources and some readers are dearer together than alone."""
    generator = torch.Generator().manual_seed(seed)
    cost = 0.1 * torch.rand(size, size, generator=generator, dtype=torch.float64)
    cost = torch.tril(cost, -1) + torch.triu(torch.full_like(cost, INFINITY), 1)
    reader = 0.2 * torch.rand(size, generator=generator, dtype=torch.float64)

    def loss(plan: SharingPlan) -> float:
        pairs = [(i, plan.kv_source_layers[i]) for i in plan.followers]
        return sum(float(cost[i, j]) + float(reader[i]) + 0.03 * (i - j) for i, j in pairs) if pairs else 0.0

    return cost, loss


@pytest.mark.parametrize("any_source", [False, True])
def test_search_finds_the_best_plan_where_the_sum_of_costs_misleads(any_source: bool) -> None:
    size, gained = 12, 0
    problem = Problem(kinds=(0,) * size, budget=Budget(leader_bytes=(1,) * size, max_bytes=6), any_source=any_source)
    for seed in range(4):
        cost, loss = interacting(seed)
        start = exact_plan(problem, cost)
        choices = [problem.nearest((0, *rest)) for rest in itertools.combinations(range(1, size), 5)]
        best = min(map(loss, choices))
        found = search(problem, cost, [start], loss, evaluations=40, seed=seed)
        assert loss(found.plan) <= best + 1e-9 or (any_source and loss(found.plan) <= best + 0.05)
        gained += loss(found.plan) < loss(start) - 0.05
        # what was learnt holds for plans that were not measured
        pairs = torch.tensor([[found.model.predicted(plan), loss(plan)] for plan in choices])
        assert torch.corrcoef(pairs.T)[0, 1] > (0.5 if any_source else 0.8)
    assert gained >= 3


def test_search_is_repeatable_and_goes_on() -> None:
    problem = Problem(kinds=(0,) * 12, budget=Budget(leader_bytes=(1,) * 12, max_bytes=5))
    cost, loss = interacting(5)
    start = [exact_plan(problem, cost)]
    one, two, longer = (search(problem, cost, start, loss, evaluations=n, seed=7) for n in (9, 9, 15))
    assert [m.plan for m in one.measured] == [m.plan for m in two.measured]
    assert [m.plan for m in longer.measured][: len(one.measured)] == [m.plan for m in one.measured]


def test_search_ends_where_all_is_measured() -> None:
    problem = Problem(kinds=(0,) * 3, budget=Budget(leader_bytes=(1,) * 3, max_bytes=2), any_source=False)
    cost, loss = interacting(1, 3)
    steps: list[int] = []
    found = search(problem, cost, [exact_plan(problem, cost)], loss, evaluations=50, advance=steps.append)
    assert len(found.measured) <= 4 and sum(steps) == 51
    with pytest.raises(PlanError, match="expected a plan to start with"):
        search(problem, cost, [SharingPlan.full(3)], loss, evaluations=1)
    with pytest.raises(PlanError, match="expected a finite loss, got nan"):
        search(problem, cost, [exact_plan(problem, cost)], lambda plan: math.nan, evaluations=1)


def test_model_of_costs_is_gaussian_regression() -> None:
    cost, loss = interacting(2, 6)
    plans = [SharingPlan(s) for s in itertools.product([0], [0, 1], [0, 2], [0, 3], [0, 4], [0, 5])]
    plans = [plan for plan in plans if not plan.is_full]
    measured = [Measured(plan=plan, increase=loss(plan)) for plan in plans[:12]]
    scales = Scales(pair=0.1, reader=0.2, distance=0.05, noise=1e-3)
    model = CostModel(cost, measured, scales)
    for entry in measured:
        assert model.predicted(entry.plan) == pytest.approx(entry.increase, abs=5e-3)
    # samples scatter around the mean, least where much was measured, and agree with what was measured
    generator = torch.Generator().manual_seed(0)
    samples = torch.stack([model.sample(generator).nan_to_num(posinf=0.0) for _ in range(4000)])
    mean = model.cost().nan_to_num(posinf=0.0)
    assert torch.allclose(samples.mean(dim=0), mean, atol=0.02)
    assert samples.diagonal(dim1=1, dim2=2).abs().max() == 0
    spread = samples.std(dim=0)
    prior = math.sqrt(0.1**2 + 0.2**2 + 0.05**2)
    assert spread[5, 0] < spread[5, 3] < spread[1, 0] == pytest.approx(prior, rel=0.1)  # layer 1 never read another
    assert CostModel(cost, measured[:1]).scales.noise > 0
    constant = [Measured(plan=entry.plan, increase=0.0) for entry in measured]
    assert math.isfinite(CostModel(cost, constant).predicted(plans[-1]))


# A real model, from measurements to figures


class Made:
    """A tiny model with measurements and a plan."""

    def __init__(self, name: str = "llama", documents: int = 3, **changes: Any) -> None:
        blocks = torch.randint(2, 97, (6, 24), generator=torch.Generator().manual_seed(1))
        self.model: Any = tiny_model(name)
        names = [f"d{i % documents}" for i in range(6)]
        self.calibrator = Calibrator(self.model, blocks, names, cost_blocks=6)
        self.calibrator.measure_similarity()
        self.calibrator.measure_outputs()
        self.calibrator.measure_costs()
        budget = Budget.of_retention(0.5, self.model.config, torch.float32)
        self.problem = Problem(kinds=layer_kinds(self.model.config), budget=budget, **changes)
        self.planned = make_plan(self.calibrator, self.problem, evaluations=8)


@pytest.fixture(scope="module")
def made() -> Made:
    return Made()


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_plan_is_the_best_that_was_measured(name: str) -> None:
    made = Made(name)
    planned, measured = made.planned, made.calibrator.calibration.plan_losses
    losses = {m.plan: made.calibrator.plan_loss(m.plan) for m in planned.found.measured}
    assert losses[planned.plan] == min(losses.values()) and made.problem.allows(planned.plan)
    assert planned.rivals[0] == ("evenly spaced", SharingPlan.for_retention(0.5, made.problem.kinds))
    assert losses[planned.plan] <= losses[planned.rivals[0][1]]
    names = [label for label, _ in planned.rivals]
    assert len(names) == len(set(names)) >= 7 and {"random leaders", "K/V similarity only"} <= set(names)
    for _, rival in planned.rivals:
        assert made.problem.bytes(rival.leaders) <= made.problem.bytes(planned.rivals[0][1].leaders)
    # the same again finds the same, and measures nothing
    count = len(measured)
    again = make_plan(made.calibrator, made.problem, evaluations=8)
    assert again.plan == planned.plan and [m.plan for m in again.found.measured] == [
        m.plan for m in planned.found.measured
    ]
    assert len(measured) == count
    # another budget begins with what this one learnt
    other = replace(made.problem, any_source=False)
    found = make_plan(made.calibrator, other, evaluations=2)
    assert other.allows(found.plan) and len(found.found.model.measured) > len(found.found.measured)


def test_how_sure_counts_the_documents_drawn_anew(made: Made) -> None:
    kinds: tuple[Hashable, ...] = (0,) * 4
    problem = Problem(kinds=kinds, budget=Budget(leader_bytes=(1,) * 4, max_bytes=2))
    calibration = Calibration(
        fingerprint="", kinds=["a"] * 4, block_documents=["x", "x", "y", "z"], block_size=2, full_losses=[1.0] * 4
    )
    one, two, three = SharingPlan([0, 0, 2, 2]), SharingPlan([0, 1, 1, 1]), SharingPlan([0, 0, 0, 3])
    calibration.plan_losses = {
        one.kv_source_layers: [1.0, 1.0, 1.0, 1.0],
        two.kv_source_layers: [2.0, 2.0, 1.5, 0.0],  # better where z is drawn often enough
        three.kv_source_layers: [3.0, 3.0, 3.0, 3.0],
    }
    sure = how_sure(problem, calibration, one, three, [one, two, three])
    assert sure is not None and sure["better_than_even"] == 1.0
    # z is drawn 0 to 3 of 3 times; `two` wins with z = 2 (x or y besides) and z = 3, and with y = 2, z = 1
    wins = 0.0
    for drawn in itertools.product("xyz", repeat=3):
        weights = [2 * drawn.count("x"), drawn.count("y"), drawn.count("z")]
        mean = (2.0 * weights[0] + 1.5 * weights[1]) / sum(weights)
        wins += mean < 1.0
    assert sure["same_plan"] == pytest.approx(1 - wins / 27, abs=0.05)
    assert sure["leader_share"] == pytest.approx([1.0, wins / 27, 1 - wins / 27, 0.0], abs=0.05)
    calibration.block_documents = ["x"] * 4
    assert how_sure(problem, calibration, one, three, [one, two]) is None


def test_figures_of_a_plan(made: Made) -> None:
    planned, calibrator = made.planned, made.calibrator
    for plan in sizes_to_measure(planned):
        calibrator.plan_loss(plan)
    held = {plan: [1.0 + 0.1 * len(plan.followers)] * 4 for plan in {planned.plan, *(p for _, p in planned.rivals)}}
    held[SharingPlan.full(6)] = [1.0] * 4
    found = plan_figures(planned, calibrator, made.model.config, held, ["a", "b", "c", "d"])
    assert found["kv_source_layers"] == list(planned.plan.kv_source_layers)
    assert found["measured_loss"] == calibrator.plan_loss(planned.plan)
    assert [row["label"] for row in found["comparison"]][:2] == ["this plan", "evenly spaced"]
    assert found["comparison"][0]["loss_score"]["difference"] == pytest.approx(0.1 * len(planned.plan.followers))
    sizes = [len(row["leaders"]) for row in found["nested"]]
    assert sizes == list(range(6, 0, -1)) and sum(row["chosen"] for row in found["nested"]) == 1
    for row in found["nested"]:
        assert row["free_predicted_loss"] <= row["predicted_loss"] + 1e-12
    assert found["nested"][0]["predicted_loss"] == found["nested"][0]["measured_loss"] == found["full_loss"]
    assert found["nested"][-1]["measured_loss"] is not None
    # what is predicted of a plan does not know what was measured of it
    others = [m for m in planned.found.model.measured if m.plan != planned.plan]
    unseen = CostModel(planned.cost, others, planned.found.model.scales).predicted(planned.plan)
    assert found["predicted_loss"] == pytest.approx(found["full_loss"] + unseen)


def test_rules_without_their_figures_are_left_out(made: Made) -> None:
    bare = replace(made.calibrator.calibration, similarity={})
    cost = forbid(made.problem, bare.cost())
    names = [name for name, _ in rival_plans(made.problem, bare, cost)]
    assert names == ["evenly spaced", "sum of costs, not searched", "random leaders"]


def test_stages_and_kept_layers_hold_in_a_real_plan() -> None:
    made = Made(stages=(0, 3), keep=frozenset({4}), prefill_weight=0.5)
    assert {0, 3, 4} <= set(made.planned.plan.leaders)
    assert all((i < 3) == (j < 3) for i, j in enumerate(made.planned.plan.kv_source_layers))
    for plan in made.planned.nested:
        assert {0, 3, 4} <= set(plan.leaders)

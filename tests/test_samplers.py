"""Samplers draw what their docstrings say, for ever the same, and never mix kinds; per-sequence maps are exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from depthkv import RandomCrossLayer, SharingPlan, route, share
from depthkv.errors import DepthKVError
from depthkv.reference import reference_forward
from depthkv.samplers import (
    CrossLayerAttention,
    FullCache,
    LeaderSubset,
    Mixture,
    PerSequence,
    PlanWeighted,
    RandomGroupAttention,
    ScheduledCrossLayer,
    independent,
    parse_sampler,
)
from families import tiny_model

PLAN = SharingPlan([0, 0, 2, 2, 2, 5])
DRAWS = 20_000
ALL: list[Any] = [
    FullCache(),
    CrossLayerAttention(group_size=2),
    RandomGroupAttention(group_size=3),
    LeaderSubset(),
    PlanWeighted(plan=PLAN),
    ScheduledCrossLayer(start=0.2, end=0.8, num_steps=10),
    Mixture(samplers=(RandomCrossLayer(), LeaderSubset()), weights=(1, 3)),
    PerSequence(sampler=RandomCrossLayer()),
]


def draws(sampler: Any, kinds: Sequence[Hashable], first: int = 0, count: int = DRAWS) -> list[tuple[int, ...]]:
    return [tuple(sampler.draw(step, kinds)) for step in range(first, first + count)]


def assert_fits(counts: Sequence[int], probabilities: Sequence[float]) -> None:
    assert sum(probabilities) == pytest.approx(1)
    assert chisquare(counts, [p * sum(counts) for p in probabilities]).pvalue > 1e-4


@pytest.mark.parametrize("sampler", ALL, ids=lambda s: type(s).__name__)
def test_kinds_never_mix_and_the_first_layer_reads_itself(sampler: Any) -> None:
    kinds = ["a", "b", "a", "a", "b", "a"]
    if isinstance(sampler, PlanWeighted):
        sampler = PlanWeighted(plan=SharingPlan([0, 1, 0, 0, 1, 5]))
    for drawn in draws(sampler, kinds, count=300):
        assert drawn[:2] == (0, 1)
        assert all(source <= layer and kinds[source] == kinds[layer] for layer, source in enumerate(drawn))


@pytest.mark.parametrize("sampler", ALL, ids=lambda s: type(s).__name__)
def test_draws_depend_on_seed_and_step_alone(sampler: Any) -> None:
    kinds = [None] * 6
    later = draws(sampler, kinds, first=5, count=20)
    assert later == draws(sampler, kinds, count=25)[5:]
    # steps count for the probability of a schedule, seeds for everything random
    if not isinstance(sampler, (FullCache, CrossLayerAttention)):
        assert draws(independent(sampler, 1), kinds, count=25) != draws(sampler, kinds, count=25)
        assert draws(independent(sampler, 1), kinds, count=25) != draws(independent(sampler, 2), kinds, count=25)
    assert independent(sampler, 0) == sampler


def test_fixed_groups() -> None:
    assert draws(CrossLayerAttention(group_size=3), [None] * 7, count=2) == [(0, 0, 0, 3, 3, 3, 6)] * 2
    assert draws(CrossLayerAttention(group_size=2), list("abaab"), count=1) == [(0, 1, 0, 3, 1)]
    assert draws(FullCache(), [None] * 3, count=1) == [(0, 1, 2)]


def test_random_groups() -> None:
    counts = Counter(draws(RandomGroupAttention(group_size=3, cross_layer_prob=0.3), [None] * 6))
    # layers 1, 2, 4, 5 flip a coin each, independently
    outcomes = {}
    for bits in range(16):
        flips = [bits >> i & 1 for i in range(4)]
        drawn = (0, *(0 if flip else i for i, flip in zip((1, 2), flips[:2], strict=True)), 3)
        drawn += tuple(3 if flip else i for i, flip in zip((4, 5), flips[2:], strict=True))
        outcomes[drawn] = 0.3 ** sum(flips) * 0.7 ** (4 - sum(flips))
    assert counts.keys() <= outcomes.keys()
    assert_fits([counts[drawn] for drawn in outcomes], list(outcomes.values()))


def test_leader_subsets() -> None:
    sampler = LeaderSubset(retentions=(1.0, 0.5))
    counts = Counter(draws(sampler, [None] * 6))
    outcomes = {tuple(range(6)): 0.5}
    for chosen in combinations(range(1, 6), 2):
        leaders = (0, *chosen)
        outcomes[tuple(max(x for x in leaders if x <= i) for i in range(6))] = 0.5 / 10
    assert counts.keys() <= outcomes.keys()
    assert_fits([counts[drawn] for drawn in outcomes], list(outcomes.values()))


def test_leader_subsets_that_are_often_even() -> None:
    counts = Counter(draws(LeaderSubset(retentions=(0.5,), even_prob=0.6), [None] * 4))
    # layers 0 and 2 lead by chance, too: one of three sets of two
    outcomes = {(0, 0, 2, 2): 0.6 + 0.4 / 3, (0, 1, 1, 1): 0.4 / 3, (0, 0, 0, 3): 0.4 / 3}
    assert counts.keys() <= outcomes.keys()
    assert_fits([counts[drawn] for drawn in outcomes], list(outcomes.values()))


def test_plan_weighted() -> None:
    sampler = PlanWeighted(plan=PLAN, plan_prob=0.75, cross_layer_prob=0.5)
    drawn = draws(sampler, [None] * 6)
    free = RandomCrossLayer(cross_layer_prob=0.5)
    # the coin says nothing about the map that is drawn otherwise
    others = [m for step, m in enumerate(drawn) if m != PLAN.kv_source_layers]
    assert all(m == tuple(free.draw(step, [None] * 6)) for step, m in enumerate(drawn) if m != PLAN.kv_source_layers)
    hits = len(drawn) - len(others)
    # R-CLA may draw the plan's own map, too: layers 1 to 5 read 0, themselves, 2, 2, themselves
    by_chance = 0.25 * 0.5 * 0.5 * (0.5 / 3) * (0.5 / 4) * 0.5
    assert_fits([hits, len(others)], [0.75 + by_chance, 0.25 - by_chance])
    assert_fits([sum(m[1] == 0 for m in others), sum(m[1] == 1 for m in others)], [0.5, 0.5])


def test_schedule() -> None:
    sampler = ScheduledCrossLayer(start=0.1, end=0.9, num_steps=2 * DRAWS)
    for first, probability in ((0, 0.3), (DRAWS, 0.7), (5 * DRAWS, 0.9)):
        left = sum(drawn[1] == 0 for drawn in draws(sampler, [None] * 2, first=first))
        assert_fits([left, DRAWS - left], [probability, 1 - probability])


def test_mixture() -> None:
    sampler = Mixture(samplers=(FullCache(), CrossLayerAttention(group_size=2)), weights=(1, 3))
    counts = Counter(draws(sampler, [None] * 2))
    assert_fits([counts[0, 1], counts[0, 0]], [0.25, 0.75])


def test_sequences_draw_independently() -> None:
    sampler = PerSequence(sampler=RandomCrossLayer(cross_layer_prob=0.4))
    pairs = Counter()
    for step in range(DRAWS // 2):
        first, second = sampler.draw_batch(step, [None] * 2, 2)
        pairs[first[1], second[1]] += 1
    expected = [p * q for p in (0.4, 0.6) for q in (0.4, 0.6)]
    assert_fits([pairs[a, b] for a in (0, 1) for b in (0, 1)], expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma3_text"])
def test_a_batch_of_maps_equals_its_sequences_alone(family: str, checkpointing: bool) -> None:
    model = tiny_model(family, "eager").double().train()
    for module in model.modules():
        for name in ("p", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    ids = torch.randint(2, 97, (3, 9), generator=torch.Generator().manual_seed(2))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with route(model, PerSequence(sampler=RandomCrossLayer(cross_layer_prob=0.7, seed=3))) as routing:
        got = model(input_ids=ids).logits
        got.square().mean().backward()
    maps = [m.kv_source_layers for m in routing.last_maps]
    assert len(set(maps)) == 3 and routing.step == 1
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_disable()
    logits = [reference_forward(model, m, ids[row : row + 1]).logits for row, m in enumerate(maps)]
    expected = torch.cat(logits)
    expected.square().mean().backward()
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            # Gemma's norms compute in fp32 whatever the weights are
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-7, rtol=1e-5, msg=name)


def test_routing_only_in_training_and_suspended() -> None:
    model = tiny_model("llama").train()
    ids = torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = model.eval()(input_ids=ids).logits
        with route(model, RandomCrossLayer(cross_layer_prob=0.9, seed=1), only_in_training=True) as routing:
            assert torch.equal(model(input_ids=ids, use_cache=True).logits, plain) and routing.step == 0
            model.train()
            routed = model(input_ids=ids).logits
            assert routing.step == 1 and not torch.allclose(routed, plain, atol=1e-2)
            with routing.suspended():
                assert torch.equal(model(input_ids=ids).logits, plain) and routing.step == 1
                with share(model, SharingPlan.every(2, 6)):
                    pass
            routing.step = 0
            assert torch.equal(model(input_ids=ids).logits, routed)
        assert torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("r-cla", RandomCrossLayer(cross_layer_prob=0.3, seed=4)),
        ("cla:4", CrossLayerAttention(group_size=4)),
        ("rd-cla", RandomGroupAttention(group_size=2, cross_layer_prob=0.3, seed=4)),
        ("leader-subset", LeaderSubset(seed=4)),
        ("plan", PlanWeighted(plan=PLAN, cross_layer_prob=0.3, seed=4)),
        ("none", FullCache()),
        ("none+cla:3", Mixture(samplers=(FullCache(), CrossLayerAttention(group_size=3)), weights=(1, 1), seed=4)),
        ("per-sequence:r-cla", PerSequence(sampler=RandomCrossLayer(cross_layer_prob=0.3, seed=4))),
    ],
)
def test_names(text: str, expected: Any) -> None:
    assert parse_sampler(text, cross_layer_prob=0.3, seed=4, plan=PLAN) == expected


@pytest.mark.parametrize("text", ["", "cla:x", "cla:0", "r-cla:2", "rcla", "plan", "none+", "per-sequence:"])
def test_bad_names(text: str) -> None:
    with pytest.raises(DepthKVError, match="expected"):
        parse_sampler(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CrossLayerAttention(group_size=0),
        lambda: RandomGroupAttention(cross_layer_prob=1.5),
        lambda: LeaderSubset(retentions=()),
        lambda: LeaderSubset(retentions=(2.0,)),
        lambda: ScheduledCrossLayer(start=0.1, end=float("nan"), num_steps=3),
        lambda: Mixture(samplers=(FullCache(),), weights=()),
        lambda: Mixture(samplers=(FullCache(),), weights=(0.0,)),
        lambda: independent(type("Own", (), {"draw": None})(), 1),
    ],
)
def test_bad_values(make: Any) -> None:
    with pytest.raises(DepthKVError, match="expected"):
        make()

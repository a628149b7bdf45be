"""The joint planner: on made-up losses whose best recipe is known, and on a tiny model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from depthkv import SharingPlan
from depthkv.compress import CacheRecipe
from depthkv.compress.costs import JointCosts, isotonic
from depthkv.compress.losses import RecipeLosses
from depthkv.compress.measure import streamed_losses
from depthkv.compress.planner import alone, choose_recipe, combined, front, subsets
from depthkv.compress.space import AXES, Space, axes_of, mean_width
from depthkv.errors import DepthKVError, PlanError, RecipeError
from depthkv.memory import cache_bytes
from tiny import tiny_model

LAYERS = 8
CONFIG: Any = tiny_model(num_hidden_layers=LAYERS).config
LADDER = [SharingPlan.from_leaders(range(size), LAYERS) for size in range(LAYERS - 1, 0, -1)]
CONTEXT = 512


def space_of(axes: tuple[str, ...] = AXES, **more: Any) -> Space:
    options: dict[str, Any] = {"context": CONTEXT, "plans": LADDER, "axes": axes} | more
    return Space(CONFIG, torch.bfloat16, **options)


class Made:
    """A made-up loss on three blocks: effects that add up, terms of pairs, and noise by block that cancels in pairs."""

    def __init__(self, *, depth: float = 0.3, bits: float = 0.1, tokens: float = 0.08, pairs: float = 0.0) -> None:
        self.depth, self.bits, self.tokens, self.pairs = depth, bits, tokens, pairs
        self.asked: list[CacheRecipe] = []

    def excess(self, recipe: CacheRecipe) -> float:
        keys, values = ([pair[side] for pair in recipe.bits.values()] for side in (0, 1))
        # leader l is worth l + 1
        worth = np.arange(1, len(keys) + 1) / np.arange(1, len(keys) + 1).sum()
        parts = [
            self.depth * math.log2(1 / recipe.plan.retention),
            float((worth * [self.bits * (16 / b - 1) / 7 for b in map(mean_width, keys)]).sum()),
            float((worth * [0.5 * self.bits * (16 / b - 1) / 7 for b in map(mean_width, values)]).sum()),
            0.0 if recipe.tokens is None else self.tokens * math.log2(CONTEXT / recipe.tokens),
        ]
        if recipe.rule != "attention" and recipe.tokens is not None:
            parts[3] *= 1.5
        both = sum(a * b / (a + b) for i, a in enumerate(parts) for b in parts[:i] if a + b > 0)
        return sum(parts) + self.pairs * both

    def __call__(self, recipe: CacheRecipe) -> list[float]:
        self.asked.append(recipe)
        return [base + self.excess(recipe) for base in (3.0, 3.5, 4.0)]


def best_of(space: Space, made: Made, limit: int) -> float:
    return min(made.excess(recipe) for recipe in space.candidates(limit))


FULL = cache_bytes(CONFIG, torch.bfloat16, CONTEXT)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("pairs", [0.0, 0.5, -0.4])
def test_the_best_recipe_is_found_and_measured(factor: int, pairs: float) -> None:
    made, limit = Made(pairs=pairs), FULL // factor
    chosen = choose_recipe(space_of(), made, limit, mix=False)
    assert chosen.best.recipe in made.asked and chosen.best.bytes <= limit
    assert chosen.space.rule == "attention"
    assert chosen.best.excess <= best_of(chosen.space, made, limit) + 0.005
    assert len(set(made.asked)) == len(made.asked)  # none twice


@pytest.mark.parametrize("axes", subsets())
def test_each_subset_of_axes_keeps_to_itself(axes: tuple[str, ...]) -> None:
    made = Made(pairs=0.3)
    chosen = choose_recipe(space_of(axes), made, FULL // 2)
    assert set(axes_of(chosen.best.recipe)) <= set(axes)
    assert all(set(axes_of(recipe)) <= set(axes) for recipe in made.asked)
    everything = choose_recipe(space_of(), made, FULL // 2, evaluations=40)
    assert everything.best.excess <= chosen.best.excess + 0.01


def test_predictions_are_exact_where_effects_add_up() -> None:
    made, space = Made(), space_of(rule="attention")
    full = made.excess(space.recipe())
    known = [space.recipe(), *alone(space, FULL // 8), *combined(space, FULL // 8)]
    costs = JointCosts(space, {recipe: made.excess(recipe) - full for recipe in known})
    recipes = space.candidates(FULL // 4)
    expected = [made.excess(recipe) - full for recipe in recipes]
    # the made-up effects are straight lines, except that of bits, of which each is measured
    assert np.abs(costs.predict(recipes) - expected).max() < 1e-6
    assert np.abs(costs.coefficients).max() < 1e-6


def test_interactions_are_learnt() -> None:
    made, space = Made(pairs=0.6), space_of(rule="attention")
    known = [space.recipe(), *alone(space, FULL // 8), *combined(space, FULL // 8)]
    measured = {recipe: made.excess(recipe) for recipe in known}
    recipes = space.candidates(FULL // 8)
    expected = np.array([made.excess(recipe) for recipe in recipes])
    costs = JointCosts(space, measured)
    adding_up = np.array([costs.effects(recipe).sum() for recipe in recipes])
    assert np.abs(costs.predict(recipes) - expected).mean() < 0.2 * np.abs(adding_up - expected).mean()


def test_bits_are_mixed_where_leaders_differ() -> None:
    class Uneven(Made):
        def excess(self, recipe: CacheRecipe) -> float:
            few = [leader for leader, pair in recipe.bits.items() if min(pair) == 2]
            return super().excess(recipe) + (0.5 if any(leader >= 6 for leader in few) else 0.0)

    made = Uneven(bits=0.05)
    space = space_of(("bits",))
    limit = (space.bytes(space.recipe(None, 4, 4)) + space.bytes(space.recipe(None, 2, 2))) // 2
    plain = choose_recipe(space, made, limit, mix=False)
    mixed = choose_recipe(space, made, limit)
    assert mixed.best.excess < plain.best.excess - 0.3
    assert mixed.best.recipe.key_bits[-2:] == (4, 4)  # type: ignore[index]
    assert mixed.sensitivity[7] > mixed.sensitivity[0] and mixed.best.reason == "mixed"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 8 * FULL), st.sampled_from(subsets()), st.integers(1, 3), st.booleans())
def test_the_budget_is_respected(limit: int, axes: tuple[str, ...], batch: int, working: bool) -> None:
    space = space_of(axes, batch=batch, working=working)
    for recipe in space.candidates(limit)[::7]:
        for tokens in (CONTEXT, CONTEXT - 1, CONTEXT - 31, 300, 100):
            assert recipe.cache_bytes(CONFIG, torch.bfloat16, tokens, batch) <= space.bytes(recipe) <= limit
    full = space.recipe()
    assert space.bytes(full) == batch * FULL


def test_bytes_count_what_is_about_to_be_packed_or_evicted() -> None:
    space = space_of(rule="attention")
    for recipe in (space.recipe(LADDER[2], 4, 2, 200), space.recipe(None, 2, 16), space.recipe(None, 16, 16, 100)):
        sizes = [recipe.cache_bytes(CONFIG, torch.bfloat16, tokens) for tokens in range(1, CONTEXT + 1)]
        assert space.bytes(recipe) == max(sizes)


def test_what_a_step_unpacks_counts_for_a_memory_budget() -> None:
    space = space_of(working=True)
    pair = 2 * 8 * 2  # of one token and layer: keys and values of one head of 8 in bf16
    alone_read = space.recipe(SharingPlan.full(LAYERS), 4, 4)
    assert alone_read.working_bytes(space.kinds, space.dtype, CONTEXT) == CONTEXT * pair
    # leaders 0 and 1 are both read by later layers
    both = space.recipe(SharingPlan([0, 1, 0, 1, 0, 1, 0, 1]), 4, 4)
    assert both.working_bytes(space.kinds, space.dtype, CONTEXT) == 2 * CONTEXT * pair
    assert space.recipe(LADDER[0]).working_bytes(space.kinds, space.dtype, CONTEXT) == 0
    many = space_of(working=True, batch=8)
    assert many.recipe(None, 4, 4, 128).working_bytes(many.kinds, many.dtype, CONTEXT, 8) == 8 * 128 * pair


def test_shorter_texts_stand_for_the_context() -> None:
    space = space_of(context=2048, measured_tokens=512)
    recipe = space.recipe(LADDER[0], 4, 4, 1024)
    assert space.on_text(recipe) == replace(recipe, tokens=256)
    assert space.least_tokens == 80 and space.on_text(space.recipe(tokens=80)).tokens == 20
    assert all(tokens >= 80 for tokens in space.token_budgets())
    for tokens in range(80, 2048):
        recipe = space.recipe(tokens=tokens)
        measured = space.on_text(recipe)  # raises where a group or the recent tokens are too many
        assert measured.tokens is not None and abs(4 * measured.tokens - tokens) <= 2
        assert measured.group_size == recipe.group_size
    assert [space.group_for(tokens) for tokens in (None, 512, 511, 256, 255)] == [32, 32, 16, 16, 8]
    assert Space(CONFIG, torch.bfloat16, context=64).group_for(None) == 16


def test_front() -> None:
    chosen = choose_recipe(space_of(), Made(), FULL // 4, mix=False)
    kept = front(chosen.measured)
    assert kept[0].excess == 0 and chosen.best in kept
    for entry in chosen.measured:
        assert any(other.bytes <= entry.bytes and other.excess <= entry.excess for other in kept)
    assert [e.bytes for e in kept] == sorted((e.bytes for e in kept), reverse=True)


def test_isotonic() -> None:
    assert isotonic([1.0, 3.0, 2.0, 4.0], [1] * 4) == [1.0, 2.5, 2.5, 4.0]
    assert isotonic([3.0, 2.0, 1.0], [1] * 3) == [2.0] * 3


# On a model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(num_hidden_layers=LAYERS)


def blocks_of(count: int = 3, tokens: int = 96) -> torch.Tensor:
    return torch.randint(3, 60, (count, tokens), generator=torch.Generator().manual_seed(0))


def tiny_space(axes: tuple[str, ...] = AXES) -> Space:
    return Space(CONFIG, torch.float32, context=96, plans=LADDER, axes=axes)


def test_a_recipe_is_chosen_by_measured_losses_and_a_stopped_run_goes_on(model: Any, tmp_path: Path) -> None:
    space, path, blocks = tiny_space(), tmp_path / "losses.json", blocks_of()
    limit = cache_bytes(CONFIG, torch.float32, 96) // 4
    whole = choose_recipe(space, RecipeLosses(model, blocks, 72), limit, evaluations=6)

    class Stopped(RecipeLosses):
        def __call__(self, recipe: CacheRecipe) -> list[float]:
            if self.num_measured == 17:
                raise KeyboardInterrupt
            return super().__call__(recipe)

    with pytest.raises(KeyboardInterrupt):
        choose_recipe(space, Stopped(model, blocks, 72, path=path), limit, evaluations=6)
    kept = RecipeLosses(model, blocks, 72, path=path)
    again = choose_recipe(space, kept, limit, evaluations=6)
    assert again.best == whole.best and again.measured == whole.measured
    assert kept.num_measured == len(whole.measured) - 17
    losses = streamed_losses(model, whole.best.recipe, blocks, 72)
    assert whole.best.losses == pytest.approx(losses)
    assert whole.best.recipe.cache_bytes(CONFIG, torch.float32, 96) <= limit


def test_losses_of_something_else_are_refused(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "losses.json"
    RecipeLosses(model, blocks_of(), 72, path=path)(tiny_space().recipe())
    with pytest.raises(DepthKVError, match="losses of this model on this text"):
        RecipeLosses(model, blocks_of(), 64, path=path)
    path.write_text("{}")
    with pytest.raises(DepthKVError, match="a damaged file"):
        RecipeLosses(model, blocks_of(), 72, path=path)


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="axes among depth, bits, tokens, got 'heads'"):
        space_of(("heads",))
    with pytest.raises(RecipeError, match="at least one axis"):
        space_of(())
    with pytest.raises(PlanError, match="plans for 8 layers, got one for 4"):
        space_of(plans=[SharingPlan.every(2, 4)])
    with pytest.raises(RecipeError, match="texts of 1 to 512 tokens"):
        space_of(measured_tokens=1024)
    with pytest.raises(RecipeError, match=r"budget of at least .* for bits, got"):
        choose_recipe(space_of(("bits",)), Made(), FULL // 16)

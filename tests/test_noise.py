"""Routed training with the noise of a recipe: which bits where, gradients, recomputation, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from depthkv import RandomCrossLayer, SharingPlan, route
from depthkv.adapt import AdaptConfig, adapt
from depthkv.architectures import layer_kinds
from depthkv.attention import Pair
from depthkv.compress import CacheRecipe, recipe_noise
from depthkv.compress.quantization import fake_quantize
from depthkv.errors import CheckpointError, PlanError, RecipeError
from families import tiny_model as tiny_family
from tiny import LAYERS, tiny_model

PLAN = SharingPlan.every(2, LAYERS)
RECIPE = CacheRecipe(plan=PLAN, key_bits=(8, 2), value_bits=(2, 16), group_size=8)
TOKENS = torch.randint(3, 64, (2, 21), generator=torch.Generator().manual_seed(0))


def pair() -> Pair:
    torch.manual_seed(0)
    return torch.randn(2, 1, 21, 8), torch.randn(2, 1, 21, 8)


def test_each_source_gets_its_bits() -> None:
    noise = recipe_noise(RECIPE, layer_kinds(tiny_model().config))
    keys, values = pair()
    for layer, key_bits, value_bits in (
        (0, 8, 2),
        (2, 2, 16),
        (1, 2, 2),
        (3, 2, 2),
    ):  # 1 and 3 lead nowhere: the fewest
        found = noise(layer, (keys, values))
        expected_values = values if value_bits == 16 else fake_quantize(values, 2, 8, "channels")
        assert torch.equal(found[0], fake_quantize(keys, key_bits, 8, "tokens"))  # type: ignore[arg-type]
        assert torch.equal(found[1], expected_values)


def test_windows_stay_as_they_are() -> None:
    model = tiny_family("gemma3_text")
    kinds = layer_kinds(model.config)
    plan = SharingPlan.every(2, len(kinds), kinds=kinds)
    noise = recipe_noise(CacheRecipe(plan=plan, key_bits=2, value_bits=2), kinds)
    given = pair()
    changed = [noise(layer, given)[0] is not given[0] for layer in range(len(kinds))]
    assert changed == [kind.window is None for kind in kinds] and any(changed) and not all(changed)


def test_readers_see_what_was_rounded_once_for_each_source() -> None:
    model = tiny_model()
    seen: list[int] = []
    inner = recipe_noise(RECIPE, layer_kinds(model.config))

    def noise(layer: int, given: Pair) -> Pair:
        seen.append(layer)
        return inner(layer, given)

    class Map:
        def draw(self, step: int, kinds: Any) -> list[int]:
            return [0, 0, 0, 1]

    with route(model, Map(), noise=noise):
        noisy = model(TOKENS).logits
    assert seen == [0, 1]  # layer 1 is a source, although it reads another
    with route(model, Map()):
        exact = model(TOKENS).logits
    assert not torch.allclose(noisy, exact, atol=1e-4)
    with route(model, Map(), noise=lambda layer, given: given):
        assert torch.equal(model(TOKENS).logits, exact)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_the_identity_and_are_repeated(checkpointed: bool) -> None:
    """Weights of keys get a gradient through the rounding, the same with recomputed layers."""
    model = tiny_model().train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    noise = recipe_noise(RECIPE, layer_kinds(model.config))
    with route(model, RandomCrossLayer(cross_layer_prob=0.7, seed=3), noise=noise):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert float(found["model.layers.0.self_attn.k_proj.weight"].abs().sum()) > 0
    plain = tiny_model().train()
    with route(plain, RandomCrossLayer(cross_layer_prob=0.7, seed=3), noise=noise):
        plain(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(found[name], parameter.grad, atol=1e-6), name


def test_evaluation_mode_is_exact() -> None:
    model = tiny_model()
    expected = model(TOKENS).logits
    noise = recipe_noise(RECIPE, layer_kinds(model.config))
    with route(model, RandomCrossLayer(), only_in_training=True, noise=noise):
        assert torch.equal(model(TOKENS).logits, expected)


def test_refusals() -> None:
    kinds = layer_kinds(tiny_model().config)
    with pytest.raises(RecipeError, match="fewer than 16 bits to train with, got 2 of 4 layers keep a cache; at most"):
        recipe_noise(CacheRecipe(plan=PLAN, tokens=128), kinds)
    with pytest.raises(PlanError, match="expected a recipe for 4 layers, got one for 6"):
        recipe_noise(CacheRecipe(plan=SharingPlan.every(2, 6), key_bits=4), kinds)


def test_a_run_with_another_recipe_is_not_taken_up(tmp_path: Path) -> None:
    blocks = torch.randint(3, 64, (4, 16))
    options: dict[str, Any] = dict(block_size=16, precision="fp32", trainable="layers", max_tokens=64)

    def train(recipe: CacheRecipe | None, folder: Path) -> tuple[float, ...]:
        config = AdaptConfig(**options, cache_recipe=recipe)
        return adapt(tiny_model(), blocks, config, resume_dir=folder, progress=False).losses

    first = train(RECIPE, tmp_path / "a")
    assert train(RECIPE, tmp_path / "a") == first  # finished already
    other = CacheRecipe(plan=PLAN, key_bits=4, value_bits=4, group_size=8)
    for recipe in (other, None):
        with pytest.raises(CheckpointError, match="cache_recipe"):
            train(recipe, tmp_path / "a")
    assert train(None, tmp_path / "b") != first
    with pytest.raises(CheckpointError, match="cache_recipe"):
        train(RECIPE, tmp_path / "b")

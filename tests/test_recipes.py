"""Recipes: every pair of axes against the oracle, bytes against the formula, and what can be done to a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CONFIGS, NUM_LAYERS, tiny_model
from transformers import DynamicCache, PreTrainedModel

from depthkv import SharingPlan, share
from depthkv.architectures import layer_kinds
from depthkv.compress import CacheRecipe
from depthkv.compress.reference import reference_recipe_logits
from depthkv.memory import measured_cache_bytes

SMALL: dict[str, Any] = {"group_size": 8, "sinks": 2, "recent": 6}
AXES: dict[str, dict[str, Any]] = {
    "depth": {},
    "bits": {"key_bits": 4, "value_bits": 2, **SMALL},
    "window": {"tokens": 24, "rule": "window", **SMALL},
    "norm": {"tokens": 24, "rule": "key-norm", **SMALL},
    "attention": {"tokens": 24, "rule": "attention", **SMALL},
    "bits, window": {"key_bits": 4, "value_bits": 4, "tokens": 24, "rule": "window", **SMALL},
    "bits, norm": {"key_bits": 8, "value_bits": 4, "tokens": 24, "rule": "key-norm", **SMALL},
    "bits, attention": {"key_bits": 4, "value_bits": 8, "tokens": 24, "rule": "attention", **SMALL},
}


def plans(model: PreTrainedModel) -> list[SharingPlan]:
    kinds = layer_kinds(model.config)
    return [SharingPlan.full(NUM_LAYERS), SharingPlan.every(2, NUM_LAYERS, kinds)]


def pieces_of(*sizes: int, batch: int = 2, vocabulary: int = 97) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (batch, size), generator=generator) for size in sizes]


@torch.no_grad()
def read(
    model: PreTrainedModel, recipe: CacheRecipe, pieces: list[torch.Tensor], mask: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], DynamicCache]:
    cache = DynamicCache(config=model.config)
    mask = torch.ones_like(pieces[0]) if mask is None else mask
    logits = []
    with share(model, recipe):
        for number, piece in enumerate(pieces):
            if number:
                mask = torch.cat([mask, torch.ones_like(piece)], dim=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -piece.shape[1] :]
            output = model(
                input_ids=piece, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            logits.append(output.logits)
    return logits, cache


def largest_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor], mask: torch.Tensor | None = None) -> float:
    differences = [(a - b).abs() for a, b in zip(ours, theirs, strict=True)]
    if mask is not None:
        differences[0] = differences[0] * mask[..., None]
    return max(float(d.max()) for d in differences)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("shared", [0, 1], ids=["full", "shared"])
def test_every_pair_of_axes_equals_the_oracle(axes: str, shared: int) -> None:
    model = tiny_model("llama").double()  # so that nothing is rounded to two codes
    recipe = CacheRecipe(plan=plans(model)[shared], **AXES[axes])
    pieces = pieces_of(40, 1, 1, 1, 12, *[1] * 20)
    ours, _ = read(model, recipe, pieces)
    assert largest_difference(ours, reference_recipe_logits(model, recipe, pieces)) < 1e-4


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_equals_the_oracle(family: str) -> None:
    eager_only, no_double = family in ("gemma2", "gpt_oss"), "num_experts" in CONFIGS[family]
    for axes in ("bits", "bits, attention", "window", "attention"):
        # what differs by rounding can be rounded to two codes: where bits are few, both run the same attention
        attention = "eager" if eager_only or "bits" in axes else "sdpa"
        model = tiny_model(family, attention)
        model = model if no_double else model.double()
        recipe = CacheRecipe(plan=plans(model)[1], **AXES[axes])
        pieces = pieces_of(37, 1, 5, *[1] * 6)
        ours, _ = read(model, recipe, pieces)
        assert largest_difference(ours, reference_recipe_logits(model, recipe, pieces)) < 1e-4, axes


@pytest.mark.parametrize("axes", AXES)
def test_padded_batches_equal_the_oracle(axes: str) -> None:
    model = tiny_model("llama").double()  # so that nothing is rounded to two codes
    recipe = CacheRecipe(plan=plans(model)[1], **AXES[axes])
    pieces = pieces_of(36, 1, 1, 3, *[1] * 10, batch=3)
    mask = torch.ones_like(pieces[0])
    mask[0, :7], mask[1, :30] = 0, 0
    ours, _ = read(model, recipe, pieces, mask)
    assert largest_difference(ours, reference_recipe_logits(model, recipe, pieces, mask), mask) < 1e-4


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3", "gpt2"])
def test_bytes_are_those_of_the_formula(axes: str, dtype: torch.dtype, family: str) -> None:
    model = tiny_model(family).to(dtype)
    recipe = CacheRecipe(plan=plans(model)[1], **AXES[axes])
    for sizes in ((5,), (24,), (40,), (40, 1, 1), (20, 1, 1, 1, 1, 1, 1), (70, *[1] * 9)):
        _, cache = read(model, recipe, pieces_of(*sizes))
        # a windowed layer's cache is transformers' own: a view of more than the window
        windowed = [layer.is_sliding for layer in cache.layers]
        expected = recipe.cache_bytes(model.config, dtype, sum(sizes), 2)
        if any(windowed):
            kinds = layer_kinds(model.config)
            expected -= 2 * sum(
                recipe.layer_bytes(kinds[i], (16, 16), dtype, sum(sizes)) for i in recipe.plan.leaders if windowed[i]
            )
            cache.layers = [layer for layer in cache.layers if not layer.is_sliding]
        assert measured_cache_bytes(cache) == expected, sizes

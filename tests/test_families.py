"""Every family x every way to run: sharing equals the reference (fp32 logits within 1e-4, the same greedy tokens)."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from depthkv import SharingPlan, share
from depthkv.architectures import layer_kinds
from depthkv.memory import cache_bytes, measured_cache_bytes
from depthkv.reference import reference_forward, reference_greedy
from families import CONFIGS, NUM_LAYERS, tiny_model

EAGER_ONLY = {"gemma2", "gpt_oss"}  # in transformers 5.23
TOKENS, NEW = 19, 6
MATRIX = [(f, a) for f in CONFIGS for a in ("sdpa", "eager") if not (a == "sdpa" and f in EAGER_ONLY)]


def random_plan(model: PreTrainedModel, seed: int) -> SharingPlan:
    """A valid plan in which followers read any earlier leader of their kind, not only the nearest."""
    rng = random.Random(seed)
    leaders: dict[Any, list[int]] = {}
    sources = []
    for layer, kind in enumerate(layer_kinds(model.config)):
        mine = leaders.setdefault(kind, [])
        if not mine or rng.random() < 0.35:
            mine.append(layer)
            sources.append(layer)
        else:
            sources.append(rng.choice(mine))
    return SharingPlan(sources)


def prompt(seed: int = 1, batch: int = 2, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(2, 97, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("family", "attention"), MATRIX)
def test_family_equals_reference(family: str, attention: str) -> None:
    model = tiny_model(family, attention)
    ids = prompt()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forwards = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    config = model.config.to_dict()
    with torch.no_grad():
        full = model(ids).logits
    plans = [SharingPlan.every(2, NUM_LAYERS, layer_kinds(model.config)), random_plan(model, seed=len(family))]
    for plan in plans:
        with torch.no_grad():
            expected = reference_forward(model, plan.kv_source_layers, ids).logits
            tokens, steps = reference_greedy(model, plan.kv_source_layers, ids, NEW)
        assert (expected - full).abs().max() > 1e-2, "the plan changes nothing, so the test could not fail"
        with share(model, plan), torch.no_grad():
            for use_cache in (False, True):
                torch.testing.assert_close(model(ids, use_cache=use_cache).logits, expected, atol=1e-4, rtol=0)
            for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
                out = generate(model, ids, **options)
                assert torch.equal(out.sequences[:, TOKENS:], tokens), options
                torch.testing.assert_close(torch.stack(out.logits, 1), steps, atol=1e-4, rtol=0)
            # chunked prefill, then two turns on one cache
            cache = DynamicCache(config=model.config)
            for chunk in (ids[:, :7], ids[:, 7:12], ids[:, 12:]):
                last = model(chunk, past_key_values=cache, logits_to_keep=1).logits
            torch.testing.assert_close(last[:, -1], expected[:, -1], atol=1e-4, rtol=0)
            assert len(cache.layers) == NUM_LAYERS
    with torch.no_grad():
        assert torch.equal(model(ids).logits, full)
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == forwards
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def generate(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> Any:
    options.setdefault("attention_mask", torch.ones_like(ids))
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **options)


@pytest.mark.parametrize("family", CONFIGS)
def test_padding(family: str) -> None:
    model = tiny_model(family, "eager" if family in EAGER_ONLY else "sdpa")
    plan = SharingPlan.every(3, NUM_LAYERS, layer_kinds(model.config))
    ids = prompt(2, batch=3)
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :5] = left[1, :2] = 0
    right[0, -5:] = right[1, -2:] = 0
    with torch.no_grad():
        tokens, _ = reference_greedy(model, plan.kv_source_layers, ids, NEW, attention_mask=left)
        expected = reference_forward(model, plan.kv_source_layers, ids, attention_mask=right).logits
        with share(model, plan):
            assert torch.equal(generate(model, ids, attention_mask=left).sequences[:, TOKENS:], tokens)
            got = model(ids, attention_mask=right).logits
    torch.testing.assert_close(got[right.bool()], expected[right.bool()], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_cache_bytes_are_proportional_to_leaders(family: str) -> None:
    model = tiny_model(family, "eager" if family in EAGER_ONLY else "sdpa")
    plan = SharingPlan.every(2, NUM_LAYERS, layer_kinds(model.config))
    ids = prompt()
    for given in (None, plan):
        cache = DynamicCache(config=model.config)
        static = StaticCache(config=model.config, max_cache_len=32)
        with share(model, given or SharingPlan.full(NUM_LAYERS)), torch.no_grad():
            model(ids, past_key_values=static)
            # token by token, so that a sliding layer holds its window and no view of a longer prompt
            for position in range(TOKENS):
                model(ids[:, position : position + 1], past_key_values=cache)
        layers = plan.leaders if given else range(NUM_LAYERS)
        held = [i for i in range(NUM_LAYERS) if getattr(cache.layers[i], "keys", None) is not None]
        assert held == list(layers)
        assert [i for i in range(NUM_LAYERS) if getattr(static.layers[i], "keys", None) is not None] == list(layers)
        exact = cache_bytes(model.config, torch.float32, TOKENS, batch=2, plan=given)
        window = any(kind.window for kind in layer_kinds(model.config))
        # torch.cat makes a window of w tokens, of which w - 1 are kept as a view
        assert exact <= measured_cache_bytes(cache) <= exact * (8 / 7 if window else 1)

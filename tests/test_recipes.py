"""Recipes: every pair of axes against the oracle, bytes against the formula, and what can be done to a cache."""

from __future__ import annotations

import json
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel

from depthkv import SharingPlan, share
from depthkv.architectures import layer_kinds
from depthkv.compress import CacheRecipe, Stored
from depthkv.compress.cache import CompressedLayer
from depthkv.compress.packing import PackedTensor
from depthkv.compress.reference import reference_recipe_logits
from depthkv.errors import CacheMismatchError, PlanError, RecipeError
from depthkv.memory import measured_cache_bytes
from families import CONFIGS, NUM_LAYERS, tiny_model

SMALL: dict[str, Any] = {"group_size": 8, "sinks": 2, "recent": 6}
AXES: dict[str, dict[str, Any]] = {
    "depth": {},
    "bits": {"key_bits": 4, "value_bits": 2, **SMALL},
    "window": {"tokens": 24, "rule": "window", **SMALL},
    "norm": {"tokens": 24, "rule": "key-norm", **SMALL},
    "attention": {"tokens": 24, "rule": "attention", **SMALL},
    "bits, window": {"key_bits": 4, "value_bits": 4, "tokens": 24, "rule": "window", **SMALL},
    "bits, norm": {"key_bits": 8, "value_bits": 4, "tokens": 24, "rule": "key-norm", **SMALL},
    "fp8": {"key_bits": "fp8", "value_bits": 4, **SMALL},
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
        # eager attention rounds its weights to fp32, so that a number can fall to the next code on one side
        attention, most = ("eager", 5e-3) if eager_only or "bits" in axes else ("sdpa", 1e-4)
        model = tiny_model(family, attention)
        model = model if no_double else model.double()
        recipe = CacheRecipe(plan=plans(model)[1], **AXES[axes])
        pieces = pieces_of(37, 1, 5, *[1] * 6)
        ours, _ = read(model, recipe, pieces)
        assert largest_difference(ours, reference_recipe_logits(model, recipe, pieces)) < most, axes


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


# What can be done to a cache


def on_cache(model: PreTrainedModel, recipe: CacheRecipe, first: list[torch.Tensor]) -> Any:
    """A cache that has read `first`, and a function that reads another piece through it."""
    _, cache = read(model, recipe, first)

    @torch.no_grad()
    def go_on(piece: torch.Tensor) -> torch.Tensor:
        with share(model, recipe):
            logits: torch.Tensor = model(input_ids=piece, past_key_values=cache, use_cache=True).logits
        return logits

    return cache, go_on


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("operation", ["reorder", "select", "repeat"])
def test_rows_can_be_reordered_selected_and_repeated(axes: str, operation: str) -> None:
    model = tiny_model("llama").double()
    recipe = CacheRecipe(plan=plans(model)[1], **AXES[axes])
    first, last = pieces_of(40, 1, 1), pieces_of(3)[0]
    cache, go_on = on_cache(model, recipe, first)
    if operation == "reorder":
        rows = [1, 1]
        cache.reorder_cache(torch.tensor(rows))
    elif operation == "select":
        rows = [1]
        cache.batch_select_indices(torch.tensor(rows))
    else:
        rows = [0, 0, 1, 1]
        cache.batch_repeat_interleave(2)
    last = last[[row % 2 for row in rows]]
    _, alone = on_cache(model, recipe, [piece[rows] for piece in first])
    assert torch.allclose(go_on(last), alone(last), atol=1e-6)


@pytest.mark.parametrize("axes", AXES)
def test_recent_tokens_can_be_taken_back(axes: str) -> None:
    model = tiny_model("llama").double()
    recipe = CacheRecipe(plan=plans(model)[1], **AXES[axes])
    pieces = pieces_of(33, 1, 4)  # nothing is packed or evicted between 34 and 38 tokens
    cache, go_on = on_cache(model, recipe, pieces)
    cache.crop(-3)
    wanted, _ = read(model, recipe, [pieces[0], pieces[1], pieces[2][:, :1], pieces[1]])
    assert cache.get_seq_length() == 35
    assert torch.allclose(go_on(pieces[1]), wanted[-1], atol=1e-6)
    if "tokens" in AXES[axes]:
        with pytest.raises(CacheMismatchError, match="crop at most 9 tokens"):
            cache.crop(-10)
    else:
        cache.crop(-20)  # what was packed is unpacked
        assert cache.get_seq_length() == 16 and torch.isfinite(go_on(pieces[1])).all()
        assert measured_cache_bytes(cache) == recipe.cache_bytes(model.config, torch.float64, 17, 2)
    cache.crop(-cache.get_seq_length())
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("axes", [axes for axes in AXES if axes != "depth"])  # those layers are transformers' own
def test_a_cache_is_reset_and_moved(axes: str) -> None:
    model = tiny_model("llama").double()
    recipe = CacheRecipe(plan=plans(model)[1], **AXES[axes])
    pieces = pieces_of(40, 1, 3)
    cache, go_on = on_cache(model, recipe, pieces[:2])
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    expected, _ = read(model, recipe, pieces)
    assert torch.allclose(go_on(pieces[2]), expected[2], atol=1e-9)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.allclose(go_on(pieces[0]), expected[0], atol=1e-9)
    assert torch.allclose(go_on(pieces[1]), expected[1], atol=1e-9)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "prefill_chunk_size": 16},
    ],
    ids=["greedy", "beams", "samples", "chunked prefill"],
)
def test_generate(axes: str, options: dict[str, Any]) -> None:
    model = tiny_model("llama")
    recipe = CacheRecipe(plan=plans(model)[1], **AXES[axes])
    prompt = pieces_of(40)[0]
    settings = {"max_new_tokens": 20, "return_dict_in_generate": True, **options}
    with share(model, recipe):
        torch.manual_seed(0)
        output = model.generate(prompt, **settings)
    held = measured_cache_bytes(output.past_key_values)
    rows = output.past_key_values.layers[0].keys.shape[0]
    assert output.sequences.shape[1] == 60
    assert held == recipe.cache_bytes(model.config, torch.float32, 59, rows)


@pytest.mark.parametrize("axes", ["bits", "window"])
def test_prompt_lookup_gives_the_same_tokens(axes: str) -> None:
    model = tiny_model("llama")
    recipe = CacheRecipe(plan=plans(model)[1], **(AXES[axes] | {"recent": 12, "tokens": None}))
    prompt = torch.arange(3, 13).repeat(1, 4)
    with share(model, recipe):
        plain = model.generate(prompt, max_new_tokens=12, do_sample=False)
        assert len(plain[0]) == 52
        looked_up = model.generate(prompt, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    if axes == "window":  # without fewer bits, the order in which tokens come makes no difference
        assert torch.equal(plain, looked_up)
    assert looked_up.shape == plain.shape


def test_each_leader_is_unpacked_once_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    recipe = CacheRecipe(plan=SharingPlan([0, 0, 0, 3, 3, 3]), **AXES["bits"])
    calls = []
    unpack = PackedTensor.unpack
    monkeypatch.setattr(PackedTensor, "unpack", lambda self, *args: (calls.append(1), unpack(self, *args))[1])
    read(model, recipe, pieces_of(40, 1, 1))
    assert len(calls) == 2 * 2 * 2  # steps after the prompt, leaders, keys and values


def test_unpacked_pairs_are_freed_after_the_last_reader() -> None:
    model = tiny_model("llama")
    recipe = CacheRecipe(plan=SharingPlan([0, 0, 0, 3, 3, 3]), **AXES["bits"])
    alive: list[int] = []
    made: list[weakref.ref[torch.Tensor]] = []
    inner = CompressedLayer._unpacked

    def unpacked(self: CompressedLayer) -> Any:
        alive.append(sum(ref() is not None for ref in made))
        pair = inner(self)
        made.extend(weakref.ref(part) for part in pair)
        return pair

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompressedLayer, "_unpacked", unpacked)
        read(model, recipe, pieces_of(40, 1, 1, 1))
    assert set(alive) == {0}  # when the next leader is unpacked, the one before is gone


def test_gradients_reach_the_tokens_of_a_step() -> None:
    model = tiny_model("llama").double()
    first, last = pieces_of(20, 12)
    found = []
    for how in (plans(model)[1], CacheRecipe(plan=plans(model)[1], tokens=200, **SMALL)):
        cache = DynamicCache(config=model.config)
        with share(model, how):
            with torch.no_grad():
                model(input_ids=first, past_key_values=cache)
            model.zero_grad()
            model(input_ids=last, past_key_values=cache, labels=last).loss.backward()
        found.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert torch.allclose(*found)


def test_a_model_with_checkpointing_makes_no_cache() -> None:
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens, found = pieces_of(40)[0], []
    for how in (plans(model)[1], CacheRecipe(plan=plans(model)[1], **AXES["bits, window"])):
        model.zero_grad()
        with share(model, how):
            output = model(input_ids=tokens, labels=tokens)
            output.loss.backward()
        assert output.past_key_values is None
        found.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert torch.allclose(*found)


def test_an_empty_recipe_is_its_plan() -> None:
    model = tiny_model("llama")
    recipe = CacheRecipe(plan=plans(model)[1])
    pieces = pieces_of(20, 1, 1)
    with share(model, recipe.plan), torch.no_grad():
        cache = DynamicCache(config=model.config)
        plain = [model(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    assert largest_difference(read(model, recipe, pieces)[0], plain) == 0


def test_a_rule_of_ones_own() -> None:
    class Oldest:
        needs_attention = False

        def scores(self, stored: Stored) -> torch.Tensor:
            return -torch.arange(stored.keys.shape[2]).expand(stored.keys.shape[:3])

    model = tiny_model("llama").double()
    recipe = CacheRecipe(plan=plans(model)[1], tokens=24, rule=Oldest(), **SMALL)
    pieces = pieces_of(40, 1, 1, 3)
    ours, _ = read(model, recipe, pieces)
    assert largest_difference(ours, reference_recipe_logits(model, recipe, pieces)) < 1e-4
    with pytest.raises(RecipeError, match="to write a recipe, got Oldest"):
        recipe.to_dict()


# Errors


def test_refusals() -> None:
    model = tiny_model("llama")
    recipe = CacheRecipe(plan=plans(model)[1], **AXES["bits"])
    other = CacheRecipe(plan=plans(model)[1], **AXES["window"])
    _, cache = read(model, recipe, pieces_of(9))
    with share(model, other), pytest.raises(CacheMismatchError, match="made under the same recipe, got 9 tokens"):
        model(input_ids=pieces_of(1)[0], past_key_values=cache)
    with pytest.raises(CacheMismatchError):
        model(input_ids=pieces_of(1)[0], past_key_values=cache)  # no longer shared
    with pytest.raises(PlanError, match="got a recipe"):
        share(model, recipe, kv_budget="1MiB")
    with share(model, recipe), pytest.raises(RecipeError, match="got a recipe"):
        model.generate(pieces_of(4)[0], kv_budget="1MiB", max_new_tokens=2)
    _, cache = read(model, recipe, pieces_of(9))
    with share(model, recipe.plan), pytest.raises(CacheMismatchError, match="filled under a recipe"):
        model(input_ids=pieces_of(1)[0], past_key_values=cache)
    with share(model, CacheRecipe(plan=recipe.plan)), pytest.raises(CacheMismatchError, match="another recipe"):
        model(input_ids=pieces_of(1)[0], past_key_values=cache)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :25] = 0
    with share(model, recipe), pytest.raises(CacheMismatchError, match="padding in the first piece"):
        model.generate(pieces_of(40)[0], attention_mask=mask, prefill_chunk_size=16, max_new_tokens=2)
    flex = tiny_model("llama", "flex_attention")
    with share(flex, recipe), warnings.catch_warnings(), pytest.raises(RecipeError, match="makes its own mask"):
        warnings.simplefilter("ignore")  # of torch, to transformers
        flex(input_ids=pieces_of(9)[0])
    with share(model, recipe), pytest.raises(CacheMismatchError, match="dynamic cache"):
        model.generate(pieces_of(4)[0], cache_implementation="static", max_new_tokens=2, disable_compile=True)
    with pytest.raises(PlanError, match="expected a recipe for 6 layers, got one for 4"):
        share(model, CacheRecipe(plan=SharingPlan.every(2, 4)))
    bad = CacheRecipe(plan=plans(model)[1], tokens=24, rule=_Wrong(), **SMALL)
    with pytest.raises(RecipeError, match=r"scores of shape \[2, 2, 40\]"):
        read(model, bad, pieces_of(40))


class _Wrong:
    needs_attention = False

    def scores(self, stored: Stored) -> torch.Tensor:
        return torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_bits": 3}, "expected key_bits to be one of 16, 8, fp8, 4, 2, got 3"),
        ({"key_bits": True}, "got True"),
        ({"value_bits": [4, 4]}, "expected value_bits for each of the 3 leaders, got 2"),
        ({"value_bits": [4, 4, 5]}, r"value_bits\[2\]"),
        ({"group_size": 0}, "group_size to be a whole number of at least 1, got 0"),
        ({"group_size": 12, "key_bits": 4}, "that 8 divides, got 12"),
        ({"tokens": 60}, r"at least sinks \+ recent \+ group_size = 68, got 60"),
        ({"tokens": 1.5}, "tokens to be a whole number"),
        ({"rule": "snap"}, "rule to be one of window, key-norm, attention"),
        ({"rule": 3}, "rule to be one of"),
        ({"sinks": -1}, "sinks to be a whole number of at least 0"),
        ({"recent": "many"}, "recent to be a whole number"),
        ({"version": 2}, '"version": 1, got 2'),
        ({"format": "depthkv-plan"}, '"format": "depthkv-recipe"'),
        ({"bits": 4}, "expected only the keys"),
        ({"kv_source_layers": [1]}, "layer 0"),
        ({"provenance": []}, "provenance as a JSON object, got list"),
    ],
)
def test_files_are_checked_strictly(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = CacheRecipe(plan=SharingPlan.every(2, 6), key_bits=(8, 4, 4), value_bits=2, tokens=128)
    path = tmp_path / "recipe.json"
    recipe.save(path)
    assert CacheRecipe.load(path) == recipe
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | change))
    with pytest.raises((RecipeError, PlanError), match=message) as caught:
        CacheRecipe.load(path)
    assert str(path) in str(caught.value)


@settings(max_examples=500, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5))
def test_any_value_gives_a_clear_error_or_a_recipe(value: Any) -> None:
    data = CacheRecipe(plan=SharingPlan.every(2, 6)).to_dict()
    for key in data:
        try:
            CacheRecipe.from_dict(data | {key: value})
        except (RecipeError, PlanError) as error:
            assert "expected" in str(error)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 400), st.integers(1, 24), st.integers(0, 5), st.integers(1, 20), st.integers(0, 60))
def test_kept_tokens_never_exceed_the_budget(seen: int, group: int, sinks: int, recent: int, more: int) -> None:
    tokens = sinks + recent + group + more
    recipe = CacheRecipe(plan=SharingPlan.full(2), group_size=group, sinks=sinks, recent=recent, tokens=tokens)
    kept = recipe.kept_tokens(seen)
    assert kept <= min(seen, tokens) and (seen <= tokens or kept > tokens - group)

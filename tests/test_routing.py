"""`route` in training: maps, gradients, checkpointing, accumulation, autocast."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import PreTrainedModel

from depthkv import RandomCrossLayer, SharingPlan, route, share
from depthkv.architectures import layer_kinds
from depthkv.errors import DepthKVError, PlanError, UnsupportedModelError
from depthkv.reference import reference_forward
from depthkv.samplers import CrossLayerAttention
from families import CONFIGS, NUM_LAYERS, tiny_model

IDS = torch.randint(2, 97, (2, 11), generator=torch.Generator().manual_seed(5))
SAMPLER = RandomCrossLayer(cross_layer_prob=0.6, seed=0)


class Fixed:
    """Draws the maps it was given, one after the other."""

    def __init__(self, *maps: list[int]) -> None:
        self.maps = maps

    def draw(self, step: int, kinds: Any) -> list[int]:
        return self.maps[step % len(self.maps)]


# layer 2 reads layer 1, which itself reads layer 0: valid in training, no SharingPlan
CHAIN = [0, 0, 1, 3, 2, 0]


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], atol=1e-11, rtol=1e-9, msg=name)


def train_model(family: str = "llama") -> PreTrainedModel:
    model = tiny_model(family, "eager").double().train()
    model.config._experts_implementation = "eager"  # torch's grouped product has no fp64
    for module in model.modules():
        for name in ("p", "attention_dropout", "residual_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def test_distribution_is_the_papers() -> None:
    kinds = ["a"] * 5
    draws = [SAMPLER.draw(step, kinds) for step in range(20_000)]
    assert {draw[0] for draw in draws} == {0}
    for layer in range(1, 5):
        counts = Counter(draw[layer] for draw in draws)
        expected = [0.6 / layer * len(draws)] * layer + [0.4 * len(draws)]
        assert chisquare([counts[source] for source in range(layer + 1)], expected).pvalue > 1e-4
    # layers draw independently
    pairs = Counter((draw[1], draw[2] == 2) for draw in draws)
    expected = [len(draws) * p * q for p in (0.6, 0.4) for q in (0.6, 0.4)]
    assert chisquare([pairs[0, False], pairs[0, True], pairs[1, False], pairs[1, True]], expected).pvalue > 1e-4


def test_draws_depend_on_seed_and_step_alone() -> None:
    kinds = [None] * 12
    assert SAMPLER.draw(7, kinds) == RandomCrossLayer(cross_layer_prob=0.6, seed=0).draw(7, kinds)
    assert SAMPLER.draw(7, kinds) != SAMPLER.draw(8, kinds)
    assert SAMPLER.draw(7, kinds) != RandomCrossLayer(cross_layer_prob=0.6, seed=1).draw(7, kinds)
    # written down, so that another Python or platform that drew otherwise would be noticed
    assert SAMPLER.draw(0, kinds) == [0, 0, 0, 3, 0, 3, 6, 4, 1, 9, 10, 4]


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan"), "0.5", True])
def test_bad_probability(bad: Any) -> None:
    with pytest.raises(DepthKVError, match="cross_layer_prob between 0 and 1"):
        RandomCrossLayer(cross_layer_prob=bad)


def test_kinds_never_mix() -> None:
    kinds = ["s", "s", "f", "s", "f", "f"]
    for step in range(200):
        for layer, source in enumerate(RandomCrossLayer(cross_layer_prob=1.0).draw(step, kinds)):
            assert kinds[layer] == kinds[source]


@pytest.mark.parametrize("family", CONFIGS)
def test_loss_and_gradients_equal_the_reference(family: str) -> None:
    model = train_model(family)
    with route(model, SAMPLER, step=3) as routing:
        loss = model(IDS, labels=IDS).loss
        loss.backward()
    got = gradients(model)
    sources = routing.last_plan.kv_source_layers
    assert list(sources) == SAMPLER.draw(3, layer_kinds(model.config))
    assert sources != tuple(range(NUM_LAYERS))
    expected = reference_forward(model, sources, IDS, labels=IDS).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    # fused projections get a gradient of exactly zero for K and V that nobody reads, in both
    assert_same(got, gradients(model))


def test_a_chain_is_not_a_plan_but_trains() -> None:
    model = train_model()
    with pytest.raises(PlanError):
        SharingPlan(CHAIN)
    with route(model, Fixed(CHAIN)):
        model(IDS, labels=IDS).loss.backward()
    got = gradients(model)
    reference_forward(model, CHAIN, IDS, labels=IDS).loss.backward()
    assert_same(got, gradients(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "gemma3_text", "qwen3_moe"])
def test_checkpointing_gives_the_same_gradients(family: str) -> None:
    """Two forwards, then one backward: each recomputation has to find its own forward's map and pairs."""

    def step(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        with route(model, SAMPLER, step=2):
            first = model(IDS, labels=IDS).loss
            second = model(IDS.flip(1), labels=IDS.flip(1)).loss
            (first + 2 * second).backward()
        return gradients(model)

    model = train_model(family)
    expected = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(step(model), expected)
    plan = SharingPlan.every(3, NUM_LAYERS, layer_kinds(model.config))
    with share(model, plan):
        model(IDS, labels=IDS).loss.backward()
    got = gradients(model)
    model.gradient_checkpointing_disable()
    reference_forward(model, plan.kv_source_layers, IDS, labels=IDS).loss.backward()
    assert_same(got, gradients(model))


def test_checkpoint_wrapper_of_torch_distributed() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model = train_model()
    with route(model, SAMPLER, step=2):
        model(IDS, labels=IDS).loss.backward()
    expected = gradients(model)
    layer_class = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layer_class))
    with route(model, SAMPLER, step=2):
        model(IDS, labels=IDS).loss.backward()
    got = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients(model).items()}
    assert_same(got, expected)


def test_reentrant_checkpointing_is_refused() -> None:
    model = train_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for make in (lambda: route(model, SAMPLER), lambda: share(model, SharingPlan.every(2, NUM_LAYERS))):
        with pytest.raises(UnsupportedModelError, match="use_reentrant=True"):
            make()
    model.gradient_checkpointing_disable()
    with route(model, SAMPLER):  # switched on later
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(UnsupportedModelError, match="use_reentrant=True"):
            model(IDS, labels=IDS)
    model(IDS)


def test_accumulation_and_autocast() -> None:
    model = tiny_model("llama").train()
    maps = []
    with route(model, SAMPLER) as routing, torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            model(IDS, labels=IDS).loss.backward()
            maps.append(routing.last_plan.kv_source_layers)
    assert maps == [tuple(SAMPLER.draw(step, [0] * NUM_LAYERS)) for step in range(3)]
    assert routing.step == 3
    total = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        for sources in maps:
            reference_forward(model, sources, IDS, labels=IDS).loss.backward()
    for name, expected in gradients(model).items():
        torch.testing.assert_close(total[name], expected, atol=2e-2, rtol=2e-2)


def test_unread_projections_are_skipped_only_on_request() -> None:
    model = train_model()
    layer_1 = "model.layers.1.self_attn.k_proj.weight"
    for skip in (True, False):
        with route(model, Fixed([0, 0, 0, 0, 0, 0]), skip_unread=skip):
            model(IDS, labels=IDS).loss.backward()
        found = gradients(model)
        assert layer_1 not in found if skip else not found[layer_1].any()  # nothing depends on it
        model.zero_grad()
    calls = []
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *a: calls.append(a[2].abs().max()))
    for skip in (True, False):
        with route(model, Fixed([0, 0, 0, 0, 0, 0]), skip_unread=skip):
            model(IDS)
    hook.remove()
    assert calls[0] == 0 and calls[1] > 0


def test_a_map_may_be_a_tensor() -> None:
    model = train_model()
    with route(model, Fixed(torch.tensor(CHAIN))) as routing:  # type: ignore[arg-type]
        model(IDS)
    assert list(routing.last_plan.kv_source_layers) == CHAIN


def test_routing_refuses_a_cache_and_bad_maps() -> None:
    model = train_model()
    with route(model, SAMPLER), pytest.raises(PlanError, match="generate under share"):
        model.generate(IDS, max_new_tokens=2)
    not_whole = "Fixed to draw a whole number for each layer"
    for bad, message in [
        ([0] * 5, "6 sources, got 5"),
        ([0, 2, 0, 0, 0, 0], "layer 1 to read itself or an earlier"),
        ([0.0] * 6, not_whole),
        (None, not_whole),
    ]:
        with route(model, Fixed(bad)), pytest.raises(PlanError, match=message):
            model(IDS)
    with pytest.raises(PlanError, match="expected a sampler"):
        route(model, 0.6)  # type: ignore[arg-type]
    with route(train_model("gemma3_text"), Fixed([0, 0, 0, 0, 0, 0])) as routing:
        with pytest.raises(PlanError, match="of its own kind"):
            routing._decoder.model(IDS)


def test_restores_the_model() -> None:
    model = tiny_model("qwen3")
    with torch.no_grad():
        before = model(IDS).logits
        with route(model, SAMPLER):
            assert not torch.equal(model(IDS).logits, before)
        assert torch.equal(model(IDS).logits, before)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_every_weight_gets_a_gradient_where_nothing_is_skipped() -> None:
    """As DistributedDataParallel wants it; of what nobody reads it is zero, and the others are the same."""
    ids = torch.arange(12).reshape(2, 6)
    found = []
    for skip_unread in (True, False):
        model = tiny_model("llama").train()
        with route(model, CrossLayerAttention(group_size=2), skip_unread=skip_unread):
            model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    name = "model.layers.1.self_attn.k_proj.weight"
    assert found[0][name] is None and found[1][name] is not None and not found[1][name].any()
    assert all(gradient is not None for gradient in found[1].values())
    for name, gradient in found[0].items():
        if gradient is not None:
            torch.testing.assert_close(found[1][name], gradient)

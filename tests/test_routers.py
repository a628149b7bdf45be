"""Routers: how they are made, what they decide, their files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from depthkv import SharingPlan, share
from depthkv.adaptive import Prompt
from depthkv.adaptive.features import NUM_STATISTICS, pooled, prompt_features, token_statistics
from depthkv.adaptive.files import AnyRouter, load_router, save_router
from depthkv.adaptive.learned import LearnedRouter, RouterTraining, train_router
from depthkv.adaptive.measure import continuation_losses, plan_losses, varied_plans
from depthkv.adaptive.portfolio import PortfolioRouter, decision_layer, fit_portfolio, portfolio_features
from depthkv.adaptive.similarity import SimilarityRouter, kv_distance, passes, similarity_router, similarity_weights
from depthkv.architectures import layer_kinds
from depthkv.errors import DepthKVError, PlanError
from families import CONFIGS, NUM_LAYERS, tiny_config, tiny_model
from test_families import EAGER_ONLY

TOKENS = 24


def prompts(number: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 97, (TOKENS,), generator=generator) for _ in range(number)]


def decisions(model: PreTrainedModel, router: AnyRouter, texts: list[torch.Tensor]) -> list[tuple[int, ...]]:
    found = []
    with share(model, router) as handle, torch.no_grad():
        for tokens in texts:
            model(input_ids=tokens[None], use_cache=False)
            found.append(handle.last_maps[0])
    return found


def kept(maps: list[tuple[int, ...]]) -> float:
    return sum(len(set(sources)) for sources in maps) / len(maps) / len(maps[0])


# Features


def test_token_statistics_count_what_came_before() -> None:
    repeated = token_statistics(torch.tensor([1, 2, 3, 4] * 4))
    assert repeated[:3].tolist() == pytest.approx([12 / 16, 11 / 15, 9 / 13])
    assert token_statistics(torch.arange(16))[:3].tolist() == [0, 0, 0]
    assert token_statistics(torch.tensor([7])).shape == (NUM_STATISTICS,)


def test_pooled_features_see_the_prompt_alone() -> None:
    hidden = torch.randn(2, 40, 8)
    part = pooled(hidden, 30)
    torch.testing.assert_close(part, pooled(hidden[:, :30]))
    torch.testing.assert_close(part, hidden[:, :30].mean(1))
    assert prompt_features(None, hidden[0])[:NUM_STATISTICS].tolist() == [0] * NUM_STATISTICS


# Similarity


def test_distance_is_relative_and_ignores_what_is_equal() -> None:
    own = (torch.randn(2, 9, 4), torch.randn(2, 9, 4))
    at = Prompt(kinds=(), num_tokens=9).positions(4)
    assert at.tolist() == [0, 3, 5, 8]
    assert float(kv_distance(own, own, at)) == 0
    zero = (torch.zeros(2, 9, 4), torch.zeros(2, 9, 4))
    assert float(kv_distance(own, zero, at)) == pytest.approx(2)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_threshold_meets_the_mean_retention(family: str) -> None:
    model = tiny_model(family)
    texts = prompts(10)
    steps: list[int] = []
    for retention in (0.4, 0.7, 1.0):
        steps.clear()
        router = similarity_router(model, texts, retention, advance=steps.append)
        assert sum(steps) == passes(len(texts))
        maps = decisions(model, router, texts)
        floor = len(set(layer_kinds(model.config))) / NUM_LAYERS
        assert abs(kept(maps) - max(retention, floor)) < 0.12
    assert len(set(decisions(model, similarity_router(model, texts, 0.6), prompts(20, seed=1)))) > 1


def test_costs_weigh_distances() -> None:
    distances = torch.full((3, 3), 0.5, dtype=torch.float64)
    cost = torch.tensor([[0, torch.inf, torch.inf], [0.2, 0, torch.inf], [-0.1, 0.4, 0]])
    weights = similarity_weights(distances, cost)
    assert weights[1, 0] == pytest.approx(0.4) and weights[2, 1] == pytest.approx(0.8)
    assert 0 < weights[2, 0] < 0.001 and weights[0, 1] == torch.inf
    router = SimilarityRouter(weights, 0.1, layer_kinds(tiny_model("llama", num_hidden_layers=3).config))
    own = (torch.randn(2, 4, 8), torch.randn(2, 4, 8))
    prompt = Prompt(kinds=router.kinds, num_tokens=4, sources=[0, 1], pairs={0: own, 1: own})
    assert router.source(2, prompt, own) == 0  # equal distances: the cheaper one
    far = (torch.zeros(2, 4, 8), own[1])
    router.threshold = 1e-9
    assert router.source(2, Prompt(kinds=router.kinds, num_tokens=4, sources=[0], pairs={0: far}), own) == 2
    with pytest.raises(DepthKVError, match="expected prompts and a retention"):
        similarity_router(tiny_model("llama"), [], 0.5)
    with pytest.raises(PlanError, match="weights for 3 layers"):
        SimilarityRouter(torch.ones(2, 2), 0.1, router.kinds)


# Portfolio


def planted(number: int = 40) -> tuple[list[SharingPlan], torch.Tensor, torch.Tensor]:
    """Two plans of which a feature tells the better one, and a large plan that helps half of the inputs much."""
    plans = [SharingPlan([0, 1, 1, 1, 1, 1]), SharingPlan([0, 0, 0, 0, 4, 4]), SharingPlan([0, 1, 2, 3, 3, 3])]
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(number, 5, generator=generator, dtype=torch.float64)
    losses = torch.stack([3 + features[:, 0], 3 - features[:, 0], 1 - features[:, 1]], 1)
    return plans, losses, features


def test_portfolio_takes_the_plan_that_is_expected_to_be_best() -> None:
    kinds = layer_kinds(tiny_model("llama").config)
    plans, losses, features = planted()
    router = fit_portfolio(plans[:2], losses[:, :2], features, 2 / 6, kinds)
    chosen = [router.choose(row) for row in features]
    assert chosen == losses[:, :2].argmin(1).tolist()
    assert router.decides_at == decision_layer(plans[:2]) == 1
    # the large plan goes to those that gain most, as many as the mean allows
    mean = 3 / 6
    router = fit_portfolio(plans, losses, features, mean, kinds)
    large = [router.choose(row) == 2 for row in features]
    sizes = [plans[router.choose(row)].retention for row in features]
    assert router.price > 0 and abs(sum(sizes) / len(sizes) - mean) < 0.05
    gain = losses[:, :2].amin(1) - losses[:, 2]
    assert gain[torch.tensor(large)].mean() > gain[~torch.tensor(large)].mean() + 0.5
    with pytest.raises(DepthKVError, match="at most 20% of the layers"):
        fit_portfolio(plans, losses, features, 0.2, kinds)
    with pytest.raises(DepthKVError, match="two inputs or more"):
        fit_portfolio(plans, losses[:1], features[:1], 0.5, kinds)


def test_what_is_left_out_is_predicted_as_if_it_had_not_been_there() -> None:
    from depthkv.adaptive import portfolio

    x = torch.randn(9, 4, dtype=torch.float64)
    x = x - x.mean(0)
    y = torch.randn(9, 2, dtype=torch.float64)
    weights, left_out = portfolio._ridge(x, y, 3.0)
    torch.testing.assert_close(weights[:, 0], y.mean(0))
    for row in range(9):
        rest = [i for i in range(9) if i != row]
        # ridge with a free intercept, fitted without the row
        mean = x[rest].mean(0)
        a, b = x[rest] - mean, y[rest] - y[rest].mean(0)
        slope = torch.linalg.solve(a.T @ a + 3 * torch.eye(4, dtype=a.dtype), a.T @ b)
        torch.testing.assert_close(left_out[row], y[rest].mean(0) + (x[row] - mean) @ slope)


@pytest.mark.parametrize("family", CONFIGS)
def test_portfolio_gives_one_of_its_plans(family: str) -> None:
    model = tiny_model(family, "eager" if family in EAGER_ONLY else "sdpa")
    kinds = layer_kinds(model.config)
    plans = [p for p in varied_plans(kinds, 0.67) + varied_plans(kinds, 0.5)]
    texts = prompts(6)
    blocks = torch.stack(texts)
    losses = plan_losses(model, plans, blocks, 12)
    features = portfolio_features(model, plans, [row[:12] for row in texts])
    assert features.shape[0] == 6 and bool(features.isfinite().all())
    router = fit_portfolio(plans, losses, features, 0.7, kinds)
    own, maps = continuation_losses(model, router, blocks, 12, batch_size=3)
    sources = [plan.kv_source_layers for plan in plans]
    for row, found in enumerate(maps):
        assert found in sources
        # the prompt through the cache and the rest after it, or all at once: the same loss
        assert own[row] == pytest.approx(float(losses[row, sources.index(found)]), abs=1e-3)


# Learned


def test_gates_that_are_sure_are_the_plan() -> None:
    model = tiny_model("llama")
    ids = torch.stack(prompts(3))
    plan = SharingPlan.from_leaders([0, 2, 3], NUM_LAYERS)
    with share(model, plan), torch.no_grad():
        expected = model(input_ids=ids).logits
    with RouterTraining(model, plan) as training, torch.no_grad():
        training.bias.mul_(50)
        training.prompts(ids, 12)
        got = model(input_ids=ids).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert [gate.round().tolist() for gate in training.gates] == [[float(i in (2, 3))] * 3 for i in range(1, 6)]
    with torch.no_grad():
        assert (model(input_ids=ids).logits - expected).abs().max() > 1e-3  # removed


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_training_reaches_the_budget_and_lowers_the_loss(family: str) -> None:
    model = tiny_model(family)
    kinds = layer_kinds(model.config)
    # what the model itself writes with all caches, so that sharing costs something
    heads = torch.stack(prompts(8))[:, :12]
    blocks = model.generate(heads, attention_mask=torch.ones_like(heads), max_new_tokens=12, do_sample=False)
    start = SharingPlan.for_retention(0.5, kinds)
    router = train_router(model, blocks, 0.67, start, prompt_tokens=12, steps=40, batch_size=4, learning_rate=0.05)
    assert all(p.requires_grad for p in model.parameters())
    assert float(router.weights.abs().max()) > 0
    losses, maps = continuation_losses(model, router, blocks, 12)
    assert abs(kept(maps) - 0.67) < 0.17
    first, _ = continuation_losses(
        model, LearnedRouter(router.weights * 0, torch.full((NUM_LAYERS,), -1.0), kinds), blocks, 12
    )
    assert sum(losses) < sum(first), "trained heads are worse than sharing everything"
    again = train_router(model, blocks, 0.67, start, prompt_tokens=12, steps=40, batch_size=4, learning_rate=0.05)
    assert torch.equal(router.weights, again.weights) and router.threshold == again.threshold
    with pytest.raises(DepthKVError, match="prompts shorter than"):
        train_router(model, blocks, 0.5, start, prompt_tokens=TOKENS)


def test_serving_decides_as_training_does_without_noise() -> None:
    model = tiny_model("llama")
    ids = torch.stack(prompts(4))
    with RouterTraining(model, SharingPlan.every(2, NUM_LAYERS)) as training, torch.no_grad():
        training.weights.normal_(0, 300)  # so sure that the noise does not count
        training.prompts(ids, 12)
        model(input_ids=ids)
        leads = torch.stack(training.gates, 1) > 0.5
    router = LearnedRouter(training.weights.detach(), training.bias.detach(), training.kinds)
    maps = decisions(model, router, [row[:12] for row in ids])
    # decisions on the prompts alone: hidden states of a prompt do not depend on what follows
    assert [[source == layer for layer, source in enumerate(m)][1:] for m in maps] == leads.tolist()


# Losses and plans


def test_losses_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    blocks = torch.stack(prompts(3))
    plans = [SharingPlan.every(2, NUM_LAYERS), SharingPlan.every(3, NUM_LAYERS)]
    path = tmp_path / "losses.json"
    first = plan_losses(model, plans[:1], blocks, 12, path=path)
    both = plan_losses(model, plans, blocks, 12, path=path)
    assert torch.equal(first[:, 0], both[:, 0])
    monkeypatch.setattr("depthkv.adaptive.measure.continuation_losses", None)
    assert torch.equal(plan_losses(model, plans, blocks, 12, path=path), both)
    with pytest.raises(DepthKVError, match="losses of this model on this text"):
        plan_losses(model, plans, blocks, 13, path=path)
    for damage in ("{", "[]", '{"format": 1}', "null"):
        path.write_text(damage)
        with pytest.raises(DepthKVError, match=r"losses\.json: expected losses"):
            plan_losses(model, plans, blocks, 12, path=path)
    with pytest.raises(DepthKVError, match="prompts of 1 to 23 tokens, got 24"):
        continuation_losses(model, plans[0], blocks, TOKENS)


@pytest.mark.parametrize("family", CONFIGS)
def test_varied_plans_are_valid_and_of_one_size(family: str) -> None:
    kinds = layer_kinds(tiny_config(family))
    rng = random.Random(family)
    for retention in (0.2, 0.5, 0.67, 1.0, rng.uniform(0.01, 1)):
        found = varied_plans(kinds, retention)
        sizes = {tuple(sorted(str(kinds[i]) for i in plan.leaders)) for plan in found}
        assert len(sizes) == 1 and found[0] == SharingPlan.for_retention(retention, kinds)
        for plan in found:
            assert all(kinds[source] == kinds[layer] for layer, source in enumerate(plan.kv_source_layers))


# Files


def routers() -> dict[str, AnyRouter]:
    kinds = layer_kinds(tiny_model("llama").config)
    plans, losses, features = planted()
    return {
        "similarity": SimilarityRouter(torch.rand(6, 6), 0.3, kinds, [5, 4]),
        "learned": LearnedRouter(torch.randn(6, 9), torch.randn(6), kinds, 0.5),
        "portfolio": fit_portfolio(plans, losses, features, 0.5, kinds),
    }


@pytest.mark.parametrize("method", ["similarity", "learned", "portfolio"])
def test_files_give_the_same_router(tmp_path: Path, method: str) -> None:
    router = routers()[method]
    path = tmp_path / "router.safetensors"
    save_router(path, router, {"data": "a text"})
    loaded = load_router(path, router.kinds)
    for name, value in vars(router).items():
        other = vars(loaded)[name]
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other), name
        elif name != "ladder":
            assert value == other, name
    assert loaded.ladder is not None and router.ladder is not None and loaded.ladder.order == router.ladder.order
    with pytest.raises(DepthKVError, match=r"router\.safetensors: expected a router for the 4 layers"):
        load_router(path, router.kinds[:4])
    with pytest.raises(PlanError, match="that the router was made for"):
        share(tiny_model("llama", num_hidden_layers=4), router)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    router = routers()["portfolio"]
    assert isinstance(router, PortfolioRouter)
    path = tmp_path / "router.safetensors"
    save_router(path, router)
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["depthkv"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}

    def refuses(match: str, changes: dict[str, Any] | None, parts: dict[str, torch.Tensor] = tensors) -> None:
        metadata = None if changes is None else {"depthkv": json.dumps({**header, **changes})}
        save_file(parts, path, metadata=metadata)
        with pytest.raises(DepthKVError, match=match):
            load_router(path, router.kinds)

    refuses("format depthkv-router", None)
    refuses("format depthkv-router", {"format": "depthkv-plan"})
    refuses("version 1, got 2", {"version": 2})
    refuses("method among similarity, learned, portfolio", {"method": "magic"})
    refuses("difference in 'extra'", {"extra": 1})
    refuses("damaged|expected", {"price": "much"})
    refuses("expected", {"plans": [[0, 0]]})
    refuses("expected layer 1 to read", {"plans": [[0, 3, 0, 0, 0, 0]] * 3})
    refuses("order of layers", {"order": [9]})
    refuses("difference in 'scale'", {}, {n: t for n, t in tensors.items() if n != "scale"})
    refuses("finite numbers", {}, {**tensors, "center": tensors["center"] * torch.nan})
    refuses("weights of 3 plans", {}, {**tensors, "weights": tensors["weights"][:2].contiguous()})
    path.write_bytes(b"no safetensors")
    with pytest.raises(DepthKVError, match="expected a router file at"):
        load_router(path, router.kinds)
    with pytest.raises(DepthKVError, match="expected a router file at"):
        load_router(tmp_path / "none", router.kinds)

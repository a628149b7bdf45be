"""Measurements equal what sharing really does, go on after a stop, and leave the model as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from depthkv import SharingPlan, share
from depthkv.adapt.adapters import LoraSettings, add_adapter
from depthkv.calibrate import Calibration, Calibrator, run
from depthkv.calibrate.moments import RIDGE, Moments
from depthkv.calibrate.probe import Probe
from depthkv.calibrate.store import SIMILARITIES
from depthkv.errors import DepthKVError, PlanError
from depthkv.evaluate import perplexity
from depthkv.reference import ReferenceCache
from families import CONFIGS, NUM_LAYERS, tiny_model

TOKENS = 24
BLOCKS = torch.randint(2, 97, (6, TOKENS), generator=torch.Generator().manual_seed(1))
DOCUMENTS = [f"document {i // 2}" for i in range(len(BLOCKS))]


def family(name: str, **changes: Any) -> Any:
    return tiny_model(name, attention="eager" if name in ("gemma2", "gpt_oss") else "sdpa", **changes)


def calibrator(model: Any, path: Path | None = None, **changes: Any) -> Calibrator:
    settings: dict[str, Any] = {"cost_blocks": 4, "output_blocks": 3, "batch_size": 2, "path": path}
    return Calibrator(model, BLOCKS, DOCUMENTS, **{**settings, **changes})


@pytest.fixture(scope="module")
def measured() -> tuple[Any, Calibrator]:
    """All measurements of one model, which no test changes."""
    model = family("llama")
    found = calibrator(model)
    found.measure_similarity()
    found.measure_outputs()
    found.measure_costs()
    return model, found


# Losses


@pytest.mark.parametrize("name", CONFIGS)
def test_cost_of_every_pair_is_what_sharing_costs(name: str) -> None:
    model = family(name)
    found = calibrator(model, cost_blocks=2)
    found.measure_costs()
    calibration = found.calibration
    cost = calibration.cost()
    assert 0 < calibration.num_pairs <= NUM_LAYERS * (NUM_LAYERS - 1) // 2
    full = perplexity(model, found.cost_blocks).block_losses
    assert calibration.full_losses == pytest.approx(full, abs=1e-5)
    for layer in range(NUM_LAYERS):
        for source in range(NUM_LAYERS):
            if (layer, source) not in set(calibration.pairs()):
                assert cost[layer, source] == (0.0 if layer == source else math.inf)
                continue
            sources = list(range(NUM_LAYERS))
            sources[layer] = source
            with share(model, SharingPlan(sources)):
                expected = perplexity(model, found.cost_blocks).block_losses
            assert calibration.cost_losses[layer][source] == pytest.approx(expected, abs=1e-5)
    assert len({round(float(cost[pair]), 7) for pair in calibration.pairs()}) == calibration.num_pairs


def test_an_adapter_is_on_in_all_measurements() -> None:
    model = add_adapter(family("llama"), LoraSettings(rank=2)).eval()
    plain = perplexity(model, BLOCKS[:2]).loss
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.2)
    found = calibrator(model, cost_blocks=2, output_blocks=2)
    found.measure_costs()
    with found.with_own_kv():
        on = perplexity(model, found.cost_blocks).loss
    assert found.calibration.full_loss == pytest.approx(on, abs=1e-5) and abs(on - plain) > 1e-2
    plan = SharingPlan([0, 1, 2, 3, 2, 5])
    with share(model, plan):
        expected = perplexity(model, found.cost_blocks).loss
    assert float(found.calibration.cost()[4, 2]) == pytest.approx(expected - on, abs=1e-5)
    assert found.plan_loss(plan) == pytest.approx(expected, abs=1e-6)
    assert perplexity(model, BLOCKS[:2]).loss == plain  # and off again


def test_layers_below_the_reader_are_not_computed_again() -> None:
    model = family("llama")
    calls = [0] * NUM_LAYERS
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    found = calibrator(model, cost_blocks=2)
    found.measure_costs()
    # the head is tried twice, then one forward records; layer i runs again for the readers up to i alone
    assert calls == [3 + sum(range(i + 1)) for i in range(NUM_LAYERS)]


def test_plans_are_measured_once(measured: tuple[Any, Calibrator], monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = measured
    plan = SharingPlan.every(2, NUM_LAYERS)
    with share(model, plan):
        expected = perplexity(model, found.cost_blocks).block_losses
    assert found.plan_losses(plan) == pytest.approx(expected, abs=1e-6)
    monkeypatch.setattr(run, "perplexity", lambda *_, **__: pytest.fail("measured again"))
    assert found.plan_losses(plan) == pytest.approx(expected, abs=1e-6)
    assert found.plan_loss(SharingPlan.full(NUM_LAYERS)) == found.calibration.full_loss
    assert found.calibration.plan_loss(SharingPlan.every(3, NUM_LAYERS)) is None


# Similarity


@torch.no_grad()
def features(model: Any, blocks: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Rotated keys and values of each layer as the reference sees them, `[kv_heads, tokens, head_dim]`."""
    cache = ReferenceCache(range(NUM_LAYERS))
    model(input_ids=blocks, past_key_values=cache, use_cache=True)
    pairs = [cache.pairs[i] for i in range(NUM_LAYERS)]
    return tuple([pair[part].transpose(0, 1).flatten(1, 2).double() for pair in pairs] for part in (0, 1))  # type: ignore[return-value]


def centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(dim=-2, keepdim=True)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi3", "gemma3_text", "olmo2", "stablelm"])
def test_similarities_are_those_of_the_definitions(name: str) -> None:
    model = family(name)
    found = calibrator(model)
    found.measure_similarity()
    similarity, heads = found.calibration.similarity, found.calibration.similarity_heads
    keys, values = features(model, BLOCKS)
    num_heads = keys[0].shape[0]
    for layer, source in found.calibration.pairs():
        cosines, ckas, explained, total = [], [], 0.0, 0.0
        for head in range(num_heads):
            x, y = centred(values[source][head]), centred(values[layer][head])
            cka = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
            penalty = RIDGE * x.square().sum() / x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype)
            weights = torch.linalg.solve(x.T @ x + penalty, x.T @ y)
            r2 = 1 - (y - x @ weights).square().sum() / y.square().sum()
            ckas.append(float(cka))
            explained += float(r2 * y.square().sum())
            total += float(y.square().sum())
            cosines.append(float(torch.cosine_similarity(keys[layer][head], keys[source][head], dim=-1).mean()))
            assert heads["value_cka"][head][layer][source] == pytest.approx(float(cka), abs=1e-4)
            assert heads["value_r2"][head][layer][source] == pytest.approx(float(r2), abs=1e-4)
        mean = math.fsum(cosines) / num_heads
        assert similarity["key_cosine"][layer][source] == pytest.approx(mean, abs=1e-4)  # a rotation changes none
        assert similarity["value_cka"][layer][source] == pytest.approx(math.fsum(ckas) / num_heads, abs=1e-4)
        assert similarity["value_r2"][layer][source] == pytest.approx(explained / total, abs=1e-4)
        apart = sum((x[layer] - x[source]).square().sum(-1).mean(-1).sum() for x in (keys, values))
        assert similarity["kv_distance"][layer][source] == pytest.approx(float(apart) ** 0.5, rel=1e-3)
    for name, matrix in similarity.items():
        assert name in SIMILARITIES
        for layer in range(NUM_LAYERS):
            assert matrix[layer][layer] == pytest.approx(0.0 if name == "kv_distance" else 1.0, abs=2e-3)
            assert all(value is None for value in matrix[layer][layer + 1 :])


def test_keys_are_compared_before_the_rotary_embedding() -> None:
    model = family("llama")
    layer = model.model.layers[3]
    raw: list[torch.Tensor] = []
    hook = layer.self_attn.k_proj.register_forward_hook(lambda *_: raw.append(_[2]))
    with torch.no_grad(), Probe(model) as probe, probe.recording(keys=True) as seen:
        model(input_ids=BLOCKS)
    hook.remove()
    assert torch.equal(seen.keys[3].flatten(2), raw[0])
    assert not torch.allclose(seen.keys[3].transpose(1, 2), seen.pairs[3][0], atol=1e-3)


def test_moments_with_large_means_do_not_drown() -> None:
    torch.manual_seed(0)
    base = torch.randn(4000, 1, 1, 4)
    noisy = torch.cat([base, base + 0.1 * torch.randn(4000, 1, 1, 4)], dim=1) + 1000.0
    moments = Moments(2, 1, 4)
    for part in noisy.split(500):
        moments.add(part)
    found = moments.similarities()
    assert float(found["r2"][0, 1, 0]) == pytest.approx(1 / 1.01, abs=0.01)
    assert float(found["cka"][0, 1, 0]) == pytest.approx(1.0, abs=0.02)


def test_outputs_are_those_of_attention_under_sharing(measured: tuple[Any, Calibrator]) -> None:
    model, found = measured
    blocks = found.output_blocks
    for layer, source in ((5, 0), (4, 3), (1, 0)):
        outputs: list[torch.Tensor] = []
        hook = model.model.layers[layer].self_attn.register_forward_hook(lambda *_, o=outputs: o.append(_[2][0]))
        sources = list(range(NUM_LAYERS))
        sources[layer] = source
        with torch.no_grad():
            model(input_ids=blocks)
            with share(model, SharingPlan(sources)):
                model(input_ids=blocks)
        hook.remove()
        own, other = outputs
        cosine = torch.cosine_similarity(own, other, dim=-1).mean()
        error = (own - other).square().sum() / own.square().sum()
        assert found.calibration.similarity["output_cosine"][layer][source] == pytest.approx(float(cosine), abs=1e-4)
        assert found.calibration.similarity["output_error"][layer][source] == pytest.approx(float(error), rel=1e-3)


# The model stays as it was


def test_the_model_is_restored_also_after_an_error() -> None:
    model = family("qwen3")
    with torch.no_grad():
        before = model(input_ids=BLOCKS).logits
    with pytest.raises(RuntimeError), Probe(model) as probe, probe.recording():
        raise RuntimeError
    found = calibrator(model)
    found.measure_similarity()
    assert not any("forward" in module.__dict__ for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(input_ids=BLOCKS).logits, before)
    with share(model, SharingPlan.every(2, NUM_LAYERS)), pytest.raises(PlanError, match="shared already"):
        found.measure_costs()


# Stops


class Stopped(Exception):
    """A kill."""


def stopping(after: int) -> Callable[..., Any]:
    """A bar that stops the run after so many units."""
    done = 0

    @contextmanager
    def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
        def advance(units: int) -> None:
            nonlocal done
            done += units
            if done > after:
                raise Stopped

        yield advance

    return bar


@pytest.mark.parametrize("batch_size", [2, 3, 1])
def test_costs_go_on_where_they_stopped(
    tmp_path: Path, measured: tuple[Any, Calibrator], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = measured
    path = tmp_path / "c.json"
    monkeypatch.setattr(run, "SAVE_SECONDS", 0.0)
    for after in (7, 33):
        with pytest.raises(Stopped):
            calibrator(model, path, bar=stopping(after)).measure_costs()
    before = Calibration.load(path)
    assert not before.has_costs and 33 <= sum(len(v) for row in before.cost_losses.values() for v in row.values()) < 60
    with pytest.raises(DepthKVError, match="cost of every pair"):
        before.cost()
    resumed = calibrator(model, path, batch_size=batch_size)
    resumed.measure_costs()
    assert torch.allclose(resumed.calibration.cost(), whole.calibration.cost(), atol=1e-6)
    again = calibrator(model, path, bar=stopping(-1))  # does nothing
    again.measure_costs()
    assert again.calibration.has_costs


def test_similarity_goes_on_where_it_stopped(
    tmp_path: Path, measured: tuple[Any, Calibrator], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = measured
    path = tmp_path / "c.json"
    monkeypatch.setattr(run, "SAVE_SECONDS", 0.0)
    with pytest.raises(Stopped):
        calibrator(model, path, bar=stopping(4)).measure_similarity()
    (state,) = tmp_path.iterdir()
    assert state.name == ".c.json.moments.safetensors"
    tokens: list[int] = []
    original = Moments.add
    monkeypatch.setattr(Moments, "add", lambda self, x: (tokens.append(len(x)), original(self, x))[1])
    resumed = calibrator(model, path)
    resumed.measure_similarity()
    assert sum(tokens) < 2 * BLOCKS.numel()
    for name, matrix in resumed.calibration.similarity.items():
        expected = whole.calibration.similarity[name]
        for row, wanted in zip(matrix, expected, strict=True):
            assert [v for v in row if v is not None] == pytest.approx([v for v in wanted if v is not None], abs=1e-4)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.json"]
    state.write_bytes(b"damaged")
    with pytest.raises(DepthKVError, match=r"expected sums of a stopped run in .*; delete it"):
        calibrator(model, tmp_path / "c.json").measure_similarity() if path.unlink() is None else None


def test_a_file_of_something_else_is_refused(tmp_path: Path, measured: tuple[Any, Calibrator]) -> None:
    model, _ = measured
    path = tmp_path / "c.json"
    calibrator(model, path).save()
    calibrator(model, path)
    for other, changes in (
        (family("llama", seed=1), {}),
        (model, {"cost_blocks": 3}),
        (model, {"output_blocks": 2}),
    ):
        with pytest.raises(DepthKVError, match="expected measurements of this model with this adapter"):
            calibrator(other, path, **changes)
    with torch.no_grad():
        changed = family("llama")
        changed.model.layers[2].mlp.up_proj.weight[-1, -1] += 1.0
    with pytest.raises(DepthKVError, match="expected measurements of this model"):
        calibrator(changed, path)


# Files


def test_file_keeps_everything(tmp_path: Path, measured: tuple[Any, Calibrator]) -> None:
    _, found = measured
    found.plan_losses(SharingPlan.every(3, NUM_LAYERS))
    found.calibration.searches["a"] = 3
    found.calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == found.calibration


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.clear(), 'expected "format": "depthkv-calibration", got None'),
        (lambda d: d.update(version=2), 'expected "version": 1, got 2'),
        (lambda d: d.update(extra=1), "expected only known keys, got 'extra'"),
        (lambda d: d.pop("kinds"), "expected all keys, got none of 'kinds'"),
        (lambda d: d.update(kinds="abc"), "expected a calibration"),
        (lambda d: d.update(kinds=None), "expected a calibration"),
        (lambda d: d.update(full_losses=["a"]), "expected a number, got 'a'"),
        (lambda d: d.update(full_losses=[1.0] * 99), "expected losses of at most 4 blocks, got 99"),
        (lambda d: d.update(cost_losses={"x": {}}), "expected a calibration"),
        (lambda d: d.update(cost_losses={"9": {"0": [1.0]}}), "expected costs of pairs that can share, got layer 9"),
        (lambda d: d["similarity"].update(key_cka=[[1]]), "expected 6 rows"),
        (lambda d: d["plan_losses"].append({"kv_source_layers": [0, 0], "losses": [1.0]}), "of 6 layers, got one of 2"),
        (lambda d: d["plan_losses"].append({"losses": [1.0]}), "expected a calibration"),
        (lambda d: d["plan_losses"].append({"kv_source_layers": [0] * 6, "losses": []}), "every measured plan"),
        (lambda d: d.update(searches=[1]), "expected a calibration"),
        (lambda d: d.update(block_size=True), "expected a whole number, got True"),
        (lambda d: d["full_losses"].__setitem__(0, 10**400), "expected a calibration"),
        (lambda d: d["full_losses"].__setitem__(0, math.inf), "Infinity, which is no number in JSON"),
        (lambda d: d["similarity"].pop("value_r2"), "expected all of key_cka"),
    ],
)
def test_damaged_files(
    tmp_path: Path, measured: tuple[Any, Calibrator], damage: Callable[[Any], Any], message: str
) -> None:
    path = tmp_path / "c.json"
    measured[1].calibration.save(path)
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(DepthKVError, match="expected") as caught:
        Calibration.load(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(DepthKVError, match="expected a calibration file at"):
        Calibration.load(tmp_path / "none.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(DepthKVError, match="expected a calibration in JSON"):
        Calibration.load(tmp_path / "c.json")

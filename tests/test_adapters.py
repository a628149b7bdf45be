"""Adapters are in force only while layers share, train, are saved and found again; the local stage lowers its error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from depthkv import RandomCrossLayer, SharingPlan, load, route, share
from depthkv.adapt import AdaptConfig, adapt
from depthkv.adapt.adapters import LoraSettings, add_adapter, load_adapter, save_adapter
from depthkv.adapt.local import LocalConfig, fit_followers
from depthkv.adapt.objectives import AttentionMatching, Distillation
from depthkv.adapt.teacher import FrozenTeacher, SelfTeacher
from depthkv.checkpoint import load_config
from depthkv.errors import CheckpointError, DepthKVError
from depthkv.samplers import CrossLayerAttention
from families import tiny_model as family_model
from tiny import LAYERS, tiny_checkpoint, tiny_model

HALF = SharingPlan.every(2, LAYERS)
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
BLOCKS = (torch.arange(16)[None] + torch.arange(3, 43, 2)[:, None]) % 61 + 3


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def disturb(model: Any) -> None:
    """An adapter that has learnt something: B starts at zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


@pytest.mark.parametrize("targets", ["all-linear", "attention", "query-output"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_adapter_is_on_only_while_layers_share(targets: str, use_dora: bool) -> None:
    plain = logits(tiny_model())
    with torch.no_grad(), share(base := tiny_model(), HALF):
        plain_shared = base(input_ids=IDS).logits
    model = add_adapter(tiny_model(), LoraSettings(rank=2, targets=targets, use_dora=use_dora)).eval()
    with share(model, HALF):
        torch.testing.assert_close(logits(model), plain_shared, atol=1e-5, rtol=0)  # it starts as the identity
    disturb(model)
    assert torch.equal(logits(model), plain)
    with share(model, HALF):
        assert (logits(model) - plain_shared).abs().max() > 1e-3
    assert torch.equal(logits(model), plain)
    with share(model, SharingPlan.full(LAYERS)):  # a plan without followers is the full-cache model
        assert torch.equal(logits(model), plain)
    with route(model, RandomCrossLayer(cross_layer_prob=0.0)) as routing:
        assert not torch.equal(logits(model), plain)
        with routing.suspended():
            assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "gemma3_text"])
def test_other_families(family: str) -> None:
    model = add_adapter(family_model(family, "eager"), LoraSettings(rank=2)).eval()
    disturb(model)
    ids = IDS[:, :9]
    with torch.no_grad():
        plain = family_model(family, "eager").eval()(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, plain)
        with share(model, SharingPlan.for_retention(0.5, _kinds(model))):
            assert not torch.allclose(model(input_ids=ids).logits, plain, atol=1e-3)


def _kinds(model: Any) -> Any:
    from depthkv.architectures import layer_kinds

    return layer_kinds(model.config)


@pytest.mark.parametrize("how", ["text", "distill", "attention"])
def test_training_an_adapter_leaves_the_base_as_it_was(how: str) -> None:
    base = tiny_model()
    weights = {name: p.clone() for name, p in base.named_parameters()}
    plain = logits(base)
    model = add_adapter(base, LoraSettings(rank=4))
    objective: Any = None
    if how == "distill":
        objective = Distillation(teacher=SelfTeacher(), top_k=8)
    if how == "attention":
        objective = AttentionMatching(teacher=SelfTeacher())

    def shared_loss() -> float:
        with torch.no_grad(), share(model, HALF):
            return float(model(input_ids=BLOCKS, labels=BLOCKS).loss)

    before = shared_loss()
    config = AdaptConfig(max_tokens=16 * 120, learning_rate=2e-2, batch_size=2, block_size=16, precision="fp32")
    result = adapt(model, BLOCKS, config, objective=objective, progress=False)
    assert result.num_trained == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert shared_loss() < before - 0.1
    assert torch.equal(logits(model), plain)
    for name, parameter in base.named_parameters():
        original = name.replace(".base_layer", "")
        if "lora_" not in name:
            assert torch.equal(parameter, weights[original]), name


def test_save_and_load(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    model = add_adapter(load(base)[0], LoraSettings(rank=2)).eval()
    disturb(model)
    with share(model, HALF):
        expected = logits(model)
    save_adapter(tmp_path / "adapter", model, base=str(base), plan=HALF, provenance={"tokens": 7})
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json", "plan.json"}
    again, tokenizer, plan = load(tmp_path / "adapter")
    assert plan == HALF and plan.provenance["tokens"] == 7 and tokenizer is not None
    assert torch.equal(logits(again), logits(load(base)[0]))
    with share(again, plan):
        torch.testing.assert_close(logits(again), expected)
    assert load_config(tmp_path / "adapter").kv_source_layers == list(HALF.kv_source_layers)
    save_adapter(tmp_path / "adapter", model, base=str(base))  # an earlier one is replaced
    assert load(tmp_path / "adapter")[2] is None


def test_merged_for_serving() -> None:
    """Folded into the weights, the adapter costs nothing, and the model under a plan is the same."""
    model: Any = add_adapter(tiny_model(), LoraSettings(rank=4))
    disturb(model)
    plan = SharingPlan.every(2, LAYERS)
    with share(model, plan):
        expected = logits(model)
    merged = model.merge_and_unload()
    with share(merged, plan):
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_damaged_adapters(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    save_adapter(tmp_path / "a", add_adapter(load(base)[0], LoraSettings(rank=2)), base=str(base), plan=HALF)
    with pytest.raises(CheckpointError, match="for this model"):
        load_adapter(tiny_model(hidden_size=32), tmp_path / "a")
    SharingPlan.every(2, 7).save(tmp_path / "a" / "plan.json")
    with pytest.raises(CheckpointError, match="4 layers"):
        load(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"no")
    (tmp_path / "a" / "plan.json").unlink()
    with pytest.raises(CheckpointError, match="adapter"):
        load(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError):
        load(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_adapter(tiny_model(), tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="holds"):
        save_adapter(tmp_path, add_adapter(tiny_model(), LoraSettings(rank=2)), base="x")


@pytest.mark.parametrize("changes", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": "some"}])
def test_bad_settings(changes: dict[str, Any]) -> None:
    with pytest.raises(DepthKVError, match="expected"):
        LoraSettings(**changes)


def test_fused_projections_have_no_query_of_their_own() -> None:
    with pytest.raises(DepthKVError, match="qkv_proj"):
        add_adapter(family_model("phi3", "eager"), LoraSettings(targets="query-output"))


def test_local_stage_lowers_each_followers_error() -> None:
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = fit_followers(
        model, BLOCKS, CrossLayerAttention(group_size=2), LocalConfig(steps=150, learning_rate=3e-2, batch_size=4)
    )
    assert len(result.errors) == 150 and result.tokens == 150 * 4 * 16
    assert sum(result.errors[-10:]) < 0.6 * sum(result.errors[:10])
    for name, parameter in model.named_parameters():
        follower = name.startswith(("model.layers.1.", "model.layers.3."))
        changed = follower and ("q_proj" in name or "o_proj" in name)
        assert torch.equal(parameter, before[name]) != changed, name
        assert parameter.requires_grad and parameter.grad is None
    assert not model.training and all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_local_target_is_the_layers_own_output() -> None:
    """The first error, before any step, by hand: layer 1 reads layer 0's KV at its own full-cache input."""
    model = tiny_model(num_hidden_layers=2)
    outputs: list[torch.Tensor] = []
    handles = [
        layer.self_attn.register_forward_hook(lambda m, i, o: outputs.append(o[0])) for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=BLOCKS[:2])
        own = outputs[1]
        with share(model, SharingPlan.every(2, 2)):  # layer 1's input is the same, since layer 0 keeps its own
            model(input_ids=BLOCKS[:2])
        shared = outputs[3]
    for handle in handles:
        handle.remove()
    expected = ((shared - own).square().sum() / own.square().sum()).item()
    result = fit_followers(model, BLOCKS, CrossLayerAttention(group_size=2), LocalConfig(steps=1, batch_size=2))
    assert result.errors[0] == pytest.approx(expected, rel=1e-4)


def test_an_adapters_teacher_is_its_base() -> None:
    model = add_adapter(tiny_model(), LoraSettings(rank=2)).eval()
    disturb(model)
    batch = {"input_ids": IDS}
    teacher = SelfTeacher()
    with teacher.of(model):
        assert torch.equal(teacher.top(batch, 3, 1.0)[1], FrozenTeacher(tiny_model()).top(batch, 3, 1.0)[1])


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch_size": True}, {"learning_rate": 0.0}])
def test_bad_local_settings(changes: dict[str, Any]) -> None:
    with pytest.raises(DepthKVError, match="expected"):
        LocalConfig(**changes)

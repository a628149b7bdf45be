"""Objectives equal the obvious computation, teachers give the full-cache model's word, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import Gemma2Config, PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

from depthkv import RandomCrossLayer, SharingPlan, route, share
from depthkv.adapt.adapters import LoraSettings, add_adapter
from depthkv.adapt.loss import predicted
from depthkv.adapt.objectives import AttentionMatching, Distillation, LanguageModelLoss, Objective
from depthkv.adapt.teacher import FrozenTeacher, SelfTeacher, StoredTeacher, write_teacher
from depthkv.errors import CheckpointError, DepthKVError
from depthkv.head import plain_head
from tiny import tiny_model

IDS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS}
SAMPLER = RandomCrossLayer(cross_layer_prob=0.7, seed=2)


def capped_model() -> PreTrainedModel:
    """Its logits are not its head's output."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
    more = dict(num_key_value_heads=1, head_dim=8, final_logit_softcapping=1.5, query_pre_attn_scalar=8)
    config = Gemma2Config(**sizes, **more, initializer_range=0.3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return model


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def full_logits(model: PreTrainedModel, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **given).logits


def routed_logits(model: PreTrainedModel) -> torch.Tensor:
    with route(model, SAMPLER):
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys() and got
    for name in got:
        torch.testing.assert_close(got[name], expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_labels_and_padding_choose_the_predicted_tokens() -> None:
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 2]])
    rows, targets = predicted({"input_ids": ids})
    assert rows.tolist() == [0, 1, 2, 4, 5, 6] and targets.tolist() == [6, 7, 8, 10, 11, 2]
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 10, -100, -100]])
    rows, targets = predicted({"input_ids": ids, "labels": labels})
    assert rows.tolist() == [1, 2, 4] and targets.tolist() == [7, 8, 10]
    left = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    rows, targets = predicted({"input_ids": ids, "attention_mask": left})
    assert rows.tolist() == [1, 2, 4, 5] and targets.tolist() == [7, 8, 10, 11]


@pytest.mark.parametrize("capped", [False, True])
def test_masked_language_model_loss(capped: bool) -> None:
    model = capped_model() if capped else tiny_model()
    labels = IDS.clone()
    labels[:, :7] = -100
    labels[1] = -100
    expected = cross_entropy(full_logits(model)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    with LanguageModelLoss().bound(model, torch.float32) as loss:
        assert loss({"input_ids": IDS, "labels": labels}).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("weight", "temperature", "top_k", "make"),
    [
        (1.0, 1.0, 64, tiny_model),
        (0.3, 2.0, 64, tiny_model),
        (0.6, 1.0, 5, tiny_model),
        (0.6, 2.0, 5, tiny_model),
        (0.6, 0.5, 5, capped_model),
    ],
)
def test_distillation_equals_the_obvious_sum(
    weight: float,
    temperature: float,
    top_k: int,
    make: Callable[[], PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("depthkv.adapt.loss._CHUNK_ELEMENTS", 64 * 5)
    model = make()
    teacher = (full_logits(model)[:, :-1] / temperature).log_softmax(-1).flatten(0, 1)
    # full KL where top_k is the vocabulary; else the k likeliest and one bucket
    student = routed_logits(model)[:, :-1].flatten(0, 1)
    ours = (student / temperature).log_softmax(-1)
    if top_k == 64:
        kl = (teacher.exp() * (teacher - ours)).sum(-1).mean()
    else:
        values, index = teacher.topk(top_k)
        q = ours.gather(1, index)
        rest, rest_ours = 1 - values.exp().sum(-1), 1 - q.exp().sum(-1)
        kl = ((values.exp() * (values - q)).sum(-1) + rest * (rest.log() - rest_ours.log())).mean()
    expected = weight * temperature**2 * kl + (1 - weight) * cross_entropy(student, IDS[:, 1:].flatten())
    expected.backward()
    wanted = gradients(model)
    objective = Distillation(teacher=FrozenTeacher(model), top_k=top_k, weight=weight, temperature=temperature)
    with objective.bound(model, torch.float32) as loss, route(model, SAMPLER):
        got = loss(BATCH)
        got.backward()
    assert got.item() == pytest.approx(expected.item(), abs=2e-4)
    if top_k < 64:
        assert_same_gradients(gradients(model), wanted)
    assert "forward" not in model.lm_head.__dict__


@pytest.mark.parametrize("make", [tiny_model, capped_model])
def test_a_batch_that_predicts_nothing(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    batch = {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}
    for objective in (LanguageModelLoss(), Distillation(teacher=FrozenTeacher(model))):
        with objective.bound(model, torch.float32) as loss:
            got = loss(batch)
        got.backward()
        assert got.item() == 0 and all(not gradient.any() for gradient in gradients(model).values())


def test_distillation_of_oneself_is_zero() -> None:
    model = tiny_model()
    objective = Distillation(teacher=FrozenTeacher(model), top_k=8, weight=1.0)
    with objective.bound(model, torch.float32) as loss:
        assert abs(loss(BATCH).item()) < 1e-5


def test_attention_matching() -> None:
    model = tiny_model()
    teacher = FrozenTeacher(model)
    plain = cross_entropy(full_logits(model)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    with AttentionMatching(teacher=teacher, weight=3.0).bound(model, torch.float32) as loss:
        assert loss(BATCH).item() == pytest.approx(plain.item(), abs=1e-5)  # unrouted: no error to add
    with route(model, SAMPLER, step=3) as routing:
        with AttentionMatching(teacher=teacher, weight=3.0).bound(model, torch.float32) as loss:
            matched = loss(BATCH)
        routing.step = 3
        with LanguageModelLoss().bound(model, torch.float32) as loss:
            text = loss(BATCH)
    assert matched.item() > text.item() + 1e-2
    matched.backward()
    assert model.model.layers[3].self_attn.q_proj.weight.grad is not None
    assert all(not module._forward_hooks for module in model.modules())


def test_padding_is_not_matched() -> None:
    model = tiny_model()
    objective = AttentionMatching(teacher=FrozenTeacher(model))
    mask = torch.ones_like(IDS)
    mask[:, 9:] = 0
    results = []
    for batch in ({"input_ids": IDS[:, :9]}, {"input_ids": IDS, "attention_mask": mask}):
        with objective.bound(model, torch.float32) as loss, route(model, SAMPLER):
            results.append(loss(batch).item())
    assert results[1] == pytest.approx(results[0], rel=1e-5)


OBJECTIVES: dict[str, Callable[[PreTrainedModel], Objective]] = {
    "text": lambda model: LanguageModelLoss(),
    "distill": lambda model: Distillation(teacher=FrozenTeacher(model), top_k=8),
    "attention": lambda model: AttentionMatching(teacher=FrozenTeacher(model)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("how", ["ddp", "fsdp", "checkpointing"])
@pytest.mark.usefixtures("one_process")
def test_same_gradients_however_the_model_runs(name: str, how: str) -> None:
    model = tiny_model().train()
    objective = OBJECTIVES[name](model)
    with objective.bound(model, torch.float32) as loss, route(model, SAMPLER, skip_unread=False):
        loss(BATCH).backward()
    expected = gradients(model)
    runs: torch.nn.Module = model
    if how == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif how == "ddp":
        runs = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    assert (plain_head(runs) is None) == (how == "fsdp")
    with objective.bound(runs, torch.float32) as loss, route(model, SAMPLER, skip_unread=False):
        loss(BATCH).backward()
    got = {key: full_tensor(gradient) for key, gradient in gradients(model).items()}
    assert_same_gradients(got, expected)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_an_adapters_own_teacher_leaves_the_routing_as_it_is() -> None:
    model = add_adapter(tiny_model(), LoraSettings(rank=2)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0.0)
    expected = FrozenTeacher(tiny_model()).attention_outputs(BATCH)
    teacher = SelfTeacher()
    with teacher.of(model):
        # `route` draws in evaluation mode, too; the teacher must see none of it
        with route(model, SAMPLER, step=3) as routing:
            got = teacher.attention_outputs(BATCH)
            assert routing.step == 3 and model.training
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(ours, theirs)
        with share(model, SharingPlan.every(2, 4)), pytest.raises(DepthKVError, match="shared"):
            teacher.top(BATCH, 2, 1.0)
        teacher.top(BATCH, 2, 1.0)
    assert torch.equal(full_logits(model.eval()), full_logits(tiny_model()))  # the adapter is off again


def test_frozen_teacher_keeps_what_the_student_forgets() -> None:
    model = tiny_model()
    teacher = FrozenTeacher(model)
    before = teacher.top(BATCH, 4, 1.0)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(teacher.top(BATCH, 4, 1.0)[0], before)
    expected = full_logits(tiny_model()).log_softmax(-1).topk(4)
    torch.testing.assert_close(before, expected.values, atol=1e-5, rtol=0)


def test_stored_teacher(tmp_path: Path) -> None:
    model = tiny_model()
    write_teacher(model, IDS, tmp_path / "teacher.safetensors", top_k=6, batch_size=2)
    stored = StoredTeacher(tmp_path / "teacher.safetensors")
    shuffled = {"input_ids": IDS[[2, 0]]}
    values, index = stored.top(shuffled, 4, 1.0)
    expected_values, expected_index = FrozenTeacher(model).top(shuffled, 4, 1.0)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(values, expected_values, atol=1e-2, rtol=0)
    with pytest.raises(DepthKVError, match="top_k of at most 6"):
        stored.top(shuffled, 7, 1.0)
    with pytest.raises(DepthKVError, match="blocks that"):
        stored.top({"input_ids": IDS + 1}, 4, 1.0)
    with pytest.raises(DepthKVError, match="live teacher"):
        stored.attention_outputs(shuffled)
    (tmp_path / "bad").write_bytes(b"no")
    for name in ("bad", "missing"):
        with pytest.raises(CheckpointError, match=name):
            StoredTeacher(tmp_path / name)


def test_a_model_without_an_adapter_cannot_teach_itself() -> None:
    model = tiny_model()
    with pytest.raises(DepthKVError, match="adapter"), Distillation(teacher=SelfTeacher()).bound(model, torch.float32):
        pass
    assert "forward" not in model.lm_head.__dict__


@pytest.mark.parametrize("changes", [{"top_k": 0}, {"weight": 1.5}, {"temperature": 0.0}])
def test_bad_values(changes: dict[str, Any]) -> None:
    with pytest.raises(DepthKVError, match="expected"):
        Distillation(teacher=FrozenTeacher(tiny_model()), **changes)

"""Training: exact loss, exact resume, and a model that recovers from sharing."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from depthkv import RandomCrossLayer, SharingPlan, share
from depthkv.adapt import AdaptConfig, AdaptResult, StepInfo, adapt, discard_state, has_state
from depthkv.adapt.cpu_attention import FasterCpuAttention
from depthkv.adapt.examples import EndlessExamples
from depthkv.adapt.loss import chunked_cross_entropy, next_token_loss
from depthkv.errors import CheckpointError, DataError, DepthKVError
from depthkv.head import plain_head

VOCABULARY = 96
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


def make_model(seed: int = 0, config_class: Any = LlamaConfig, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config_class(**{**SIZES, **changes}))


def make_blocks(count: int = 12, size: int = 16, seed: int = 1) -> torch.Tensor:
    """Text with something to learn: each block counts upwards with its own stride."""
    rng = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCABULARY, (count, 1), generator=rng)
    stride = torch.randint(1, 4, (count, 1), generator=rng)
    return (start + stride * torch.arange(size)) % VOCABULARY


def make_config(**changes: Any) -> AdaptConfig:
    settings: dict[str, Any] = dict(max_tokens=4 * 16 * 8, batch_size=4, block_size=16, precision="fp32")
    return AdaptConfig(**{**settings, **changes})


def train(model: PreTrainedModel, config: AdaptConfig, **arguments: Any) -> AdaptResult:
    return adapt(model, make_blocks(size=config.block_size), config, progress=False, **arguments)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


# The loss


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_cross_entropy_equals_torchs(
    has_bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 23 rows in chunks of 6: the last one is smaller
    monkeypatch.setattr("depthkv.adapt.loss._CHUNK_ELEMENTS", 6 * 50)
    hidden = torch.randn(23, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 8, dtype=dtype, requires_grad=True)
    bias = torch.randn(50, dtype=dtype, requires_grad=True) if has_bias else None
    targets = torch.randint(50, (23,))
    inputs = [hidden, weight] + ([bias] if bias is not None else [])
    expected = cross_entropy(linear(hidden, weight, bias), targets)
    expected_gradients = torch.autograd.grad(3 * expected, inputs)
    got = chunked_cross_entropy(hidden, weight, bias, targets)
    gradients = torch.autograd.grad(3 * got, inputs)
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_chunked_cross_entropy_survives_huge_logits() -> None:
    hidden = torch.full((2, 1), 1e4, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.tensor([[1.0], [-1.0]]), None, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(1e4)


@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), [(4, 4, 64), (6, 2, 150), (3, 3, 7)])
def test_cpu_attention_equals_torchs(heads: int, kv_heads: int, tokens: int) -> None:
    pair = [torch.randn(2, tokens, kv_heads, 16, dtype=torch.float64).transpose(1, 2) for _ in range(2)]
    inputs = [torch.randn(2, heads, tokens, 16, dtype=torch.float64), *pair]
    for tensor in inputs:
        tensor.requires_grad_(True)

    def attend(**arguments: Any) -> list[torch.Tensor]:
        output = scaled_dot_product_attention(*inputs, enable_gqa=heads != kv_heads, **arguments)
        return [output, *torch.autograd.grad((output * output.cos()).sum(), inputs)]

    for arguments in ({"is_causal": True}, {"is_causal": True, "scale": 0.3}, {"attn_mask": torch.eye(tokens).bool()}):
        expected = attend(**arguments)
        with FasterCpuAttention():
            got = attend(**arguments)
        is_ours = "_CausalAttention" in type(got[0].grad_fn).__name__
        assert is_ours == ("is_causal" in arguments)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_cpu_attention_leaves_other_calls_alone() -> None:
    query = torch.randn(1, 2, 8, 4, requires_grad=True)
    longer = torch.randn(1, 2, 9, 4)
    with FasterCpuAttention():
        calls = [
            scaled_dot_product_attention(query, query, query),
            scaled_dot_product_attention(query, longer, longer, is_causal=True),
            scaled_dot_product_attention(query, query, query, None, 0.5, True),
            scaled_dot_product_attention(query.detach(), longer[:, :, :8], longer[:, :, :8], is_causal=True),
        ]
        with torch.no_grad():
            calls.append(scaled_dot_product_attention(query, query, query, is_causal=True))
    assert not [call for call in calls if "_CausalAttention" in type(call.grad_fn).__name__]
    # outside, torch's own is back
    assert "_CausalAttention" not in type(scaled_dot_product_attention(query, query, query).grad_fn).__name__


@pytest.mark.parametrize(
    ("config_class", "changes", "is_plain"),
    [
        (LlamaConfig, {}, True),
        (LlamaConfig, {"tie_word_embeddings": False}, True),
        (Qwen3Config, {}, True),
        (GPT2Config, {"n_embd": 32, "n_layer": 4, "n_head": 4}, True),
        (Gemma2Config, {"final_logit_softcapping": 30.0}, False),
        (CohereConfig, {"logit_scale": 0.25}, False),
    ],
)
def test_next_token_loss_equals_the_models_own(config_class: Any, changes: dict[str, Any], is_plain: bool) -> None:
    model = make_model(config_class=config_class, **changes).eval()
    tokens = make_blocks(3)
    expected = model(input_ids=tokens, labels=tokens).loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert (plain_head(model) is not None) == is_plain
    before = dict(model.get_output_embeddings().__dict__)
    with next_token_loss(model, torch.float32) as loss_function:
        loss = loss_function({"input_ids": tokens})
        loss.backward()
    assert model.get_output_embeddings().__dict__ == before
    torch.testing.assert_close(loss, expected)
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


# Training


def test_training_recovers_shared_quality() -> None:
    model = make_model()
    held_out = make_blocks(8, seed=2)

    def shared_loss() -> float:
        with torch.no_grad(), share(model, SharingPlan.every(2, 4)):
            return float(model(input_ids=held_out, labels=held_out).loss)

    before = shared_loss()
    steps: list[StepInfo] = []
    config = make_config(max_tokens=64 * 120, learning_rate=1e-2, trainable="all")
    result = adapt(model.eval(), make_blocks(64), config, progress=False, on_step=steps.append)
    assert shared_loss() < 0.5 * before
    assert not model.training and "forward" not in model.model.__dict__
    assert result.steps == len(steps) == len(result.losses) == 120
    assert result.tokens == steps[-1].tokens == 64 * 120
    assert result.num_trained == sum(p.numel() for p in model.parameters()) and result.first_step == 0
    assert [info.loss for info in steps] == list(result.losses)
    assert steps[-1].progress == 1 and 0 < steps[-1].seconds == result.seconds
    assert result.tokens_per_second == result.tokens / result.seconds


def test_same_seed_same_weights_and_other_seed_others() -> None:
    trained = []
    for seed in (0, 0, 1):
        model = make_model()
        train(model, make_config(seed=seed))
        trained.append(weights(model))
    assert_equal_weights(trained[0], trained[1])
    assert any(not torch.equal(trained[0][name], trained[2][name]) for name in trained[0])


def test_accumulation_draws_one_map_per_forward() -> None:
    class Recording:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def __repr__(self) -> str:
            return "Recording"

        def draw(self, step: int, kinds: Any) -> list[int]:
            self.steps.append(step)
            return list(range(len(kinds)))

    sampler = Recording()
    small, large = make_model(), make_model()
    train(small, make_config(batch_size=2, accumulate_steps=2, learning_rate=1e-4), sampler=sampler)
    assert sampler.steps == list(range(16))
    train(large, make_config(batch_size=4, learning_rate=1e-4), sampler=sampler)
    for name, value in weights(small).items():
        torch.testing.assert_close(value, weights(large)[name], rtol=1e-4, atol=2e-5)


def test_a_budget_in_minutes_ends_the_schedule() -> None:
    steps: list[StepInfo] = []
    config = make_config(max_tokens=None, max_minutes=1 / 60, learning_rate=1e-3, final_lr_fraction=0.1)
    result = train(make_model(), config, on_step=steps.append)
    assert 1 <= result.seconds < 5
    assert steps[-1].learning_rate < 2e-4 < max(info.learning_rate for info in steps)


def test_bf16_trains_fp32_weights() -> None:
    model = make_model().bfloat16()
    result = train(model, make_config(precision="bf16", learning_rate=5e-3, max_tokens=64 * 30))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize(
    ("trainable", "moves", "stays"),
    [
        ("layers", ["mlp.up_proj", "input_layernorm"], ["embed_tokens", "model.norm"]),
        ("attention", ["q_proj", "k_proj", "v_proj", "o_proj"], ["mlp", "embed_tokens", "layernorm"]),
        ("query-output", ["q_proj", "o_proj"], ["k_proj", "v_proj", "mlp", "embed_tokens"]),
    ],
)
def test_trainable_picks_the_weights(trainable: str, moves: list[str], stays: list[str]) -> None:
    model = make_model()
    before = weights(model)
    result = train(model, make_config(trainable=trainable, weight_decay=0.1))
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert all(any(part in name for name in changed) for part in moves)
    assert not [name for name in changed for part in stays if part in name]
    assert result.num_trained == sum(before[name].numel() for name in changed)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_frozen_weights_stay_frozen() -> None:
    model = make_model()
    model.model.embed_tokens.requires_grad_(False)
    before = weights(model)
    train(model, make_config())
    name = "model.embed_tokens.weight"
    assert torch.equal(weights(model)[name], before[name]) and not model.model.embed_tokens.weight.requires_grad


def test_order_of_the_data() -> None:
    def rows(seed: int, count: int = 24) -> list[int]:
        data = EndlessExamples(make_blocks(8), make_config(seed=seed, max_tokens=16 * 24), 1)
        assert len(data) == 24
        return [data.row(position) for position in range(count)]

    order = rows(0)
    epochs = order[:8], order[8:16], order[16:]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert rows(1) != order == rows(0)


def test_schedule() -> None:
    config = make_config(learning_rate=1.0, warmup_fraction=0.1, final_lr_fraction=0.2, decay="cosine")
    assert [config.learning_rate_at(x) for x in (0, 0.05, 0.1, 1.0, 1.5)] == pytest.approx([0.1, 0.5, 1.0, 0.2, 0.2])
    assert config.learning_rate_at(0.55) == pytest.approx(0.6)
    linear = make_config(learning_rate=1.0, decay="linear", warmup_fraction=0.0, final_lr_fraction=0.2)
    assert [linear.learning_rate_at(x) for x in (0.25, 0.75, 1.0)] == pytest.approx([0.8, 0.4, 0.2])
    assert make_config(learning_rate=1.0, warmup_fraction=0.0).learning_rate_at(0.0) == 1.0


# What is shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(1, [8]), (20, [3, 5, 7, 8]), (45, [2, 3, 4, 5, 6, 7, 8])], ids=["1 s", "20 s", "45 s"]
)
def test_a_log_file_gets_a_line_every_half_minute(
    seconds: float, shown: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0

    def pass_time(info: StepInfo) -> None:  # after the step was shown
        nonlocal now
        now += seconds

    monkeypatch.setattr("depthkv.adapt.terminal.time", SimpleNamespace(monotonic=lambda: now))
    result = adapt(make_model(), make_blocks(), make_config(), on_step=pass_time)
    lines = capsys.readouterr().err.splitlines()
    pattern = r"training  step (\d)  (\d+) tokens  loss (\S+)  [\d,]+ tok/s  \d+:\d\d left"
    found = [match for line in lines if (match := re.fullmatch(pattern, line)) is not None]
    assert len(found) == len(lines) and [int(match[1]) for match in found] == shown
    assert all(int(match[2]) == 64 * int(match[1]) for match in found) and lines[-1].endswith(" 0:00 left")
    assert float(found[-1][3]) == pytest.approx(sum(result.losses) / 8, abs=1e-3)  # of the last ten


# Resuming


@pytest.mark.parametrize("stop", [1, 3, 7])
def test_resumed_run_equals_uninterrupted_one(stop: int, tmp_path: Path) -> None:
    # dropout makes the run depend on torch's random state, too
    config = make_config(accumulate_steps=2, batch_size=2)
    whole = make_model(attention_dropout=0.1)
    torch.manual_seed(5)
    expected = train(whole, config)

    def press_ctrl_c(info: StepInfo) -> None:
        if info.step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = make_model(attention_dropout=0.1)
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, config, on_step=press_ctrl_c, resume_dir=tmp_path)
    assert has_state(tmp_path)
    resumed = make_model(seed=9, attention_dropout=0.1)  # its weights come from the state
    torch.manual_seed(6)
    result = train(resumed, config, resume_dir=tmp_path)
    assert result.first_step == stop and result.losses == expected.losses
    assert_equal_weights(weights(resumed), weights(whole))
    # the finished run is kept until the caller is done with it
    again = make_model(seed=9, attention_dropout=0.1)
    assert train(again, config, resume_dir=tmp_path).first_step == result.steps
    assert_equal_weights(weights(again), weights(whole))
    (tmp_path / "other").write_text("kept")
    discard_state(tmp_path)
    assert not has_state(tmp_path) and [p.name for p in tmp_path.iterdir()] == ["other"]


def test_ctrl_c_without_resume_dir_leaves_the_model_clean() -> None:
    model = make_model()

    def stop(info: StepInfo) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, make_config(), on_step=stop)
    assert "forward" not in model.model.__dict__ and "forward" not in model.lm_head.__dict__


def test_state_of_another_run_is_refused(tmp_path: Path) -> None:
    train(make_model(), make_config(), resume_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"learning_rate = 0\.0007.*got learning_rate = 0\.001"):
        train(make_model(), make_config(learning_rate=1e-3), resume_dir=tmp_path)
    with pytest.raises(CheckpointError, match="data = "):
        adapt(make_model(), make_blocks(seed=4), make_config(), progress=False, resume_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"model = .LlamaForCausalLM of .* parameters"):
        train(make_model(hidden_size=64), make_config(), resume_dir=tmp_path)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    config = make_config(save_every_minutes=1e-9)
    whole = make_model()
    train(whole, config, resume_dir=tmp_path)
    states = sorted(tmp_path.iterdir(), key=lambda path: int(path.name.partition("-")[2]))
    assert [path.name for path in states] == ["checkpoint-7", "checkpoint-8"]
    file = states[1] / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    warnings: list[str] = []
    again = make_model(seed=9)
    assert train(again, config, resume_dir=tmp_path, warn=warnings.append).first_step == 7
    assert_equal_weights(weights(again), weights(whole))
    assert len(warnings) == 1 and "checkpoint-8 is damaged (optimizer.pt is not what was written)" in warnings[0]
    for state in tmp_path.iterdir():
        (state / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"whole checkpoint.*model\.safetensors is missing"):
        train(make_model(), config, resume_dir=tmp_path)


@pytest.mark.parametrize(
    "part", ["torch.save", "transformers.PreTrainedModel.save_pretrained", "depthkv.adapt.trainer.seal"]
)
def test_a_full_disk_keeps_the_checkpoint_before(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def break_saving(info: StepInfo) -> None:
        if info.step == 3:
            monkeypatch.setattr(part, no_space)

    config = make_config(save_every_minutes=1e-9)
    with pytest.raises(CheckpointError, match="no space left on the disk"):
        train(make_model(), config, on_step=break_saving, resume_dir=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    monkeypatch.undo()
    assert train(make_model(), config, resume_dir=tmp_path).first_step == 2


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": None}, "one budget.*neither"),
        ({"max_minutes": 1.0}, "one budget.*both"),
        ({"max_tokens": 0}, "max_tokens as an integer of at least 1"),
        ({"max_tokens": None, "max_minutes": 0.0}, "max_minutes above 0"),
        ({"learning_rate": -1.0}, "learning_rate above 0"),
        ({"learning_rate": float("nan")}, "learning_rate above 0"),
        ({"batch_size": 2.5}, "batch_size as an integer"),
        ({"block_size": 1}, "block_size as an integer of at least 2"),
        ({"cross_layer_prob": 1.5}, "cross_layer_prob between 0 and 1"),
        ({"warmup_fraction": 2}, "warmup_fraction between 0 and 1"),
        ({"betas": (0.9, 1.0)}, "two betas"),
        ({"weight_decay": -0.1}, "weight_decay of at least 0"),
        ({"trainable": "some"}, "trainable to be one of all, layers"),
        ({"decay": "step"}, "decay to be one of"),
        ({"precision": "fp8"}, "precision to be one of"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DepthKVError, match=message):
        make_config(**changes)


def test_bad_blocks_are_named() -> None:
    with pytest.raises(DataError, match=r"blocks of 16 tokens, got a tensor of shape \[12, 8\]"):
        adapt(make_model(), make_blocks(size=8), make_config(), progress=False)
    with pytest.raises(DataError, match="at least one block"):
        adapt(make_model(), make_blocks()[:0], make_config(), progress=False)
    with pytest.raises(DataError, match="token ids from 0 to 95, got 0 to 96"):
        adapt(make_model(), torch.tensor([[0, 96] * 8]), make_config(), progress=False)


def test_loss_that_is_not_finite_is_kept(tmp_path: Path) -> None:
    model = make_model()

    def spoil(info: StepInfo) -> None:
        if info.step == 2:
            with torch.no_grad():
                model.model.norm.weight.fill_(float("nan"))

    with pytest.raises(DepthKVError, match=r"finite loss, got nan in step 3 at learning rate.*batch and map are in"):
        train(model, make_config(), on_step=spoil, resume_dir=tmp_path)
    assert "forward" not in model.model.__dict__ and "forward" not in model.lm_head.__dict__
    record = json.loads((tmp_path / "failed-step-3/step.json").read_text())
    (drawn,) = record["kv_source_layers"]
    expected = RandomCrossLayer(cross_layer_prob=make_config().cross_layer_prob).draw(2, [None] * 4)
    assert record["step"] == 3 and drawn == expected
    batch = load_file(tmp_path / "failed-step-3/batch.safetensors")["input_ids"]
    assert batch.shape == (4, 16)


def test_query_output_needs_a_query_projection() -> None:
    model = make_model(config_class=GPT2Config, n_embd=32, n_layer=4, n_head=4)
    with pytest.raises(DepthKVError, match="own query projection"):
        train(model, make_config(trainable="query-output"))


def test_progress_bar_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    adapt(make_model(), make_blocks(), make_config())
    captured = capsys.readouterr()
    assert captured.out == "" and "512 tokens" in captured.err

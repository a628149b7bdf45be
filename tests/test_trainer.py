"""Routing in Hugging Face's Trainer: two lines for a Trainer of one's own, and what `RoutingTrainer` adds."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

from depthkv import RandomCrossLayer, SharingPlan, route
from depthkv.adapt import RoutingCallback, RoutingTrainer, StepInfo, adapt
from depthkv.adapt.adapters import LoraSettings, add_adapter
from depthkv.adapt.objectives import Distillation
from depthkv.adapt.run import require_trainers_device
from depthkv.adapt.teacher import FrozenTeacher
from depthkv.errors import CheckpointError, DepthKVError
from depthkv.samplers import LeaderSubset
from test_adapt import assert_equal_weights, make_blocks, make_config, make_model, train, weights

SAMPLER = RandomCrossLayer(cross_layer_prob=0.5, seed=3)


class Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[i], "labels": self.blocks[i]}


def arguments(directory: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = dict(
        output_dir=str(directory),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    return TrainingArguments(**{**settings, **changes})


def by_hand(model: nn.Module, blocks: torch.Tensor, accumulate: int = 1) -> None:
    """Four steps of the Trainer's AdamW, written out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    model.train()
    with route(model, SAMPLER):
        for step in range(4):
            for micro in range(accumulate):
                first = 2 * (step * accumulate + micro)
                batch = blocks[first : first + 2]
                (model(input_ids=batch, labels=batch).loss / accumulate).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["callback", "trainer"])
def test_both_train_as_written_out(kind: str, accumulate: int, tmp_path: Path) -> None:
    blocks = make_blocks(16)
    expected, model = make_model(), make_model()
    by_hand(expected, blocks, accumulate)
    given: dict[str, Any] = dict(
        model=model,
        args=arguments(tmp_path, gradient_accumulation_steps=accumulate),
        train_dataset=Rows(blocks),
    )
    if kind == "callback":
        trainer = Trainer(**given)
        trainer.add_callback(RoutingCallback(SAMPLER))
    else:
        trainer = RoutingTrainer(**given, sampler=SAMPLER)
    trainer.train()
    for name, value in weights(model).items():
        torch.testing.assert_close(value, weights(expected)[name], rtol=1e-4, atol=1e-5)
    assert "forward" not in model.model.__dict__ and "forward" not in model.lm_head.__dict__


def test_labels_are_weighed_over_the_whole_step(tmp_path: Path) -> None:
    """Two forwards of 3 and 12 labels give the gradient of one forward with 15."""
    data = Rows(make_blocks(2))
    labels = data.blocks.clone()
    labels[0, :13] = -100
    labels[1, :4] = -100

    class Answers(Rows):
        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            return {"input_ids": self.blocks[i], "labels": labels[i]}

    def train_once(batch: int, accumulate: int) -> dict[str, torch.Tensor]:
        model = make_model()
        changes: dict[str, Any] = dict(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=1, optim="sgd"
        )
        sampler = LeaderSubset(retentions=(1.0,))
        args = arguments(tmp_path, learning_rate=1.0, max_grad_norm=1e9, **changes)
        RoutingTrainer(model=model, args=args, train_dataset=Answers(data.blocks), sampler=sampler).train()
        return weights(model)

    together, apart = train_once(2, 1), train_once(1, 2)
    for name, value in apart.items():
        torch.testing.assert_close(value, together[name], rtol=1e-5, atol=1e-6)


def test_an_exception_leaves_the_model_clean(tmp_path: Path) -> None:
    class Broken:
        seed = 0

        def draw(self, step: int, kinds: Any) -> list[int]:
            raise RuntimeError("broken")

    model = make_model()
    with pytest.raises(RuntimeError, match="broken"):
        RoutingTrainer(
            model=model, args=arguments(tmp_path), train_dataset=Rows(make_blocks()), sampler=Broken()
        ).train()
    assert "forward" not in model.model.__dict__ and "forward" not in model.lm_head.__dict__


# Measured during training


def test_curve_best_state_and_early_stop(tmp_path: Path) -> None:
    """A learning rate that ruins the model: the best state is an early one, and training stops."""
    mix = ((1.0, 1.0), (0.5, 3.0))
    config = make_config(
        max_tokens=64 * 40, learning_rate=1.0, warmup_fraction=0.5, eval_every=2, early_stop=2, best_mix=mix
    )
    model = make_model()
    result = train(model, config, eval_blocks=make_blocks(4, seed=2), resume_dir=tmp_path)
    assert 6 <= result.steps < 40 and [curve["step"] for curve in result.curves] == list(range(2, result.steps + 1, 2))
    curve = result.curves[0]
    assert curve["eval_mix"] == pytest.approx((curve["eval_loss_100"] + 3 * curve["eval_loss_50"]) / 4)
    best = min(result.curves, key=lambda row: row["eval_mix"])
    assert best["step"] == result.steps - 4
    assert_equal_weights(
        weights(model), weights(type(model).from_pretrained(tmp_path / f"checkpoint-{best['step']:.0f}"))
    )


def test_patience_is_not_renewed_by_a_stop(tmp_path: Path) -> None:
    """A run that is stopped and taken up again ends where it would have ended."""
    config = make_config(
        max_tokens=64 * 40, learning_rate=1.0, warmup_fraction=0.5, eval_every=2, early_stop=3, save_every_minutes=1e-9
    )
    whole = train(make_model(), config, eval_blocks=make_blocks(4, seed=2))

    def stop(info: StepInfo) -> None:
        if info.step == whole.steps - 1:  # after two measurements without a better one
            os.kill(os.getpid(), signal.SIGINT)

    again = {"eval_blocks": make_blocks(4, seed=2), "resume_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), config, on_step=stop, **again)
    assert (tmp_path / f"checkpoint-{whole.steps - 1}").exists(), "saved between measurements, too"
    assert train(make_model(), config, **again).steps == whole.steps < 40


def test_measuring_does_not_change_training() -> None:
    plain, measured = make_model(), make_model()
    train(plain, make_config())
    # the last state is the best one here
    result = train(measured, make_config(eval_every=4), eval_blocks=make_blocks(4, seed=2))
    assert result.curves[-1]["eval_mix"] < result.curves[0]["eval_mix"]
    assert_equal_weights(weights(plain), weights(measured))


def test_tensorboard_gets_the_losses(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train(make_model(), make_config(report_to=("tensorboard",), max_tokens=64 * 12), resume_dir=tmp_path)
    assert any("tfevents" in path.name for path in tmp_path.rglob("*"))


def test_bad_measuring_is_named(tmp_path: Path) -> None:
    with pytest.raises(DepthKVError, match="eval_blocks for eval_every"):
        train(make_model(), make_config(eval_every=2))
    with pytest.raises(DepthKVError, match="eval_every with early_stop"):
        make_config(early_stop=2)
    with pytest.raises(DepthKVError, match="report_to among tensorboard"):
        make_config(report_to=("paper",))
    with pytest.raises(DepthKVError, match="best_mix in pairs"):
        make_config(best_mix=((0.0, 1.0),))
    with pytest.raises(DepthKVError, match="expected 1 curve_weights, got 2"):
        plans = [SharingPlan.full(4)]
        RoutingTrainer(
            model=make_model(), args=arguments(tmp_path), sampler=SAMPLER, curve_plans=plans, curve_weights=[1, 2]
        )


# Options


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, checkpointed = make_model(), make_model()
    train(plain, make_config())
    train(checkpointed, make_config(gradient_checkpointing=True))
    for name, value in weights(checkpointed).items():
        torch.testing.assert_close(value, weights(plain)[name])
    assert not checkpointed.model.layers[0].gradient_checkpointing


def test_a_model_on_a_gpu_that_the_trainer_does_not_use() -> None:
    require_trainers_device(torch.device("cuda:0"), torch.device("cuda:0"))
    with pytest.raises(DepthKVError, match=r"expected the model on cuda:0.*got cuda:1; CUDA_VISIBLE_DEVICES=1"):
        require_trainers_device(torch.device("cuda:1"), torch.device("cuda:0"))


# torch's compiler looks at .grad of any tensor, and keeps its own warning from those who don't make errors of them
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("adapter", [False, True])
def test_compiled_pieces_train_the_same(adapter: bool) -> None:
    plain, compiled = make_model(num_hidden_layers=8), make_model(num_hidden_layers=8)
    if adapter:
        torch.manual_seed(0)
        plain = add_adapter(plain, LoraSettings(rank=2, alpha=4))
        torch.manual_seed(0)
        compiled = add_adapter(compiled, LoraSettings(rank=2, alpha=4))
    train(plain, make_config())
    before = counters["stats"]["unique_graphs"]
    train(compiled, make_config(compile=True))
    graphs = counters["stats"]["unique_graphs"] - before
    assert 2 <= graphs <= 5  # of 16 norms and 8 MLPs: each with and without gradients, and the first norm
    for name, value in weights(compiled).items():
        torch.testing.assert_close(value, weights(plain)[name])
    assert all(module._compiled_call_impl is None for module in compiled.modules())


def test_examples_of_different_lengths() -> None:
    rows = make_blocks(8)
    examples = [{"input_ids": row[: 5 + i], "labels": row[: 5 + i]} for i, row in enumerate(rows)]

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        pad = nn.utils.rnn.pad_sequence
        ids = pad([x["input_ids"] for x in batch], batch_first=True)
        labels = pad([x["labels"] for x in batch], batch_first=True, padding_value=-100)
        return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}

    result = adapt(
        make_model(), examples, make_config(max_tokens=64 * 30, learning_rate=5e-3), collate=collate, progress=False
    )
    assert result.steps == 30 and result.losses[-1] < result.losses[0]


def test_an_adapter_resumes_exactly(tmp_path: Path) -> None:
    pytest.importorskip("peft")

    def adapted(seed: int = 0) -> Any:
        model = make_model(head_dim=8)
        torch.manual_seed(seed)
        return add_adapter(model, LoraSettings(rank=4))

    def stop(info: Any) -> None:
        if info.step == 3:
            signal.raise_signal(signal.SIGINT)

    def lora(model: Any) -> dict[str, torch.Tensor]:
        return {name: value for name, value in weights(model).items() if "lora_" in name}

    whole, stopped, resumed = adapted(), adapted(), adapted(seed=4)
    config = make_config(learning_rate=1e-2)
    before = weights(whole)
    train(whole, config)
    moved = {name for name, value in weights(whole).items() if not torch.equal(value, before[name])}
    assert moved == set(lora(whole))
    with pytest.raises(KeyboardInterrupt):
        train(stopped, config, on_step=stop, resume_dir=tmp_path)
    assert train(resumed, config, resume_dir=tmp_path).first_step == 3
    assert_equal_weights(lora(resumed), lora(whole))


def test_distillation_through_adapt() -> None:
    model = make_model()
    objective = Distillation(teacher=FrozenTeacher(model), weight=0.5)
    result = train(model, make_config(learning_rate=5e-3, max_tokens=64 * 30), objective=objective)
    assert result.losses[-1] < result.losses[0]


# Kills

CHILD = """
import sys, torch
sys.path[:0] = {paths}
from test_adapt import make_blocks, make_config, make_model
from depthkv.adapt import adapt
from safetensors.torch import save_file
model = make_model(attention_dropout=0.1)
config = make_config(max_tokens=64 * {steps}, save_every_minutes=1e-9)
adapt(model, make_blocks(), config, resume_dir=sys.argv[1], progress=False)
save_file({{n: p.detach().clone() for n, p in model.named_parameters()}}, sys.argv[2])
"""


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_end_as_if_they_had_not_been(kills: int, tmp_path: Path) -> None:
    steps = 40
    code = CHILD.format(paths=[str(Path(__file__).parent), *sys.path], steps=steps)

    def start(folder: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / folder), str(tmp_path / f"{folder}.st")]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def newest(folder: str) -> int:
        return max((int(p.name.partition("-")[2]) for p in (tmp_path / folder).glob("checkpoint-*")), default=0)

    assert start("whole").wait() == 0
    rng = random.Random(kills)
    for _ in range(kills):
        # somewhere in the next steps, most likely while something is written
        child, reached = start("killed"), newest("killed")
        while newest("killed") <= min(reached, steps - 1) and child.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.3)
        child.kill()
        child.wait()
    assert start("killed").wait() == 0
    assert_equal_weights(load_file(tmp_path / "killed.st"), load_file(tmp_path / "whole.st"))


def test_the_seal_covers_every_file(tmp_path: Path) -> None:
    train(make_model(), make_config(), resume_dir=tmp_path)
    (state,) = tmp_path.iterdir()
    sealed = set(json.loads((state / "depthkv.json").read_text())["files"])
    assert sealed == {p.name for p in state.iterdir()} - {"depthkv.json"}
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= sealed and "training_args.bin" not in sealed
    (state / "depthkv.json").write_text("{}")
    with pytest.raises(CheckpointError, match="whole checkpoint"):
        train(make_model(), make_config(), resume_dir=tmp_path)

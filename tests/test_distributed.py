"""Two processes on gloo: the maps that they draw, the gradients that they get, the checkpoints that they write."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from depthkv import RandomCrossLayer, route
from depthkv.adapt import adapt
from depthkv.adapt.adapters import LoraSettings, add_adapter
from depthkv.adapt.loss import next_token_loss
from depthkv.adapt.objectives import LanguageModelLoss
from depthkv.samplers import independent
from test_adapt import make_blocks, make_config, make_model

SAMPLER = RandomCrossLayer(cross_layer_prob=0.6, seed=1)


def launch(case: str, folder: Path) -> None:
    """Run `case` (a function below) in two processes as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
    code += f"import os, test_distributed; test_distributed.{case}(test_distributed.Path({str(folder)!r}))\n"
    # The interpreter's own end could hang: torch frees a gloo group under the GIL, and that joins a thread which waits
    # for the GIL to free the group's last piece of work. For the same reason no case destroys its group.
    code += "os._exit(0)"
    children = []
    for rank in range(2):
        settings = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        children.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", code],
                env={**os.environ, **settings},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        errors = [child.communicate(timeout=240)[1] for child in children]
    except BaseException:
        for child in children:
            child.kill()
            with child:  # closes its pipe and waits
                pass
        raise
    assert [child.returncode for child in children] == [0, 0], "\n".join(error[-3000:] for error in errors)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


# Gradients


def two_process_gradients(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    blocks = make_blocks(4)[2 * rank : 2 * rank + 2]
    for name, sampler in (("same", SAMPLER), ("independent", independent(SAMPLER, rank))):
        model = make_model().double().train()
        wrapped = nn.parallel.DistributedDataParallel(model)
        with (
            route(model, sampler, step=3, skip_unread=False) as routing,
            next_token_loss(wrapped, torch.float64) as loss,
        ):
            routing.step = 3
            loss({"input_ids": blocks}).backward()  # type: ignore[no-untyped-call]
            drawn = torch.tensor(routing.last_plan.kv_source_layers)
        save_file({**gradients(model), "map": drawn}, folder / f"{name}{rank}.safetensors")
    torch.distributed.barrier()


def test_gradients_equal_those_of_one_process(tmp_path: Path) -> None:
    launch("two_process_gradients", tmp_path)
    blocks = make_blocks(4)
    found = {f"{n}{r}": load_file(tmp_path / f"{n}{r}.safetensors") for n in ("same", "independent") for r in (0, 1)}
    assert torch.equal(found["same0"]["map"], found["same1"]["map"])
    assert torch.equal(found["same0"]["map"], found["independent0"]["map"])
    assert not torch.equal(found["independent0"]["map"], found["independent1"]["map"])
    for name in ("same", "independent"):
        model = make_model().double().train()
        for rank in (0, 1):
            sampler = independent(SAMPLER, rank) if name == "independent" else SAMPLER
            rows = blocks[2 * rank : 2 * rank + 2]
            with route(model, sampler, step=3):
                (model(input_ids=rows, labels=rows).loss / 2).backward()
        for rank in (0, 1):
            ours = found[f"{name}{rank}"]
            for weight, gradient in gradients(model).items():
                # transformers takes the reference's soft-max in fp32
                torch.testing.assert_close(ours[weight], gradient, rtol=1e-4, atol=1e-6)


# Whole runs


def adapt_in_two(folder: Path) -> None:
    model = make_model()
    config = make_config(batch_size=2, max_tokens=4 * 16 * 6, learning_rate=1e-3, save_every_minutes=1e-9)
    result = adapt(model, make_blocks(), config, resume_dir=folder / "state", progress=False)
    assert result.tokens == 4 * 16 * 6 and result.steps == 6
    rank = os.environ["RANK"]
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, folder / f"weights{rank}.safetensors")


def adapter_in_two(folder: Path) -> None:
    model = make_model()
    torch.manual_seed(0)
    adapted: Any = add_adapter(model, LoraSettings(rank=4))
    config = make_config(batch_size=2, max_tokens=4 * 16 * 6, learning_rate=1e-2)
    adapt(adapted, make_blocks(), config, progress=False)
    weights = {n: p.detach().clone() for n, p in adapted.named_parameters() if "lora_" in n}
    save_file(weights, folder / f"weights{os.environ['RANK']}.safetensors")


def test_data_parallel_training_equals_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch("adapt_in_two", tmp_path)

    def route_all(*args: Any, **options: Any) -> Any:
        return route(*args, **{**options, "skip_unread": False})  # AdamW tells a gradient of zero from none

    monkeypatch.setattr("depthkv.adapt.trainer.route", route_all)
    first, second = (load_file(tmp_path / f"weights{rank}.safetensors") for rank in (0, 1))
    model = make_model()
    adapt(model, make_blocks(), make_config(batch_size=4, max_tokens=4 * 16 * 6, learning_rate=1e-3), progress=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter.detach(), rtol=1e-4, atol=2e-5)
    # and one process can go on from what two have saved
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"checkpoint-5", "checkpoint-6"}
    saved = load_file(tmp_path / "state/checkpoint-6/model.safetensors")
    assert torch.equal(saved["model.layers.0.mlp.up_proj.weight"], first["model.layers.0.mlp.up_proj.weight"])


def test_data_parallel_training_of_an_adapter(tmp_path: Path) -> None:
    launch("adapter_in_two", tmp_path)
    first, second = (load_file(tmp_path / f"weights{rank}.safetensors") for rank in (0, 1))
    assert any(value.abs().sum() > 0 for name, value in first.items() if "lora_B" in name)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def steps(model: Any, rows: slice) -> None:
    """Four steps of AdamW on some rows of each batch of four."""
    blocks, optimizer = make_blocks(16), torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    with LanguageModelLoss().bound(model, torch.float32) as loss, route(model, SAMPLER, skip_unread=False):
        for step in range(4):
            loss({"input_ids": blocks[4 * step : 4 * step + 4][rows]}).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()


def shard_and_save(folder: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model: Any = make_model(tie_word_embeddings=False)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    steps(model, slice(2 * rank, 2 * rank + 2))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    if rank == 0:
        model.save_pretrained(folder / "model", state_dict=weights)
    torch.distributed.barrier()


def test_fully_sharded_training_loads_in_one_process(tmp_path: Path) -> None:
    launch("shard_and_save", tmp_path)
    expected = make_model(tie_word_embeddings=False)
    steps(expected, slice(0, 4))
    loaded = type(expected).from_pretrained(tmp_path / "model")
    for (name, ours), theirs in zip(loaded.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-4, atol=2e-5, msg=name)

"""Dry runs of benchmarks/gpu.py with a tiny shape on a CPU, and the tables that are made of its figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from depthkv import SharingPlan, share
from depthkv.memory import cache_bytes
from depthkv.roofline import MachineLimits

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import gpu_attention
import gpu_compiled
import gpu_model
import gpu_tables
import tables
import train_step


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    """Rows that a command writes. What is left out takes seconds and is tested elsewhere, or only matters on a GPU."""
    limits = MachineLimits(bandwidth_bytes_per_s=1e10, matmul_flops_per_s=1e11)
    monkeypatch.setattr(gpu, "measure_limits", lambda device, dtype: limits)
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    path = tmp_path / "gpu.jsonl"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "--tiny", "--device", "cpu", "--out", str(path)])
    gpu.main()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(monkeypatch, tmp_path, "eager")
    cells = {row["plan"]: row for row in rows if row["run"] == "eager" and row["context"] == 24}
    assert list(cells) == list(gpu_model.PLANS)
    config = gpu_model.random_model("tiny", "cpu", torch.float32).config
    for name, row in cells.items():
        plan = gpu_model.make_plan(name, 4)
        assert row["cache_bytes"] == cache_bytes(config, torch.float32, 24 + row["new_tokens"] - 1, 1, plan)
        assert (row.get("decode_ratio") is None) == (name == "g=1") and row["decode_share"] > 0
    found = [row["batch_size"] for row in rows if row["run"] == "largest"]
    assert found == [4] * 3  # the ceiling of a dry run
    _, lines = gpu_tables.eager(rows)
    assert [line[1] for line in lines if line[0] == "24 x 1"] == list(gpu_tables.ORDER)


@pytest.mark.parametrize("part", ["one", "batches"])
def test_static(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str) -> None:
    backends = ["aot_eager", "none"] if part == "one" else ["none"]  # compiling takes seconds
    words = ["--part", part, "--attention", "sdpa", "--backends", *backends, "--plans", "g=2"]
    rows = run(monkeypatch, tmp_path, "static", *words)
    cells = [row for row in rows if row["run"] == "static"]
    assert cells and not any("failed" in row for row in cells)
    assert all(row["relative_error"] < 1e-5 and row["same_token"] == 1 for row in cells)
    names = {"CUDA graph" if backend == "none" else f"CUDA graph, {backend}" for backend in backends}
    assert {row["stack"] for row in cells} == names


def test_wrong_lengths_show_as_an_error() -> None:
    model = gpu_model.random_model("tiny", "cpu", torch.float32)
    plan = SharingPlan.every(2, 4)
    with share(model, plan), torch.no_grad():
        decoding = gpu_compiled.Decoding(model, plan, 2, 300, "sdpa")
        assert decoding.error(decoding.step)["relative_error"] < 1e-5

        def one_too_early() -> torch.Tensor:
            decoding.start(gpu_compiled.CHECK_TOKENS - 1)
            return decoding.step()

        assert decoding.error(one_too_early)["relative_error"] > 1e-4


def test_a_stack_that_fails_leaves_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = run(monkeypatch, tmp_path, "static", "--attention", "flash", "--backends", "none", "--plans", "g=2")
    assert [row["failed"].partition(":")[0] for row in rows if row["run"] == "static"] == ["NotImplementedError"]


def test_probe_compares_with_fp32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_attention, "FUNCTIONS", {"sdpa": wrong})
    rows = run(monkeypatch, tmp_path, "probe")
    (row,) = (row for row in rows if row["run"] == "attention")
    assert row["relative_error"] == pytest.approx(1.0)
    assert {row["stack"] for row in rows if row["run"] == "probe"} == {"CUDA graph, aot_eager", "CUDA graph"}


def wrong(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return torch.zeros_like(query.transpose(1, 2)), None


def test_train_step_takes_a_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    words = ["--shape", "tiny", "--steps", "2", "--batch-size", "1", "--block-size", "16", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["train_step.py", *words])
    train_step.main()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    headings, lines = gpu_tables.train(rows)
    assert [line[2] for line in lines] == ["ordinary", "routed", "distilled"]
    assert all(len(line) == len(headings) for line in lines) and lines[0][0] == "random weights, tiny"


STATIC = {"run": "static", "batch_size": 1, "context": 8192, "cache_bytes": 2**30, "limit_s": 0.004}
STATIC |= {"decode_share": 0.8, "relative_error": 0.01}


def test_tables_of_static_rows() -> None:
    fast = "CUDA graph, inductor"
    rows: list[dict[str, Any]] = [
        {**STATIC, "plan": "g=1", "stack": fast, "tokens_per_s": 200.0},
        {**STATIC, "plan": "g=4", "stack": fast, "tokens_per_s": 220.0},
        {**STATIC, "plan": "g=4", "stack": "CUDA graph", "tokens_per_s": 110.0},
        {**STATIC, "plan": "g=4", "stack": "CUDA graph", "batch_size": 4, "tokens_per_s": 300.0},
        {**STATIC, "plan": "g=4", "stack": "CUDA graph", "batch_size": 4, "tokens_per_s": 400.0},  # measured again
        {"run": "static", "plan": "g=2", "stack": fast, "batch_size": 1, "failed": "Error: no"},
        {**STATIC, "run": "largest", "plan": "g=1", "stack": fast, "batch_size": 50, "tokens_per_s": 2000.0},
        {**STATIC, "run": "largest", "plan": "g=4", "stack": fast, "batch_size": 200, "tokens_per_s": 3000.0},
    ]
    assert tables.table(*gpu_tables.static(rows)).splitlines()[2:] == [
        "| 8,192 x 1 | g=1 | 1.00 GiB | 250.0 | 200.0 |  | 80% |  |  |  | 1.0% |",
        "| 8,192 x 1 | g=4 | 1.00 GiB | 250.0 | 220.0 | 1.100x | 80% | 110.0 |  | 80% | 1.0% / 1.0% |",
        "| 8,192 x 4 | g=4 | 1.00 GiB | 1,000 |  |  |  | 400.0 |  | 80% | 1.0% |",
    ]
    assert tables.table(*gpu_tables.largest(rows)).splitlines()[2:] == [
        "| 8,192 | g=1 | CUDA graph, inductor | 50 |  | 2,000 |  | 80% |",
        "| 8,192 | g=4 | CUDA graph, inductor | 200 |  | 3,000 | 1.50x | 80% |",
    ]

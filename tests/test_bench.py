"""Speed and memory over a grid: what is recorded, also where memory runs out, and what the command shows."""

from __future__ import annotations

import gc
import inspect
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import depthkv.bench as bench_module
from depthkv.adapt.adapters import LoraSettings, add_adapter
from depthkv.bench import ARMS, BenchConfig, bench, bench_grid
from depthkv.cli import main
from depthkv.errors import DepthKVError
from depthkv.plan import SharingPlan
from depthkv.report.reading import read_figures
from depthkv.roofline import MachineLimits
from tiny import tiny_checkpoint, tiny_model

HALF = SharingPlan.every(2, 4)
QUARTER = SharingPlan.every(4, 4)
SMALL = BenchConfig(prompt_tokens=8, new_tokens=3, repeats=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def _little_garbage() -> Iterator[None]:
    """Every run collects garbage first; looking through all of torch's objects for it takes most of the time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> MachineLimits:
    """Known ones, and no time spent on measuring them."""
    known = MachineLimits(bandwidth_bytes_per_s=1e9, matmul_flops_per_s=1e10)
    monkeypatch.setattr(bench_module, "measure_limits", lambda device, dtype: known)
    return known


def exhaust(monkeypatch: pytest.MonkeyPatch, error: Exception, *, arms: set[str], prompt_tokens: int) -> list[str]:
    """Make runs of `arms` with prompts of at least so many tokens fail; the list gets each arm that is tried."""
    real, tried = bench_module._run, []

    def run(model: Any, prompt: torch.Tensor, *args: Any) -> Any:
        arm = "shared" if "forward" in model.model.__dict__ else "full"
        tried.append(arm)
        if arm in arms and prompt.shape[1] >= prompt_tokens:
            raise error
        return real(model, prompt, *args)

    monkeypatch.setattr(bench_module, "_run", run)
    return tried


class TestInterTokenLatency:
    def test_is_the_median_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A forward that sleeps, one step of them longer: the median does not see it, tokens per second do."""
        model = tiny_model()
        real, calls = model.forward, []

        def slow(*args: Any, **kwargs: Any) -> Any:
            calls.append(0)
            time.sleep(0.3 if len(calls) % 8 == 5 else 0.02)
            return real(*args, **kwargs)

        slow.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
        model.forward = slow
        result = bench(model, SharingPlan.full(4), BenchConfig(prompt_tokens=4, new_tokens=8, repeats=1))
        for arm in ARMS:
            latency, speed = result.median(arm, "itl_s"), result.median(arm, "decode_tokens_per_s")
            assert latency is not None and 0.02 <= latency < 0.1
            assert speed is not None and 7 / speed >= 0.3 + 6 * 0.02

    def test_is_a_figure_like_the_others(self) -> None:
        figures = bench(tiny_model(), HALF, SMALL).to_dict()
        for arm in ARMS:
            assert 0 < figures["arms"][arm]["itl_s_min"] <= figures["arms"][arm]["itl_s"]
        assert figures["ratios"]["itl_s"] > 0


class TestWork:
    def test_halfway_through_decoding(self) -> None:
        model = tiny_model()
        result = bench(model, HALF, BenchConfig(prompt_tokens=10, new_tokens=6, repeats=1, batch_size=3))
        full, shared = (result.work[arm]["decode"] for arm in ARMS)
        # 5 steps read 11 to 15 tokens each in all 4 layers
        assert full.cache_read_bytes == shared.cache_read_bytes == 3 * 4 * 13 * 64
        assert full.cache_written_bytes == 2 * shared.cache_written_bytes == 3 * 4 * 64
        assert result.work["full"]["prefill"].cache_written_bytes == 10 * full.cache_written_bytes

    def test_an_adapter_computes_the_last_logits_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As generate() does; PEFT's forward does not name the argument that asks for it."""
        model = add_adapter(tiny_model(), LoraSettings(rank=2))
        seen = []
        model.get_output_embeddings().register_forward_hook(lambda head, args, out: seen.append(out.shape[1]))
        result = bench(model, HALF, SMALL)
        assert set(seen) == {1}
        assert result.work["shared"]["decode"].weight_bytes > 0.9 * result.work["full"]["decode"].weight_bytes


class TestGrid:
    def test_cells(self, limits: MachineLimits) -> None:
        configs = [BenchConfig(prompt_tokens=n, new_tokens=3, repeats=1, batch_size=b) for n in (8, 16) for b in (1, 2)]
        done: list[int] = []
        result = bench_grid(tiny_model(), [HALF, QUARTER], configs, done.append)
        found = result.to_dict()
        assert sum(done) == len(found["cells"]) * 2 * 2 == 32
        places = [(cell["leaders"], cell["prompt_tokens"], cell["batch_size"]) for cell in found["cells"]]
        assert places == [(leaders, n, b) for leaders in ([0, 2], [0]) for n in (8, 16) for b in (1, 2)]
        for cell in found["cells"]:
            tokens = cell["prompt_tokens"] + 2
            assert cell["arms"]["full"]["cache_bytes"] == cell["batch_size"] * tokens * 4 * 64
            assert cell["ratios"]["cache_bytes"] == cell["retention"] == len(cell["leaders"]) / 4
            assert cell["new_tokens"] == 3
            for arm in ARMS:
                figures = cell["roofline"][arm]
                limit = max(figures["decode_bytes"] / 1e9, figures["decode_flops"] / 1e10)
                assert figures["decode_limit_s"] == limit
                assert figures["decode_share"] == pytest.approx(limit / cell["arms"][arm]["itl_s"])
                assert figures["prefill_share"] == pytest.approx(
                    figures["prefill_limit_s"] / cell["arms"][arm]["ttft_s"]
                )
        assert found["machine_limits"] == {"bandwidth_bytes_per_s": 1e9, "matmul_flops_per_s": 1e10}
        for key in ("arms", "ratios", "retention", "leaders", "prompt_tokens", "batch_size"):
            assert found[key] == found["cells"][0][key]

    def test_nothing_to_measure(self) -> None:
        with pytest.raises(DepthKVError, match="at least one plan and one config, got 0 and 1"):
            bench_grid(tiny_model(), [], [SMALL])


class TestOutOfMemory:
    ERRORS = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    )

    @pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "windows", "cublas", "python"])
    def test_the_grid_goes_on(self, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        tried = exhaust(monkeypatch, error, arms={"full"}, prompt_tokens=16)
        configs = [BenchConfig(prompt_tokens=n, new_tokens=3, repeats=2) for n in (8, 16, 12)]
        done: list[int] = []
        model = tiny_model()
        found = bench_grid(model, [HALF], configs, done.append).to_dict()
        assert sum(done) == 3 * 2 * 3 and tried.count("full") == 3 + 1 + 3
        first, second, third = found["cells"]
        full, shared = second["arms"]["full"], second["arms"]["shared"]
        assert full.pop("out_of_memory") is True and set(full.values()) == {None}
        assert shared["ttft_s"] > 0 and "out_of_memory" not in shared
        assert set(second["ratios"].values()) == {None}
        assert second["roofline"]["full"]["decode_share"] is None
        assert second["roofline"]["full"]["decode_bytes"] > 0 and second["roofline"]["shared"]["decode_share"] > 0
        for cell in (first, third):
            assert cell["arms"]["full"]["ttft_s"] > 0 and cell["ratios"]["cache_bytes"] == 0.5
        assert "forward" not in model.model.__dict__

    def test_nothing_fits_in_the_first_cell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        exhaust(monkeypatch, self.ERRORS[0], arms={"full", "shared"}, prompt_tokens=0)
        with pytest.raises(DepthKVError, match=r"expected enough memory for 8 \+ 3 tokens .* got out of memory"):
            bench_grid(tiny_model(), [HALF], [SMALL])

    def test_nothing_fits_in_a_later_cell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        exhaust(monkeypatch, self.ERRORS[0], arms={"full", "shared"}, prompt_tokens=9)
        found = bench_grid(tiny_model(), [HALF], [SMALL, BenchConfig(prompt_tokens=9, new_tokens=2, repeats=1)])
        assert [cell.out_of_memory for cell in found.cells] == [(), ARMS]

    def test_a_run_that_allocates_too_much(self) -> None:
        """The real thing: torch refuses an impossible tensor."""
        model = tiny_model()

        def greedy(*args: Any, logits_to_keep: int = 0, **kwargs: Any) -> Any:
            torch.empty(2**60, dtype=torch.uint8)

        model.forward = greedy
        assert bench(model, SharingPlan.full(4), SMALL).out_of_memory == ARMS

    def test_other_errors_are_raised(self, monkeypatch: pytest.MonkeyPatch) -> None:
        exhaust(monkeypatch, RuntimeError("a bug"), arms={"shared"}, prompt_tokens=0)
        with pytest.raises(RuntimeError, match="a bug"):
            bench(tiny_model(), HALF, SMALL)


class TestCommand:
    def run(self, *arguments: object) -> int:
        return main([str(argument) for argument in ("bench", *arguments, "--new-tokens", 3, "--repeats", 1)])

    def test_one_cell(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(model, "--prompt-tokens", 8, "--json", tmp_path / "o.json") == 0
        out = capsys.readouterr().out
        for text in ("8 + 3 tokens, batch 1", "between tokens", "decoding, of the limit", "2 of 4 layers are leaders"):
            assert text in out
        found = json.loads((tmp_path / "o.json").read_text())
        assert json.loads(out.strip().splitlines()[-1]) == found
        assert found["command"].startswith("depthkv bench ") and found["environment"]["torch"] == torch.__version__
        assert len(found["cells"]) == 1 and found["prompt_tokens"] == 8

    def test_grid(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        options = ("--prompt-tokens", 8, "--prompt-tokens", 12, "--batch-size", 1, "--batch-size", 2)
        assert self.run(model, *options, "--retention", ".5", ".25", "--json", tmp_path / "o.json") == 0
        out = capsys.readouterr().out
        rows = [line for line in out.splitlines() if " of 4 " in line]
        assert len(rows) == 8 and "0.500x" not in rows[0] and "KiB → " in rows[0]
        found = json.loads((tmp_path / "o.json").read_text())
        assert [cell["retention"] for cell in found["cells"]] == [0.5] * 4 + [0.25] * 4
        # the report reads it
        figures = read_figures(tmp_path / "o.json")
        assert len(figures.cells) == 8 and figures.cells[0].roofline["full"]["decode_share"] > 0
        assert figures.cells[3].batch_size == 2 and figures.cells[2].prompt_tokens == 12

    def test_several_plans(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        HALF.save(tmp_path / "half.json")
        SharingPlan([0, 0, 0, 3]).save(tmp_path / "other.json")
        plans = ("--plan", tmp_path / "half.json", "--plan", tmp_path / "other.json", "--plan", tmp_path / "half.json")
        assert self.run(model, *plans, "--prompt-tokens", 8, "--json", tmp_path / "o.json") == 0
        found = json.loads((tmp_path / "o.json").read_text())
        assert [cell["leaders"] for cell in found["cells"]] == [[0, 2], [0, 3]]

    def test_out_of_memory_is_shown(
        self, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        exhaust(monkeypatch, TestOutOfMemory.ERRORS[0], arms={"full"}, prompt_tokens=12)
        assert self.run(model, "--prompt-tokens", 12) == 0
        assert "out of memory" in capsys.readouterr().out
        assert self.run(model, "--prompt-tokens", 8, "--prompt-tokens", 12) == 0
        assert "out of memory → " in capsys.readouterr().out

    @pytest.mark.parametrize("option", ["--prompt-tokens", "--batch-size"])
    def test_bad_input(self, option: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(model, option, 4, option, 0) == 2
        err = capsys.readouterr().err
        assert option in err and "expected a whole number of at least 1, got '0'" in err and err.count("\n") == 1

    def test_too_long(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(model, "--prompt-tokens", 8, "--prompt-tokens", 4000) == 2
        err = capsys.readouterr().err
        assert "--prompt-tokens and --new-tokens together of at most the 2048 positions" in err and "4003" in err

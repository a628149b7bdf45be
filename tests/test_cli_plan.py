"""`depthkv plan`: what it writes and shows, that it goes on after a stop, and that bad input gets one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig

from depthkv import SharingPlan, load, share
from depthkv.calibrate import Calibration, run
from depthkv.checkpoint import save
from depthkv.cli import main
from depthkv.data import named_blocks, resolve_data, split_documents
from depthkv.evaluate import perplexity
from depthkv.evaluate.perplexity import spread
from depthkv.memory import device_room
from depthkv.report.reading import read_figures
from families import tiny_model as family_model
from tiny import figures, tiny_checkpoint, tiny_text, tiny_tokenizer

SMALL = ("--block-size", 32, "--blocks", 6, "--cost-blocks", 4, "--held-out-blocks", 4, "--evaluations", 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=6)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        tiny_text(folder / f"{i}.txt", num_words=400, seed=i)
    return folder


def plan(model: Path, text: object, *more: object, out: Path, small: tuple[object, ...] = SMALL) -> int:
    arguments = ["plan", model, "--data", text, "--out", out, *more, *small]
    return main([str(argument) for argument in arguments])


def test_plan_is_chosen_measured_and_explained(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    assert plan(model, text, "--retention", ".5", "--json", tmp_path / "f.json", out=out) == 0
    found, chosen = figures(tmp_path / "f.json"), SharingPlan.load(out)
    assert list(chosen.kv_source_layers) == found["kv_source_layers"] and len(chosen.leaders) == 3
    assert chosen.provenance["made_by"].startswith("depthkv plan") and chosen.provenance["order"] == found["order"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "plan.calibration.json", "plan.json"]
    # measured on blocks of the training documents, compared on blocks of the others
    loaded, tokenizer, _ = load(model)
    for part, documents, count in ((0, "measured_loss", 6), (1, "loss_score", 4)):
        blocks, names = named_blocks(split_documents(resolve_data(text))[part], tokenizer, 32)
        wanted = blocks[spread(len(blocks), count)]
        wanted = wanted[spread(6, 4)] if part == 0 else wanted
        with share(loaded, chosen):
            expected = perplexity(loaded, wanted).loss
        got = found["comparison"][0][documents]
        assert (got["value"] if part else got) == pytest.approx(expected, abs=1e-5) and len(names) > count
    assert found["measured_loss"] <= min(
        row["measured_loss"] for row in found["comparison"] if len(row["leaders"]) == 3
    )
    shown = capsys.readouterr().out
    assert chosen.diagram() in shown and "evenly spaced" in shown and "3 of 6 layers" in shown
    # the report reads it, and every other command takes the plan
    assert read_figures(tmp_path / "f.json")
    assert main(["report", str(tmp_path / "f.json"), "--out", str(tmp_path / "r.html")]) == 0
    assert main(["generate", str(model), "--plan", str(out), "--prompt", "w1", "--max-new-tokens", "2"]) == 0


def test_another_budget_needs_no_new_calibration(model: Path, text: Path, tmp_path: Path) -> None:
    assert plan(model, text, "--retention", ".5", out=tmp_path / "half.json") == 0
    kept = tmp_path / "half.calibration.json"
    costs = Calibration.load(kept).cost_losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "Probe", lambda model: pytest.fail("calibrated again"))
        patch.setattr(run.Calibrator, "with_own_kv", real_full_cache)
        more = ("--kv-budget", 128, "--calibration", kept, "--nearest", "--json", tmp_path / "f.json")
        assert plan(model, text, *more, out=tmp_path / "third.json") == 0
    third = SharingPlan.load(tmp_path / "third.json")
    assert len(third.leaders) == 2 and third == SharingPlan.from_leaders(third.leaders, 6)
    assert Calibration.load(kept).cost_losses == costs
    assert figures(tmp_path / "f.json")["budget"]["words"] == "128 B per token in float32; nearest source"


def real_full_cache(self: Any) -> Any:
    """Without an adapter, the model itself."""
    from contextlib import nullcontext

    return nullcontext()


def test_memory_counts_weights_and_windows(text: Path, tmp_path: Path) -> None:
    config: Any = family_model("gemma3_text").config
    assert isinstance(config, Gemma3TextConfig)
    mixed = family_model("gemma3_text", num_hidden_layers=6, vocab_size=64)
    save(tmp_path / "mixed", mixed, tiny_tokenizer(), None)
    # room for one sequence's windows and one and a half full layers
    memory = 2**30
    memory += 128 * (150 + 4 * 7) - device_room(mixed.config, torch.float32, memory, 100, 1)
    more = ("--memory", memory, "--context", 100, "--json", tmp_path / "f.json")
    assert plan(tmp_path / "mixed", text, *more, out=tmp_path / "p.json") == 0
    chosen = SharingPlan.load(tmp_path / "p.json")
    assert sum(1 for layer in chosen.leaders if layer % 3 == 2) == 1 and {0, 2} <= set(chosen.leaders)
    stages = ("--kv-budget", 640, "--pipeline-stages", "3,3", "--keep", 1, "--prefill-weight", 0.1)
    assert plan(tmp_path / "mixed", text, *stages, out=tmp_path / "q.json") == 0
    assert SharingPlan.load(tmp_path / "q.json").leaders == (0, 1, 2, 3, 5)


def test_several_texts_take_part_alike(model: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for i in range(4):
        tiny_text(other / f"{i}.txt", num_words=400, seed=90 + i)
    more = ("--data", other, "--retention", ".5", "--json", tmp_path / "f.json")
    assert plan(model, text, *more, out=tmp_path / "p.json") == 0
    assert figures(tmp_path / "f.json")["data"] == [str(text), str(other)]
    documents = Calibration.load(tmp_path / "p.calibration.json").block_documents
    assert {name.split(": ")[0] for name in documents} == {str(text), str(other)}


def test_a_text_of_one_document_gives_no_intervals(model: Path, tmp_path: Path) -> None:
    one = tiny_text(tmp_path / "one.txt")
    assert plan(model, one, "--retention", ".5", "--json", tmp_path / "f.json", out=tmp_path / "p.json") == 0
    found = figures(tmp_path / "f.json")
    assert found["certainty"] is None and found["comparison"][0]["against_even"]["low"] is None
    assert main(["report", str(tmp_path / "f.json"), "--out", str(tmp_path / "r.html")]) == 0


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_a_stopped_run_goes_on(model: Path, text: Path, tmp_path: Path, kill: signal.Signals) -> None:
    more = ("--retention", ".5", "--seed", 3)
    assert plan(model, text, *more, out=tmp_path / "whole.json") == 0
    whole = Calibration.load(tmp_path / "whole.calibration.json")
    # the process stops itself after so many losses of pairs, and later after so many plans
    script = """
import os, sys
from depthkv.calibrate import run
from depthkv.cli import main
run.SAVE_SECONDS = 0.0
left, signal = int(sys.argv[1]), int(sys.argv[2])
real = run.Calibrator._save_sometimes
def save(self):
    global left
    real(self)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal)
run.Calibrator._save_sometimes = save
sys.exit(main(sys.argv[3:]))
"""
    arguments = ["plan", model, "--data", text, "--out", tmp_path / "plan.json", *more, *SMALL]
    for after in (5, 14):
        command = [sys.executable, "-c", script, str(after), str(int(kill)), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == (130 if kill == signal.SIGINT else -kill), done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "plan.json").exists()
    assert plan(model, text, *more, out=tmp_path / "plan.json") == 0
    assert SharingPlan.load(tmp_path / "plan.json") == SharingPlan.load(tmp_path / "whole.json")
    found = Calibration.load(tmp_path / "plan.calibration.json")
    assert torch.allclose(found.cost(), whole.cost(), atol=1e-6)
    assert list(found.plan_losses)[: len(whole.plan_losses)] == list(whole.plan_losses)


BAD_INPUT: dict[str, tuple[tuple[object, ...], str]] = {
    "plan without a budget": ((), "expected one of --retention, --kv-budget and --memory"),
    "two budgets of a plan": (("--retention", ".5", "--kv-budget", "1KiB"), "expected one of --retention"),
    "retention above 1": (("--retention", "2"), "--retention"),
    "a budget for everything": (
        ("--retention", "1"),
        "--retention: expected a budget that not all layers' caches fit into, got 6 of 6 layers",
    ),
    "a budget that is no size": (("--kv-budget", "much"), "--kv-budget: expected a size"),
    "a budget for nothing": (
        ("--kv-budget", "10"),
        "--kv-budget: expected a budget for the 1 layers that must lead (0), got one of 10 B",
    ),
    "memory without a context": (("--memory", "1GiB"), "expected --context with --memory"),
    "memory below the weights": (
        ("--memory", "1KiB", "--context", "8"),
        "--memory: expected memory for a cache beside",
    ),
    "context of a retention": (("--retention", ".5", "--context", "8"), "expected --context and --batch with"),
    "a layer that is not there": (("--retention", ".5", "--keep", "6"), "--keep: expected layers from 0 to 5, got 6"),
    "too many layers to keep": (("--retention", ".33", "--keep", "1", "2"), "--retention: expected a budget for the"),
    "stages of other layers": (("--retention", ".5", "--pipeline-stages", "2,3"), "--pipeline-stages: expected"),
    "no stages": (("--retention", ".5", "--pipeline-stages", ""), "--pipeline-stages: expected"),
    "more stages than leaders": (("--retention", ".5", "--pipeline-stages", "4"), "must lead (0, 1, 3, 4)"),
    "negative weight": (("--retention", ".5", "--prefill-weight", "-1"), "--prefill-weight"),
    "more blocks than there are": (
        ("--retention", ".5", "--blocks", "4", "--cost-blocks", "5"),
        "--cost-blocks: expected",
    ),
    "calibration of something else": (
        ("--retention", ".5", "--calibration", "old.json"),
        "--calibration: old.json: expected",
    ),
    "calibration onto the plan": (
        ("--retention", ".5", "--calibration", "plan.json"),
        "--calibration: expected another",
    ),
    "figures onto the plan": (("--retention", ".5", "--json", "plan.json"), "--json: expected another file"),
    "blocks longer than positions": (("--retention", ".5", "--block-size", "4096"), "--block-size"),
    "a folder as the plan": (("--retention", ".5", "--out", "folder"), "--out"),
    "no text": (("--retention", ".5", "--data", "none.txt"), "none.txt"),
}
"""Options after those of a good command, and what the line says."""


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_line(
    name: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.json").write_text('{"format": "depthkv-calibration", "version": 1}', encoding="utf-8")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    more, expected = BAD_INPUT[name]
    assert plan(model, text, *SMALL, out=Path("plan.json"), small=more) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("depthkv: ") and expected in err, err
    assert "Traceback" not in err and out == ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_model_whose_layers_cannot_share(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = tiny_checkpoint(tmp_path / "one", num_hidden_layers=1)
    assert plan(one, text, "--kv-budget", 32, out=tmp_path / "p.json") == 2
    assert "expected layers that can share" in capsys.readouterr().err


def test_losses_that_are_not_finite(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, tokenizer, _ = load(tiny_checkpoint(tmp_path / "m", num_hidden_layers=4))
    with torch.no_grad():
        broken.model.layers[2].self_attn.v_proj.weight.fill_(float("nan"))
    save(tmp_path / "broken", broken, tokenizer, None)
    assert plan(tmp_path / "broken", text, "--retention", ".5", out=tmp_path / "p.json") == 2
    err = capsys.readouterr().err
    assert "expected finite figures" in err and "Traceback" not in err and not (tmp_path / "p.json").exists()

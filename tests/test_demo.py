"""The demo's course on a tiny model; the real one takes minutes and is marked slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from depthkv import SharingPlan, load
from depthkv.cli import main
from depthkv.demo import run_demo
from depthkv.errors import DataError, DepthKVError
from tiny import LAYERS, tiny_checkpoint, tiny_text

SETTINGS = {"block_size": 64, "batch_size": 2, "learning_rate": 1e-2, "precision": "fp32"}


def demo(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    model, text = tmp_path / "tiny", tmp_path / "text.txt"
    if not model.exists():
        tiny_checkpoint(model)
        tiny_text(text)
    settings: dict[str, Any] = dict(model_name=str(model), data=str(text), device="cpu", minutes=0.02, eval_blocks=3)
    return run_demo(tmp_path / "out", **{**settings, "settings": SETTINGS, "progress": False, **changes})


def test_demo_leaves_everything_in_its_folder(tmp_path: Path) -> None:
    figures = demo(tmp_path)
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert names == {"figures.json", "retention.png", "loss.png", "plan.png", "samples.txt", "model"}
    assert json.loads((out / "figures.json").read_text(encoding="utf-8"))["after"] == json.loads(
        json.dumps(figures["after"])
    )
    assert [row["retention"] for row in figures["before"]] == [1.0, 0.5, 0.5, 0.25]
    assert figures["after"][1]["loss"] < figures["before"][1]["loss"]
    _, _, plan = load(out / "model")
    assert plan == SharingPlan.every(2, LAYERS)
    full, shared = (sample["cache_bytes"] for sample in figures["samples"][:2])
    assert full == 2 * shared > 0
    demo(tmp_path)  # an earlier demo's folder is taken again


def test_demo_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from depthkv.adapt.trainer import RoutingTrainer

    real, calls = RoutingTrainer.compute_loss, 0

    def stop(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(RoutingTrainer, "compute_loss", stop)
    with pytest.raises(KeyboardInterrupt):
        # every step is saved: what a kill would have left
        demo(tmp_path, settings={**SETTINGS, "save_every_minutes": 1e-9})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["training"]
    figures = demo(tmp_path)
    assert figures["training"]["steps"] > 5 and not (tmp_path / "out" / "training").exists()
    assert calls < 5 + figures["training"]["steps"]


def test_demo_without_a_network_uses_its_own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import depthkv.demo

    real = depthkv.demo.resolve_data

    def offline(name: str) -> Any:
        if name != "builtin:fallback":
            raise DataError(f"expected to fetch {name}, got no network")
        return real(name)

    monkeypatch.setattr(depthkv.demo, "resolve_data", offline)
    assert demo(tmp_path, data="builtin:anarchism")["data"] == "builtin:fallback"
    with pytest.raises(DataError, match="builtin:anarchy"):
        demo(tmp_path, data="builtin:anarchy")


def test_demo_shows_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_checkpoint(tmp_path / "tiny")
    text = tiny_text(tmp_path / "text.txt", num_words=40000)
    options = ["--model", str(model), "--data", str(text), "--out", str(tmp_path / "out"), "--minutes", "0.01"]
    assert main(["demo", *options, "--blocks", "2", "--json", str(tmp_path / "o.json")]) == 0
    shown = capsys.readouterr().out
    assert "2 of 4 (50%)" in shown and "untrained" in shown and "shared cache" in shown
    assert json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))["model"] == str(model)


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(DepthKVError, match=r"thesis\.tex"):
        demo(tmp_path)


@pytest.mark.slow
def test_demo_with_the_adapter(tmp_path: Path) -> None:
    figures = run_demo(tmp_path / "out", device="cpu", progress=False)
    full, half = figures["after"][:2]
    assert figures["before"][1]["loss"] > 11 and half["loss"] <= 3.3 and full["loss"] == figures["before"][0]["loss"]
    assert figures["seconds"]["total"] < 5 * 60


@pytest.mark.slow
def test_demo_on_the_real_model(tmp_path: Path) -> None:
    figures = run_demo(tmp_path / "out", train=True, device="cpu", progress=False)
    full, half = figures["after"][:2]
    assert figures["before"][1]["loss"] > 11 and half["loss"] <= 4.2 and full["loss"] <= 3.35
    assert figures["seconds"]["total"] < 15 * 60

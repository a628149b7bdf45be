"""benchmarks/joint.py on a tiny model: every subset at every size, resumed; its tables and its picture."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from depthkv import SharingPlan
from depthkv.compress import CacheRecipe
from depthkv.compress.planner import subsets
from depthkv.compress.space import axes_of
from tiny import tiny_checkpoint, tiny_text

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("joint")
    tiny_checkpoint(made / "model", num_hidden_layers=6)
    (made / "text").mkdir()
    for i in range(12):
        tiny_text(made / "text" / f"{i}.txt", num_words=400, seed=i)
    nested = [[0, 0, 2, 0, 0, 2], [0] * 6]
    SharingPlan([0, 0, 2, 0, 0, 5], {"nested": nested, "larger": [[0, 0, 2, 0, 4, 5]]}).save(made / "plan.json")
    return made


def measure(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> list[dict[str, Any]]:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import joint

    command = "joint.py model --label tiny --plan plan.json --data text --keep kept.json --factors 2 8 --context 96 "
    command += "--blocks 2 --held-out-blocks 2 --evaluations 1 --dtype float32 --out joint.jsonl"
    monkeypatch.setattr(sys, "argv", [*command.split(), *more])
    joint.main()
    return [json.loads(line) for line in Path("joint.jsonl").read_text().splitlines()]


def test_every_subset_at_every_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = measure(folder, monkeypatch, "--retrieval", "1", "--batch-size", "2")
    assert [tuple(line["axes"]) for line in lines] == [(), *subsets(), *subsets()]
    for line in lines[1:]:
        if line["recipe"] is None:
            assert "loss" not in line and line["factor"] == 8 and len(line["axes"]) < 3
            continue
        recipe = CacheRecipe.from_dict(line["recipe"])
        assert set(axes_of(recipe)) <= set(line["axes"])
        assert line["bytes"] <= line["full_bytes"] / line["factor"]
        assert line["retrieval"]["count"] == 1 and line["loss"]["count"] == 2
    for factor in (2, 8):
        found = {tuple(line["axes"]): line for line in lines if line["factor"] == factor and line["recipe"]}
        for axes, line in found.items():  # more axes never lose more where they are chosen
            for fewer, other in found.items():
                assert not set(fewer) < set(axes) or line["train_excess"] <= other["train_excess"]
    shown = capsys.readouterr().out
    # what was stopped goes on, and what is there stays
    path = folder / "joint.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))
    again = measure(folder, monkeypatch, "--retrieval", "1", "--batch-size", "2")
    assert [{k: v for k, v in line.items() if k not in ("seconds", "measured")} for line in again] == [
        {k: v for k, v in line.items() if k not in ("seconds", "measured")} for line in lines
    ]
    assert shown.splitlines()[-8:] == capsys.readouterr().out.splitlines()[-8:]


def test_tables_and_picture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = measure(folder, monkeypatch)
    import tables

    monkeypatch.setattr(tables, "RAW", folder)
    excess = tables.TABLES["joint"]()
    assert "| tiny | all three |" in excess and "all three, of the best single" in excess
    assert tables.TABLES["joint-recipes"]().count("| tiny |") == 2
    monkeypatch.syspath_prepend(ROOT / "docs")
    import pictures

    drawn = pictures.joint(lines)
    ElementTree.fromstring(drawn)
    assert len(drawn) < 10_000 and drawn.count("all three") == 1

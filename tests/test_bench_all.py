"""benchmarks/all.py: rows replace earlier ones when a benchmark succeeded, and only then; what moved is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
WRITES = 'import json, sys; open(sys.argv[1], "a").write(json.dumps({row}) + chr(10))'

Bench = Callable[..., int]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import all as runner
    import moved
    import steps

    return runner, moved, steps


@pytest.fixture
def bench(modules: Any, tmp_path: Path) -> Bench:
    """Calls it with benchmarks that write one row each: of `switching.jsonl`, whose table has two figures."""
    runner, _, steps = modules
    raw = shutil.copytree(ROOT / "docs" / "raw", tmp_path / "raw")
    # whatever has been measured: 4.50 ms and 0.06 ms are what it is compared with
    (row,) = lines(raw / "switching.jsonl")
    (raw / "switching.jsonl").write_text(json.dumps(row | {"share_s": 0.0045, "remove_s": 0.00006}) + "\n")

    def step(name: str, code: str, **more: Any) -> Any:
        commands = (f"python -c '{code}' {{out}}",)
        settings = {"raw": "switching.jsonl", "key": (), "seconds": 1, "quick": commands} | more
        return steps.Step(name=name, commands=commands, **settings)

    def call(codes: dict[str, str], *options: str, **more: Any) -> int:
        made = [step(name, code, **more) for name, code in codes.items()]
        places = ["--out", str(tmp_path / "out"), "--raw", str(tmp_path / "raw")]
        return int(runner.main([*places, *options], made))

    return call


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def writing(**row: Any) -> str:
    return WRITES.format(row=json.dumps(row))


def test_a_benchmark_replaces_its_row(bench: Bench, tmp_path: Path) -> None:
    assert bench({"one": writing(share_s=0.009, remove_s=0.00006)}) == 0
    (row,) = lines(tmp_path / "raw" / "switching.jsonl")
    assert row["share_s"] == 0.009 and row["date"] and row["environment"]["torch"]
    assert str(tmp_path) not in json.dumps(row)
    (moved,) = lines(tmp_path / "raw" / "moved.jsonl")
    assert (moved["table"], moved["row"], moved["before"], moved["after"]) == (
        "switching",
        "`share()`",
        "4.50 ms",
        "9.00 ms",
    )


def test_one_that_fails_stops_no_other(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tmp_path / "raw" / "switching.jsonl").read_text()
    codes = {"broken": "import sys; sys.exit(3)", "of no table": writing(share_s=None), "none": ""}
    assert bench(codes) == 1
    assert (tmp_path / "raw" / "switching.jsonl").read_text() == before
    assert bench(codes | {"good": writing(share_s=0.009, remove_s=0.1)}) == 1
    assert lines(tmp_path / "raw" / "switching.jsonl")[0]["remove_s"] == 0.1
    assert "3 failed" in capsys.readouterr().out


def test_it_goes_on_where_it_was(bench: Bench, tmp_path: Path) -> None:
    once = f'open("{tmp_path / "calls"}", "a").write("x"); {writing(share_s=0.009, remove_s=0.1)}'
    waits = f'assert __import__("os").path.exists("{tmp_path / "now"}"); {writing(share_s=0.02, remove_s=0.1)}'
    assert bench({"once": once, "waits": waits}) == 1
    (tmp_path / "now").touch()
    assert bench({"once": once, "waits": waits}) == 0
    assert (tmp_path / "calls").read_text() == "x"
    # compared with what was there before the first call
    assert lines(tmp_path / "raw" / "moved.jsonl")[0]["before"] == "4.50 ms"
    # all was done: one of them again, compared with the same as before, or a new round
    assert bench({"once": once, "waits": waits}, "--only", "waits") == 0
    assert lines(tmp_path / "raw" / "moved.jsonl")[0]["before"] == "4.50 ms"
    assert (tmp_path / "calls").read_text() == "x"
    assert bench({"once": once, "waits": waits}) == 0
    assert (tmp_path / "calls").read_text() == "xx" and lines(tmp_path / "raw" / "moved.jsonl") == []


def test_a_word_of_why_stays(bench: Bench, tmp_path: Path) -> None:
    good = writing(share_s=0.009, remove_s=0.00006)
    assert bench({"one": good}) == 0
    path = tmp_path / "raw" / "moved.jsonl"
    path.write_text(json.dumps(lines(path)[0] | {"why": "another machine"}) + "\n")
    assert bench({"one": good, "two": good}) == 0  # goes on: the second is left
    assert [row["why"] for row in lines(path)] == ["another machine"]


def test_what_is_missing_is_skipped(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tmp_path / "raw" / "switching.jsonl").read_text()
    assert bench({"one": writing(share_s=1, remove_s=1)}, needs=("no_such_module",)) == 0
    assert "pip install no_such_module" in capsys.readouterr().out
    assert (tmp_path / "raw" / "switching.jsonl").read_text() == before


def test_rows_of_a_gpu_and_of_other_runs_stay(modules: Any, tmp_path: Path) -> None:
    runner = modules[0]
    shutil.copytree(ROOT / "docs" / "raw", tmp_path / "raw")
    path = tmp_path / "raw" / "heads.jsonl"
    old = lines(path)
    gpu = old[0] | {"environment": {"device": "NVIDIA H200"}}
    path.write_text("".join(json.dumps(row) + "\n" for row in [gpu, *old]))
    new = old[0] | {"date": "another day"}
    runner.merge(path, [new], ("run",))
    assert lines(path) == [gpu, new, *old[1:]]


@pytest.mark.parametrize(
    ("before", "after", "is_moved"),
    [
        ("1.00x (0.90 to 1.10)", "1.00x (0.50 to 2.00)", False),
        ("1.00x", "1.09x", False),
        ("1.00x", "1.11x", True),
        ("+0.01", "+0.02", False),  # rounding
        ("57% / 56%", "57% / 40%", True),
        ("1,024 B", "1,024 B", False),
        ("1,024 B", "2,048 B", True),
        ("missed", "reached", False),
        ("3.4", "", True),
    ],
)
def test_what_has_moved(modules: Any, before: str, after: str, is_moved: bool) -> None:
    assert modules[1].moved(before, after) is is_moved


def test_every_raw_file_is_run_or_named(modules: Any) -> None:
    steps = modules[2]
    named = {step.raw for step in steps.STEPS} | set(steps.ELSEWHERE) | {"moved.jsonl"}
    assert {path.name for path in (ROOT / "docs" / "raw").glob("*.jsonl")} == named
    assert sum(step.seconds for step in steps.STEPS if not step.long) < 90 * 60
    assert len({step.name for step in steps.STEPS}) == len(steps.STEPS)


@pytest.mark.slow
def test_all_of_them_with_tiny_sizes(modules: Any, tmp_path: Path) -> None:
    assert modules[0].main(["--quick", "--out", str(tmp_path)]) == 0

"""Damaged files of every format: the library's own error or none, and of commands one line and nothing written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from damage import KINDS_OF_FILE, Target, broken_json, put, targets
from depthkv.architectures import layer_kinds
from depthkv.checkpoint import load_config
from depthkv.errors import DepthKVError

CASES = int(os.environ.get("DEPTHKV_FUZZ_CASES", "15"))
"""Of each format; `make fuzz` takes many more."""
SEED = int(os.environ.get("DEPTHKV_FUZZ_SEED", "0"))

NAMES = (
    "plan", "recipe", "calibration", "losses", "router", "questions", "text", "completion request", "chat request",
    "inspect: config", "inspect: plan", "inspect: recipe", "inspect: adapter", "recipe: plan", "load: config",
    "load: plan", "load: generation config", "report: evaluation", "report: bench", "report: plan",
    "report: generation",
)  # fmt: skip


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    found = targets(tmp_path_factory.mktemp("formats"))
    assert tuple(found) == NAMES
    return found


def outcome(target: Target, data: bytes, kind: str = "file") -> str:
    """Read a damaged file: "read" or "refused". Anything else that comes of it is an error of ours."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "here" / target.name
        path.parent.mkdir()
        put(path, data, kind)
        before = sorted(path.parent.iterdir())
        errors, shown = io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        try:
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(shown):
                code = target.read(path)
        except DepthKVError as error:
            assert str(error).strip()
            return "refused"
        if isinstance(code, int) and code:
            said = errors.getvalue()
            assert code == 2, code
            assert said.startswith("depthkv: ") and said.count("\n") == 1 and said.strip() != "depthkv:", said
            assert sorted(path.parent.iterdir()) == before, "something was written"
            return "refused"
        return "refused" if code is None else "read"


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # hypothesis's own, of large files
@pytest.mark.parametrize("name", NAMES)
def test_damaged_files(name: str, formats: dict[str, Target]) -> None:
    target, seen = formats[name], Counter[str]()
    assert outcome(target, target.encode(json.dumps(target.valid).encode())) == "read"

    @seed(SEED)
    @settings(
        max_examples=CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(broken_json(target.valid), st.sampled_from(KINDS_OF_FILE))
    def check(data: bytes, kind: str) -> None:
        try:
            data = target.encode(data)
        except UnicodeError:
            return
        seen[outcome(target, data, kind)] += 1

    try:
        check()
    finally:
        if log := os.environ.get("DEPTHKV_FUZZ_LOG"):
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"format": name, **seen}) + "\n")
    assert seen["refused"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": True}, "expected architectures as a list of names in the config of .*, got True"),
        ({"architectures": [None]}, "expected architectures as a list of names"),
        ({"dtype": True}, "expected a dtype such as bfloat16 in the config of .*, got True"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers 1000000, which is no whole number from 1 to 10,000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0, which"),
    ],
)
def test_configs_of_wrong_types_are_refused(
    tmp_path: Path, formats: dict[str, Target], change: dict[str, object], message: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**formats["inspect: config"].valid, **change}), encoding="utf-8")
    with pytest.raises(DepthKVError, match=message):
        layer_kinds(load_config(path))

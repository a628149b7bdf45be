"""`depthkv serve`: bad input, vLLM's command line, and the end of a server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import httpx

import depthkv.serve.vllm as vllm
from depthkv.cli import main
from serving import PLAN
from tiny import tiny_checkpoint

SOURCE = Path(__file__).parent.parent / "src"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("serve") / "tiny", PLAN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "--port"),
        (["--engine", "tgi"], "expected an engine among auto, vllm, embedded, got 'tgi'"),
        (["--engine", "vllm"], "expected vLLM to be installed"),
        (["--kv-budget", "much"], "--kv-budget: expected a size such as"),
        (["--min-retention", ".8", "--max-retention", ".5"], "at most the largest, 0.5, got 0.8"),
        (["--max-context", "5000"], "at most the 2048 positions"),
        (["--host", "256.0.0.1"], "--host, --port: expected a free address"),
        (["--api-key", ""], "--api-key"),
        (["--plan", "none.json"], "none.json"),
        (["--router", "none.safetensors"], "none.safetensors"),
    ],
)
def test_bad_options(checkpoint: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = [] if "--port" in options else ["--port", "0"]
    assert main(["serve", str(checkpoint), *port, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_damaged_checkpoint_is_not_served(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (checkpoint / "model.safetensors").read_bytes()
    for name, damaged in (("cut", weights[:-100]), ("nan", weights[:-400] + b"\xff" * 400)):
        folder = tmp_path / name
        folder.mkdir()
        for file in checkpoint.iterdir():
            (folder / file.name).write_bytes(damaged if file.name == "model.safetensors" else file.read_bytes())
        assert main(["serve", str(folder), "--port", "0"]) == 2
        error = capsys.readouterr().err
        assert name in error and "expected" in error and error.count("\n") == 1


def test_vllm_is_run_where_it_can_load(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ran: list[tuple[list[str], dict[str, str]]] = []

    def run(line: list[str], env: dict[str, str], check: bool) -> Any:
        ran.append((line, env))
        return subprocess.CompletedProcess(line, 3)

    monkeypatch.setattr(vllm, "is_installed", lambda: True)
    plain = tiny_checkpoint(tmp_path / "plain")
    monkeypatch.setattr(subprocess, "run", run)
    options = ["--kv-budget", "1MiB", "--max-context", "512", "--api-key", "k", "--max-sequences", "8"]
    assert main(["serve", str(plain), *options]) == 3
    ((line, environment),) = ran
    expected = f"vllm serve {plain} --host 127.0.0.1 --port 8000 --served-model-name plain --max-num-seqs 8"
    assert " ".join(line) == f"{expected} --max-model-len 512 --kv-cache-memory-bytes 1048576"
    assert environment["VLLM_API_KEY"] == "k"
    assert " ".join(line) in capsys.readouterr().err.replace("\n", " ")
    for options, message in (
        (["--min-retention", ".5"], "got --min-retention, which the embedded server takes"),
        ([], "expected a folder of depthkv export for vLLM"),  # it has a plan, which vLLM would not see
    ):
        assert main(["serve", str(checkpoint), "--engine", "vllm", *options]) == 2
        assert message in capsys.readouterr().err
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text('{"model_type": "depthkv_llama", "kv_source_layers": [0, 0]}')
    assert vllm.can_load(str(exported)) and not vllm.can_load("builtin:smollm2-135m")
    # what vLLM cannot do is done here
    monkeypatch.setattr("depthkv.serve.run.serve", lambda app, listening, drain: None)
    assert main(["serve", str(checkpoint), "--port", "0"]) == 0
    assert "the embedded server runs" in capsys.readouterr().err and len(ran) == 1


@pytest.fixture
def process(checkpoint: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "depthkv", "serve", str(checkpoint), "--port", "0", "--max-sequences", "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    made = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert made.stderr is not None
    line = made.stderr.readline()
    yield made, line.split()[2].removesuffix("/v1,")
    made.kill()
    made.wait()
    made.stderr.close()


def test_sigterm_finishes_what_was_accepted(process: tuple[subprocess.Popen[str], str]) -> None:
    """One answer in the middle, others waiting: all come whole, and the process ends well."""
    server, address = process
    body = {"model": "tiny", "prompt": "w1 w2", "max_tokens": 300, "seed": 1, "stream": True}
    begun, texts = threading.Event(), []

    def ask() -> None:
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as response:
            lines = []
            for line in response.iter_lines():
                lines += [line] if line else []
                begun.set()
            texts.append(lines)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    server.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(60)
    assert server.wait(60) == 0
    assert len(texts) == 4
    for lines in texts:
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")

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
from depthkv.serve.run import allowed_hosts
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

    def run(file: str, line: list[str], env: dict[str, str]) -> Any:
        assert file == sys.executable
        ran.append((line, env))
        raise KeyboardInterrupt  # the real one does not come back

    monkeypatch.setattr(vllm, "is_installed", lambda: True)
    plain = tiny_checkpoint(tmp_path / "plain")
    monkeypatch.setattr(os, "execve", run)
    options = ["--kv-budget", "1MiB", "--max-context", "512", "--api-key", "k", "--max-sequences", "8"]
    assert main(["serve", str(plain), *options]) == 130
    ((line, environment),) = ran
    expected = f"{sys.executable} -m vllm.entrypoints.openai.api_server --model {plain} --host 127.0.0.1 --port 8000"
    expected += " --served-model-name plain --dtype auto --max-num-seqs 8"
    assert " ".join(line) == f"{expected} --max-model-len 512 --kv-cache-memory-bytes 1048576"
    assert environment["VLLM_API_KEY"] == "k"
    shown = capsys.readouterr().err.replace("\n", " ")
    assert " ".join(line) in shown
    for options, message in (
        (["--min-retention", ".5"], "got --min-retention, which only the embedded server takes"),
        (["--max-tokens", "7"], "got --max-tokens, which only the embedded server takes"),
        ([], "expected a folder of depthkv export for vLLM"),  # it has a plan, which vLLM would not see
    ):
        assert main(["serve", str(checkpoint), "--engine", "vllm", *options]) == 2
        assert message in capsys.readouterr().err
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text('{"model_type": "depthkv_llama", "kv_source_layers": [0, 0]}')
    assert vllm.can_load(str(exported)) and not vllm.can_load("builtin:smollm2-135m")
    (exported / "config.json").write_text('{"model_type": "depthkv_gemma3_text", "kv_source_layers": [0, 0]}')
    assert not vllm.can_load(str(exported))
    # what vLLM cannot do is done here
    monkeypatch.setattr("depthkv.serve.run.serve", lambda app, listening, drain: None)
    assert main(["serve", str(checkpoint), "--port", "0"]) == 0
    assert "the embedded server runs" in capsys.readouterr().err and len(ran) == 1


def test_signals_reach_vllm(tmp_path: Path) -> None:
    """It takes the place of the process, so that nothing is left over when that is ended."""
    plain = tiny_checkpoint(tmp_path / "plain")
    module = tmp_path / "site" / "vllm" / "entrypoints" / "openai" / "api_server.py"
    module.parent.mkdir(parents=True)
    for package in (module.parent, module.parent.parent, module.parent.parent.parent):
        (package / "__init__.py").touch()
    module.write_text("import os, time\nprint('vllm runs as', os.getpid(), flush=True)\ntime.sleep(60)\n")
    paths = [str(SOURCE), str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "depthkv", "serve", str(plain)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as made:
        assert made.stdout is not None
        assert made.stdout.readline() == f"vllm runs as {made.pid}\n"
        made.terminate()
        assert made.wait(30) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("host", "address", "is_open"),
    [("127.0.0.1", "127.0.0.1", False), ("127.1", "127.0.0.1", False), ("localhost", "127.0.0.1", False),
     ("0:0:0:0:0:0:0:1", "::1", False), ("0.0.0.0", "0.0.0.0", True), ("::", "::", True)],
)  # fmt: skip
def test_foreign_names_are_refused_on_loopback(host: str, address: str, is_open: bool) -> None:
    hosts = allowed_hosts(host, address)
    assert hosts is None if is_open else hosts is not None and host in hosts


def test_long_contexts_of_longrope_are_refused(tmp_path: Path, capsys: Any) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["serve", str(folder), "--engine", "embedded", "--port", "0", "--max-context", "100"]) == 2
    assert "--max-context: expected at most 64 tokens" in capsys.readouterr().err


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

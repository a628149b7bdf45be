"""A `depthkv serve` process on one core, and what its metrics say. For benchmarks/serve.py and serve_faults.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from depthkv.data import resolve_data
from depthkv.machine import environment

MODEL = "builtin:smollm2-135m-depthkv"
NAME = "smollm2-135m-depthkv"
NUM_LAYERS = 30
FULL_BYTES = 2 * 3 * 64 * 4 * NUM_LAYERS
"""Of one token in float32: keys and values of 3 heads of 64 in each layer."""


class Server:
    """A server of its own process, pinned to one core; the clients have the others."""

    def __init__(self, *options: str, model: str = MODEL, core: int = 0) -> None:
        command = [sys.executable, "-m", "depthkv", "serve", model, "--engine", "embedded", "--port", "0", *options]
        self.log = tempfile.TemporaryFile("w+")
        # the thread that torch computes on is this one core's
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=self.log, env=environment)
        os.sched_setaffinity(self.process.pid, {core})
        self.url = ""
        while not self.url and self.process.poll() is None:
            time.sleep(0.2)
            self.url = next((word for word in self.stderr().split() if word.startswith("http://")), "")
        self.url = self.url.removesuffix("/v1,")
        while self.process.poll() is None:
            try:
                self.metrics()
                break
            except OSError:
                time.sleep(0.1)

    def stderr(self) -> str:
        """Everything so far."""
        self.log.seek(0)
        return self.log.read()

    def metrics(self) -> dict[str, float]:
        """Values by name, without `depthkv_`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name.removeprefix("depthkv_"): float(value) for name, value in pairs}

    def resident_bytes(self) -> int:
        """Of the process."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmRSS"))

    def cpu_seconds(self) -> float:
        """That the process has used; unlike the time on the clock, others on the machine do not change it much."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def settle(self) -> None:
        """Wait until nothing runs."""
        while (now := self.metrics())["requests_running"] or now["requests_waiting"]:
            time.sleep(0.05)

    def terminate(self, wait_s: float = 300) -> int:
        """SIGTERM; returns the exit code."""
        self.process.terminate()
        return self.process.wait(wait_s)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.log.close()


def token_prompts(tokenizer: Any, lengths: Sequence[int], data: str = "builtin:anarchism") -> list[list[int]]:
    """Prompts of these lengths, from places of a text that do not overlap."""
    documents = resolve_data(data)
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document.text)["input_ids"]
        if len(ids) >= sum(lengths):
            break
    found, start = [], 0
    for length in lengths:
        found.append(ids[start : start + length])
        start += length
    return found


def write_line(path: Path | None, figures: dict[str, Any]) -> None:
    """Append figures, and where they are from, to a file of lines, if there is one."""
    if path is not None:
        origin = {"environment": environment(torch.device("cpu")), "command": "python " + " ".join(sys.argv)}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures | origin) + "\n")


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

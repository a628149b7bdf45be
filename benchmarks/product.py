"""What a user waits for and downloads: imports, the wheel, both commands of the README in a fresh clone, coverage.

    python benchmarks/product.py import wheel --out docs/raw/product.jsonl
    python benchmarks/product.py clean coverage --out docs/raw/product.jsonl  # half an hour; needs pytest-cov

Times of imports are of the processor, which a busy machine changes less; `clean` takes the clock's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from depthkv.machine import environment
from serving import write_line

ROOT = Path(__file__).resolve().parent.parent
STARTS = {
    "torch and transformers": ["-c", "import torch, transformers"],
    "these and depthkv": ["-c", "import torch, transformers, depthkv"],
    "depthkv --help": ["-m", "depthkv", "--help"],
}


def _cpu_seconds(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imports() -> dict[str, Any]:
    """The least of 7 times, in turns."""
    times: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(7):
        for name, arguments in STARTS.items():
            times[name].append(_cpu_seconds(arguments))
    return {name: min(seconds) for name, seconds in times.items()}


def wheel() -> dict[str, Any]:
    """Bytes of the wheel and of the adapter in it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(ROOT)]
        subprocess.run(command, check=True)
        (made,) = Path(folder).glob("*.whl")
        adapters = (ROOT / "src" / "depthkv" / "adapters").glob("*/*.safetensors")
        return {"bytes": made.stat().st_size, "adapter_bytes": sum(file.stat().st_size for file in adapters)}


def clean() -> dict[str, Any]:
    """Seconds of the README's two commands, one after the other: the first makes the environment."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
        for name in ("test", "demo"):
            started = time.perf_counter()
            subprocess.run(["make", name], cwd=folder, check=True, stdout=sys.stderr)
            found[name] = time.perf_counter() - started
    return found


def coverage() -> dict[str, Any]:
    """Of the lines of the package, in the tests that `make test` runs."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        options = ["--cov=depthkv", f"--cov-report=json:{report}", "-q", "-n", "2", "tests"]
        subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT, check=True, stdout=sys.stderr)
        found = json.loads(report.read_text(encoding="utf-8"))
    least = sorted((f["summary"]["percent_covered"], name) for name, f in found["files"].items())[:5]
    total = found["totals"]
    return {
        "percent": total["percent_covered"],
        "lines": total["num_statements"],
        "missing": total["missing_lines"],
        "least": [[name.removeprefix("src/depthkv/"), percent] for percent, name in least],
    }


RUNS = {"import": imports, "wheel": wheel, "clean": clean, "coverage": coverage}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", choices=RUNS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.runs:
        row = {"run": name, "date": date.today().isoformat(), **RUNS[name]()}
        row["environment"] = environment(torch.device("cpu"))
        print(json.dumps(row), flush=True)
        rows.append(row)
    for row in rows:  # last, since the tests compare the pages with the rows
        write_line(args.out, row)


if __name__ == "__main__":
    main()

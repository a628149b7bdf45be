"""How far the library can be trusted: damaged files, random combinations against the oracle, memory over many calls.

    make fuzz                                                   # 10,000 files, 2,000 combinations, 200 calls
    PYTHONPATH=tests python benchmarks/reliability.py --seed 7  # others
    PYTHONPATH=tests python benchmarks/reliability.py --runs combinations --seed 1234 --combinations 1  # one case

Run from the repository's root: it uses the tests' models. Exits with 1 where anything failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from combinations import MOST, combination, difference
from depthkv import SharingPlan, share
from depthkv.machine import environment
from families import NUM_LAYERS, tiny_model
from test_fuzz import NAMES

WARM_UP, EVERY = 50, 5
"""Calls before the first look at the memory, and between two: looking takes longer than a call."""


def files(cases: int, seed: int) -> dict[str, Any]:
    """Damaged files, as many of each format; hypothesis shows what fails."""
    each = -(-cases // len(NAMES))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        settings = {"DEPTHKV_FUZZ_CASES": str(each), "DEPTHKV_FUZZ_SEED": str(seed), "DEPTHKV_FUZZ_LOG": str(log)}
        command = [sys.executable, "-m", "pytest", "-q", "--timeout", "3600", "tests/test_fuzz.py", "-k", "damaged"]
        code = subprocess.run(command, env={**os.environ, **settings}, check=False).returncode
        found = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    done = sum(row.get("read", 0) + row.get("refused", 0) for row in found)
    refused = sum(row.get("refused", 0) for row in found)
    return {"cases": done, "refused": refused, "formats": found, "failures": int(code != 0)}


def combinations(cases: int, seed: int) -> dict[str, Any]:
    """Seeds from `seed` on."""
    failed, worst = [], 0.0
    for case in range(seed, seed + cases):
        try:
            found = difference(case)
            reason = f"{found:.2g} apart"
        except Exception as error:  # whatever it is, the case failed
            found, reason = float("inf"), repr(error)
        if not found <= MOST:
            print(f"seed {case}: {reason}, {combination(case)}", flush=True)
            failed.append(case)
        else:
            worst = max(worst, found)
    return {"cases": cases, "failures": len(failed), "failed": failed, "largest_difference": worst}


def leaks(calls: int, seed: int) -> dict[str, Any]:
    """Memory and objects after every call, once for `share` and `remove`, once for `generate`."""
    model = tiny_model("llama", seed=seed, hidden_size=128, intermediate_size=256)
    plan, ids = SharingPlan.every(2, NUM_LAYERS), torch.arange(3, 67)[None]

    def shared() -> None:
        handle = share(model, plan)
        with torch.no_grad():
            model(ids)
        handle.remove()

    def generated() -> None:
        model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )

    rows = {"share and remove": _slopes(shared, calls)}
    with share(model, plan):
        rows["generate"] = _slopes(generated, calls)
    grown = [name for name, row in rows.items() if row["kib"] > 1 or row["objects"] > 0.1 or row["tensors"] > 0.01]
    return {"cases": calls, "failures": len(grown), "slopes": rows}


def _slopes(call: Callable[[], None], calls: int) -> dict[str, float]:
    """Per call: KiB of resident memory, objects that Python's collector knows, and tensors among them."""
    seen = []
    for number in range(WARM_UP + calls):
        call()
        if number >= WARM_UP and number % EVERY == 0:
            gc.collect()
            objects = gc.get_objects()
            # some proxies answer isinstance by importing what they stand for
            tensors = sum(issubclass(type(thing), torch.Tensor) for thing in objects)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((pages * os.sysconf("SC_PAGE_SIZE") / 1024, len(objects), tensors))
            del objects
    fitted = np.polyfit(EVERY * np.arange(len(seen)), np.array(seen), 1)[0]
    return dict(zip(("kib", "objects", "tensors"), map(float, fitted), strict=True))


RUNS = {"files": files, "combinations": combinations, "leaks": leaks}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--combinations", type=int, default=2_000)
    parser.add_argument("--leaks", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file to append lines of figures to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failures = 0
    for name in options.runs:
        start = time.perf_counter()
        print(f"{name}: {getattr(options, name)} cases, seed {options.seed}", flush=True)
        found = {"run": name, "seed": options.seed, **RUNS[name](getattr(options, name), options.seed)}
        found |= {"seconds": time.perf_counter() - start, "environment": environment(torch.device("cpu"))}
        failures += found["failures"]
        line = json.dumps(found)
        print(line, flush=True)
        if options.out is not None:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())

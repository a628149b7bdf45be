"""Tables of benchmarks/reliability.py for docs/results.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WORDS = {"files": "damaged files", "combinations": "random combinations against the oracle"}


def reliability(runs: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Cases and failures of all runs of a kind, slopes of the last one."""
    rows = []
    for kind, label in WORDS.items():
        found = [run for run in runs if run["run"] == kind]
        if not found:
            continue
        seeds = [run["seed"] for run in found]
        shown = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
        if kind == "files":
            came = f"{sum(run['refused'] for run in found):,} refused, the others read"
        else:
            most = max(run["largest_difference"] for run in found)
            came = f"largest difference of a logit in those that passed {most:.1e}"
        cases, failures = (f"{sum(run[key] for run in found):,}" for key in ("cases", "failures"))
        rows.append([label, cases, shown, failures, came])
    leaks = [run for run in runs if run["run"] == "leaks"][-1:]
    for name, slope, leaks_run in ((n, slope, run) for run in leaks for n, slope in run["slopes"].items()):
        came = f"{slope['kib']:+.2f} KiB, {slope['objects']:+.3f} objects, {slope['tensors']:+.3f} tensors per call"
        rows.append([f"calls of {name}", f"{leaks_run['cases']:,}", f"{leaks_run['seed']}", "", came])
    return ["what", "cases", "seed", "failures", "what came of it"], rows


TABLES: dict[str, Callable[[list[dict[str, Any]]], tuple[list[str], list[list[str]]]]] = {"reliability": reliability}

"""Tables of benchmarks/product.py for docs/results.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def product(runs: list[Row]) -> tuple[list[str], list[list[str]]]:
    """The last run of each kind."""
    found = {run["run"]: run for run in runs}
    rows = []
    if run := found.get("import"):
        rows += [[f"start of Python, {name}" if "--" not in name else name, f"{run[name]:.2f} s of the processor"]
                 for name in ("torch and transformers", "these and depthkv", "depthkv --help")]  # fmt: skip
    if run := found.get("wheel"):
        size, adapter = run["bytes"] / 1e6, run["adapter_bytes"] / 1e6
        rows.append(["wheel", f"{size:.1f} MB, with an adapter of {adapter:.1f} MB before it is packed"])
    if run := found.get("clean"):
        rows += [
            ["`make test` in a fresh clone, with the environment that it makes", f"{run['test'] / 60:.1f} minutes"],
            ["`make demo` after it", f"{run['demo'] / 60:.1f} minutes"],
        ]
    if run := found.get("coverage"):
        least = ", ".join(f"{name} {percent:.0f} %" for name, percent in run["least"])
        covered = f"{run['percent']:.1f} % of {run['lines']:,} lines"
        rows.append(["lines that `make test` runs", f"{covered}; least: {least}"])
    return ["what", "figure"], rows


def journeys(runs: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Each step of the last run of each journey."""
    names = {"memory": "too little memory", "trainer": "a Trainer", "vllm": "vLLM", "research": "research"}
    found = {run["run"]: run for run in runs}
    rows = []
    for key, name in names.items():
        steps = found[f"journey {key}"]["steps"] if f"journey {key}" in found else []
        for step in steps:
            facts = f", {step['lines']} lines" if "lines" in step else ""
            facts += f": {step['blocks']}" if "blocks" in step else ""
            rows.append([name, step["step"].replace("|", "\\|") + facts, f"{step['seconds']:.1f} s"])
        if steps:
            rows.append([name, "in all", f"{sum(step['seconds'] for step in steps) / 60:.1f} min"])
    return ["journey", "step", "time"], rows


TABLES: dict[str, Callable[[list[Row]], tuple[list[str], list[list[str]]]]] = {"product": product, "journeys": journeys}

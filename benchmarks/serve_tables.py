"""Tables of docs/results.md about the embedded server, from docs/raw/serve.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rows = tuple[list[str], list[list[str]]]


def _last(runs: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return [run for run in runs if run["run"] == kind][-1]


def load(runs: list[dict[str, Any]]) -> Rows:
    """All requests under one budget, with and without depth to lower."""
    run = _last(runs, "load")
    rows = []
    for label, found in run["rows"].items():
        cells = [label, f"{found['completed']} of {found['requests']}", f"{found['most_at_once']:.0f}"]
        cells.append(f"{found['peak_bytes']:,.0f} of {run['budget']:,}")
        cells.append(f"{found['mean_layers']:.1f} ({found['fewest_layers']} to {run['num_layers']})")
        cells += [f"{found['ttft_p50']:.1f} s", f"{found['ttft_p99']:.1f} s", f"{found['tokens_per_s']:.1f}"]
        cpu = found.get("cpu_seconds")
        cells.append("" if cpu is None else f"{found['tokens'] / cpu:.1f}")
        rows.append(cells)
    headings = [
        "server",
        "completed",
        "most at once",
        "most bytes, of the budget",
        "layers of 30, mean (fewest to most)",
    ]
    return [*headings, "TTFT, p50", "p99", "tokens/s", "tokens per CPU second"], rows


def faults(runs: list[dict[str, Any]]) -> Rows:
    """What was done, and what the server did."""
    found = _last(runs, "faults")["faults"]
    rows = []
    words = {"disconnects": "clients that leave", "malformed": "malformed JSON", "generated": "schemathesis"}
    words |= {"oversize": "oversize prompts", "disconnects again": "clients that leave, once more"}
    for name, label in words.items():
        fault = found[name]
        if name == "oversize":
            did = ", ".join(
                f"{what}: {status}" for what, status in fault.items() if isinstance(status, int) and " " in what
            )
        elif "left" in fault:
            did = (
                f"{fault['left']} left, {fault['cancelled']:.0f} of them before the end of their answer, all cancelled"
            )
        else:
            counts = ", ".join(f"{number} with {status}" for status, number in fault["statuses"].items())
            did = f"{fault['sent']} requests: {counts}"
            did += f"; {len(fault['broken'])} unlike the document" if "broken" in fault else ""
        same = "the same" if fault["answers_as_before"] else "ANOTHER"
        rows.append(
            [label, did, f"{fault['cache_bytes_after']:.0f} B", f"{fault['resident_growth'] / 2**20:+.1f} MiB", same]
        )
    term = found["sigterm"]
    did = (
        f"{term['in_flight']} requests running or waiting: {term['completed']} completed, exit code {term['exit_code']}"
    )
    rows.append(["SIGTERM under load", did, "", "", f"{term['right']} the same"])
    for name in ("cut", "broken header", "not a number"):
        case = found["damaged"][name]
        served = "served" if case["served"] else f"not served: one line, exit code {case['exit_code']}"
        rows.append([f"weights: {name}", served, "", "", ""])
    return ["fault", "what came of it", "caches after", "memory of the process", "answers after"], rows


TABLES: dict[str, Callable[[list[dict[str, Any]]], Rows]] = {"serve-load": load, "serve-faults": faults}

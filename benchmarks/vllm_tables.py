"""Tables of benchmarks/vllm_blocks.py for docs/results.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Lines = Sequence[dict[str, Any]]
Table = tuple[list[str], list[list[str]]]
"""Headings and rows."""


def blocks(lines: Lines) -> Table:
    """Blocks that the same bytes hold."""
    runs = [run for run in lines if run["part"] == "blocks"]
    full = next(run["blocks"] for run in runs if run["leaders"] == run["num_layers"])
    rows = []
    for run in sorted(runs, key=lambda run: -run["leaders"]):
        cells = [run["plan"], f"{run['leaders']} of {run['num_layers']}", f"{run['blocks']:,}"]
        cells.append(f"{run['blocks'] * run['block_size']:,}")
        rows.append([*cells, f"{run['blocks'] / full:.2f}x"])
    return ["plan", "layers kept", "KV blocks", "tokens", "of the full cache's"], rows


def tokens(lines: Lines) -> Table:
    """Whether vLLM writes what depthkv writes."""
    runs = [run for run in lines if run["part"] == "tokens"]
    rows = []
    for run in sorted(runs, key=lambda run: (run["dtype"], -run["leaders"])):
        gaps = [entry["gap"] for entry in run["parted"]]
        equal = f"{run['prompts'] - len(gaps)} of {run['prompts']}"
        within = sum(gap < run["tolerance"] for gap in gaps)
        cells = [run["dtype"], run["plan"], f"{run['leaders']} of {run['num_layers']}", equal]
        rows.append([*cells, f"{within} of {len(gaps)}", f"{max(gaps):.2g}"] if gaps else [*cells, "", ""])
    headings = ["weights", "plan", "layers kept", "equal texts", "of the others: gap below 1e-2 (bf16) or 1e-4 (fp32)"]
    return [*headings, "largest gap"], rows


def throughput(lines: Lines) -> Table:
    """Tokens per second where memory is the limit."""
    runs = [run for run in lines if run["part"] == "throughput"]
    first = runs[0]
    rows = []
    for run in runs:
        seconds = ", ".join(f"{value:.1f} s" for value in run["seconds"])
        cells = [run["plan"], f"{run['leaders']} of {run['num_layers']}", str(run["blocks"])]
        cells += [str(run["sequences_at_once"]), seconds, f"{run['tokens_per_s']:.1f}"]
        rows.append([*cells, f"{run['tokens_per_s'] / first['tokens_per_s']:.2f}x"])
    headings = ["plan", "layers kept", "KV blocks", "sequences at once", "all requests took", "tokens/s written"]
    return [*headings, "of the full cache's"], rows


TABLES = {"vllm-blocks": blocks, "vllm-tokens": tokens, "vllm-throughput": throughput}

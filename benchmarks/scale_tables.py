"""Tables of benchmarks/scale.py for docs/results.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import gpu_tables

UNSEEN = "brown"
"""The text that no arm trains on."""


def arms(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["run"] == "scale"]


def tokens(row: dict[str, Any]) -> int:
    return row["tokens"]


def seen(row: dict[str, Any], plan: str) -> float:
    """Held-out loss, the mean over the texts that all train on."""
    return statistics.fmean(found[plan] for text, found in row["test"].items() if text != UNSEEN)


def longest(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each method's arm of as many tokens as the full cache's longest."""
    most = max(tokens(row) for row in arms(rows) if row["method"] == "base")
    return {row["method"]: row for row in arms(rows) if tokens(row) == most}


def losses(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Held-out loss of each arm, most tokens first, and that of the text that none trains on."""
    bases = [row for row in arms(rows) if row["method"] == "base"]
    plans = list(next(iter(bases[0]["test"].values())))
    lines = []
    for row in sorted(arms(rows), key=tokens, reverse=True):
        base = min(bases, key=lambda base: abs(base["tokens"] - row["tokens"]))
        cells = [row["method"], f"{row['tokens'] / 1e6:.1f}M", f"{row['learning_rate']:g}"]
        for plan in plans:
            over = seen(row, plan) / seen(base, plans[0]) - 1
            cells.append(f"{seen(row, plan):.3f} ({over:+.0%}); {row['test'][UNSEEN][plan]:.3f}")
        lines.append(cells)
    return ["method", "tokens", "rate", *("full" if plan == "every 1" else plan for plan in plans)], lines


TABLES = {"scale": losses, "scale-train": gpu_tables.train}

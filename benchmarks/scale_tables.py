"""Tables of benchmarks/scale.py for docs/results.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import gpu_tables

UNSEEN = "brown"
"""The text that no arm trains on."""


def losses(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Held-out loss of each arm, the mean over the texts that all train on, and that of the one that none does."""
    arms = [row for row in rows if row["run"] == "scale"]
    bases = [row for row in arms if row["method"] == "base"]
    plans = list(next(iter(bases[0]["test"].values())))
    lines = []
    for row in arms:
        base = min(bases, key=lambda base: abs(base["tokens"] - row["tokens"]))
        cells = []
        for plan in plans:
            loss, best = (_seen(arm, name) for arm, name in ((row, plan), (base, plans[0])))
            cells.append(f"{loss:.3f} ({loss / best - 1:+.0%}); {row['test'][UNSEEN][plan]:.3f}")
        lines.append([row["method"], f"{row['tokens'] / 1e6:.1f}M", *cells])
    return ["method", "tokens", *("full" if plan == "every 1" else plan for plan in plans)], lines


def _seen(row: dict[str, Any], plan: str) -> float:
    return statistics.fmean(found[plan] for text, found in row["test"].items() if text != UNSEEN)


TABLES = {"scale": losses, "scale-train": gpu_tables.train}

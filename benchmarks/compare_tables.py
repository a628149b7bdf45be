"""Tables of docs/results.md from docs/raw/compare.jsonl: every suite beside the peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from training_tables import Read, Table

GROUPS = {
    "untrained": "untrained, ",
    "peers": "",
    "default": "default recipe, ",
    "essay": "essay adapter, ",
    "eight texts": "adapter of eight texts, ",
}
"""Files of benchmarks/compare.py, in the order of the table, and what their labels begin with."""


def interval(score: dict[str, Any] | None, digits: int = 1) -> str:
    if score is None:
        return ""
    shown = f"{score['value']:.{digits}f}"
    if score.get("low") is not None and score["low"] != score["high"]:
        shown += f" ({score['low']:.{digits}f} to {score['high']:.{digits}f})"
    return shown


def arms(read: Read) -> list[tuple[str, dict[str, Any]]]:
    """Label and row of every arm of the comparison, the common full cache once."""
    found, full_seen = [], False
    order = list(GROUPS)
    for figures in sorted(read("compare.jsonl"), key=lambda f: (order.index(f["group"]), f["command"])):
        for row in figures["rows"]:
            is_full, group = row["label"] == "full cache", figures["group"]
            if is_full and group != "default":  # the same model, or one whose adapter is off
                if not full_seen:
                    found.append(("full cache", row))
                full_seen = True
                continue
            found.append((GROUPS[group] + row["label"], row))
    return found


def comparison(read: Read) -> Table:
    rows = []
    for label, row in arms(read):
        cells = [label, f"{row['cache_fraction']:.3f}", interval(row["loss_score"], 2)]
        cells += [interval(row["agreement"]["top1"]), interval(row["qa"]["f1"]), interval(row["retrieval"]["score"])]
        rows.append(cells)
    return ["cache", "bytes", "loss", "top-1, %", "F1, %", "retrieval, %"], rows


def comparison_texts(read: Read) -> Table:
    names = [text["data"] for text in arms(read)[0][1]["texts"]]
    documents = [str(text["documents"]) for text in arms(read)[0][1]["texts"]]
    headings = [f"{name.removeprefix('builtin:')} ({count})" for name, count in zip(names, documents, strict=True)]
    rows = [[label, *(interval(text["loss"], 2) for text in row["texts"])] for label, row in arms(read)]
    return ["cache", *headings], rows


def positions(read: Read) -> Table:
    """How much more than the full cache each arm loses, by position, over the kinds of text."""
    wanted = ("default recipe", "essay adapter", "StreamingLLM", "quantised")
    rows, headings = [], []
    for label, row in arms(read):
        if not label.startswith(wanted) or label.endswith("full cache"):
            continue
        for text in row["texts"]:
            if not label.startswith("essay adapter") or text["data"] == "builtin:anarchism":
                headings = [f"{p['first']}-{p['last']}" for p in text["positions"]]
                cells = [f"{p['loss']['difference']:+.2f}" for p in text["positions"]]
                rows.append([label, text["data"].removeprefix("builtin:"), *cells])
    return ["cache", "text", *(f"tokens {heading}" for heading in headings)], rows


TABLES: dict[str, Callable[[Read], Table]] = {
    "comparison": comparison,
    "comparison-texts": comparison_texts,
    "positions": positions,
}

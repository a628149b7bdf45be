"""What of the tables and figures is another than before: docs/raw/moved.jsonl, and its table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import inline
import tables

FILE = "moved.jsonl"
SHARE = 0.1
"""A figure that moved by more is named."""

ORIGIN = ("origin-", "command-")
"""Figures that say where others are from."""

Shown = dict[str, str]
"""Tables and figures by name, as a page shows them."""


def shown(raw: Path, *, earlier: bool = False) -> Shown:
    """All that can be made of a folder of raw rows; `earlier` ones may lack what a new table or figure wants."""
    before, tables.RAW = tables.RAW, raw
    try:
        makers: dict[str, Callable[[], str]] = {name: make for name, make in tables.TABLES.items() if name != "moved"}
        for name, make in inline.FIGURES.items():
            if not name.startswith(ORIGIN):
                makers[f"figure {name}"] = partial(make, tables.read)
        made = {}
        for name, maker in makers.items():
            try:
                made[name] = maker()
            except (LookupError, ValueError, OSError):
                if not earlier:
                    raise
        return made
    finally:
        tables.RAW = before


def cells(text: str) -> list[list[str]]:
    """Headings and rows of a table; a figure is one cell below an empty heading."""
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [lines[0], *lines[2:]] if lines else [[""], [text]]


def compare(before: Shown, after: Shown) -> Iterator[dict[str, Any]]:
    """Cells whose number moved by more than `SHARE`, and by more than rounding can."""
    for name, text in after.items():
        if name not in before:
            continue
        old, new = cells(before[name]), cells(text)
        if old[0] != new[0] or [len(line) for line in old] != [len(line) for line in new]:
            yield {"table": name, "row": "", "figure": "", "before": "other rows or columns", "after": ""}
            continue
        for first, second in zip(old[1:], new[1:], strict=True):
            for heading, a, b in zip(new[0], first, second, strict=True):
                if moved(a, b):
                    row = ", ".join(label for label in second[:2] if label != b)
                    yield {"table": name, "row": row, "figure": heading, "before": a, "after": b}


NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def moved(before: str, after: str) -> bool:
    """Whether a number outside of brackets did."""
    old, new = (NUMBER.findall(re.sub(r"\(.*?\)", "", cell)) for cell in (before, after))
    if len(old) != len(new):
        return bool(before != after)
    for a, b in zip(old, new, strict=True):
        first, second = (float(text.replace(",", "")) for text in (a, b))
        step = 10 ** -max(len(text.partition(".")[2]) for text in (a, b))
        if abs(second - first) > max(SHARE * abs(first), 1.5 * step):
            return True
    return False


def write(before: Path, raw: Path) -> int:
    """Compares two folders of raw rows and writes `moved.jsonl` to the second; what explains a row is kept."""
    path = raw / FILE
    known = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            known[row["table"], row["row"], row["figure"]] = row.get("why", "")
    rows = list(compare(shown(before, earlier=True), shown(raw)))
    lines = [
        json.dumps(row | {"why": known.get((row["table"], row["row"], row["figure"]), "")}, ensure_ascii=False)
        for row in rows
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(rows)

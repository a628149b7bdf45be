"""What of the tables and figures is another than before: docs/raw/moved.jsonl, and its table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inline
import tables

FILE = "moved.jsonl"
SHARE = 0.1
"""A figure that moved by more is named."""

Shown = dict[str, str]
"""Tables and figures by name, as a page shows them."""


def shown(raw: Path) -> Shown:
    """All that can be made of a folder of raw rows."""
    before, tables.RAW = tables.RAW, raw
    try:
        made = {name: make() for name, make in tables.TABLES.items() if name != "moved"}
        return made | {f"figure {name}": make(tables.read) for name, make in inline.FIGURES.items()}
    finally:
        tables.RAW = before


def compare(before: Shown, after: Shown) -> Iterator[dict[str, Any]]:
    """Cells whose number moved by more than `SHARE`, and by more than rounding can."""
    for name, text in after.items():
        old, new = ([line.strip("| ").split(" | ") for line in t.splitlines()] for t in (before.get(name, ""), text))
        if old == new or not old[0]:
            continue
        if [len(line) for line in old] != [len(line) for line in new] or old[0] != new[0]:
            yield {"table": name, "row": "", "figure": "", "before": "other rows or columns", "after": ""}
            continue
        headings = new[0] if len(new) > 1 else [""]
        for first, second in zip(old[-1:] if len(new) == 1 else old[2:], new[-1:] if len(new) == 1 else new[2:]):  # noqa: B905
            for heading, a, b in zip(headings, first, second, strict=True):
                if moved(a, b):
                    row = ", ".join(second[:2]) if len(new) > 1 else ""
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
    rows = list(compare(shown(before), shown(raw)))
    lines = [
        json.dumps(row | {"why": known.get((row["table"], row["row"], row["figure"]), "")}, ensure_ascii=False)
        for row in rows
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(rows)

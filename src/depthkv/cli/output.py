"""What commands show: tables on stdout, progress and messages on stderr, JSON in a file."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from depthkv.errors import DepthKVError
from depthkv.evaluate import CurveRow
from depthkv.files import write_text
from depthkv.memory import format_bytes

_COMMAND: ContextVar[tuple[str, ...]] = ContextVar("command", default=())


def remember_command(arguments: Sequence[str]) -> None:
    """Keep what the program was called with, for `command_line`."""
    _COMMAND.set(tuple(arguments))


def command_line() -> str:
    """The command that is running, as one would type it."""
    return shlex.join(["depthkv", *_COMMAND.get()])


def console() -> Console:
    """Standard output; as wide as the terminal, and never cut where it is a file."""
    out = Console(highlight=False, soft_wrap=False)
    return out if out.is_terminal else Console(highlight=False, width=160)


def show(line: str) -> None:
    """A message about something slow, on stderr."""
    Console(stderr=True, highlight=False).print(line, markup=False, soft_wrap=True)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on stderr, in a terminal only."""
    with Console(stderr=True).status(what):
        yield


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function that advances a bar on stderr; nothing is shown where stderr is no terminal."""
    err = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """First column to the left, the others to the right."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="left" if i == 0 else "right")
    for row in rows:
        made.add_row(*row)
    return made


def curve_table(rows: Sequence[CurveRow], num_layers: int, before: Sequence[CurveRow] | None = None) -> Table:
    """The retention curve, with a column for the losses before training where they are known."""
    headings = ["layers that keep a cache", "cache per token", "loss", "perplexity"]
    if before is not None:
        headings.insert(2, "loss before")
    cells = []
    for i, row in enumerate(rows):
        cell = [
            f"{len(row.leaders)} of {num_layers} ({row.retention:.0%})",
            format_bytes(row.kv_bytes_per_token),
            f"{row.loss:.3f}",
            number(row.perplexity),
        ]
        if before is not None:
            cell.insert(2, f"{before[i].loss:.3f}")
        cells.append(cell)
    return table(headings, cells)


def number(value: float) -> str:
    """Three digits, or whole thousands."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write `--json FILE` beside its place, then rename. Numbers that JSON does not have become null.

    Raises:
        DepthKVError: the file cannot be written.
    """
    if path is None:
        return
    write_file(path, json.dumps(_plain(figures), indent=2, allow_nan=False) + "\n", "--json")


def write_file(path: Path, text: str, what: str) -> None:
    """Write a file beside its place, then rename; /dev/stdout or a pipe is written to.

    Raises:
        DepthKVError: the file cannot be written; `what` names it.
    """
    if path.exists() and (not path.is_file() or path.parts[:2] == (os.sep, "dev")):
        try:
            path.write_text(text, encoding="utf-8")  # must not be replaced by a file
        except OSError as error:
            raise DepthKVError(f"expected to write {what} to {path}, got {error.strerror or error}") from error
    else:
        write_text(path, text, what)


def json_line(figures: dict[str, Any]) -> str:
    """All on one line."""
    return json.dumps(_plain(figures), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar, or in a log file a line at the beginning."""
    if not sys.stderr.isatty():
        show(what)
    with progress_bar(what, total) as advance:
        yield advance

"""The command report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from depthkv.cli import inputs
from depthkv.cli.inputs import json_path, option
from depthkv.cli.output import console, write_file, write_json
from depthkv.errors import DepthKVError


def report_command(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="What --json of evaluate, bench, plan and generate wrote.")
    ],
    out: Annotated[Path, option("--out", json_path, "FILE", "The page, one HTML file.")] = Path("report.html"),
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="NAME", help="Of a file, as often as there are files.  [default: the model]"),
    ] = None,
    json_file: inputs.Json = None,
) -> None:
    """One HTML page of what was measured: curves, tables, heat maps, texts, plans, speed, how to reproduce it.

    A file of plan says how a plan was chosen, and what it costs beside other rules of choice; one of generate which
    layers were kept for which prompt, and the memory over time. Several files of one kind stand beside each other, such
    as evaluations of a model before and after it was adapted. Nothing is measured here. The page needs no network and
    no scripts.
    """
    from depthkv.report.html import build_page
    from depthkv.report.reading import read_figures

    if label and len(label) != len(files):
        raise DepthKVError(f"--label: expected one for each of {len(files)} files, got {len(label)}")
    if json_file is not None and os.path.realpath(json_file) == os.path.realpath(out):
        raise DepthKVError(f"--json: expected another file than the page, got {json_file}")
    for path in files:
        if os.path.realpath(path) in (os.path.realpath(out), json_file and os.path.realpath(json_file)):
            raise DepthKVError(f"--out: expected another file than those that are read, got {path}")
    figures = [read_figures(path) for path in files]
    page = build_page(figures, label or None)
    write_file(out, page.html, "the report")
    write_json(json_file, {"out": str(out), "files": [str(path) for path in files], "verdict": page.verdict})
    shown = console()
    shown.print(page.verdict, markup=False, soft_wrap=True)
    shown.print(f"{out}: {len(page.html.encode()) / 1024:.0f} KiB", markup=False, soft_wrap=True)

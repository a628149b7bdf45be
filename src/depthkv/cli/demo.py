"""The command demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from depthkv.cli import inputs
from depthkv.cli.inputs import count, option, positive
from depthkv.cli.output import console, show, write_json


def demo_command(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder, or one of an earlier demo.")] = Path(
        "demo-out"
    ),
    train: Annotated[
        bool,
        typer.Option("--train", help="Train the model here, instead of taking the adapter that comes with depthkv."),
    ] = False,
    minutes: Annotated[
        float | None,
        option("--minutes", positive, "M", "Of training, which this implies.  [default: 11 on a CPU, 0.75 on a GPU]"),
    ] = None,
    model: Annotated[str, typer.Option("--model", metavar="MODEL")] = "builtin:smollm2-135m",
    data: Annotated[
        str, typer.Option("--data", metavar="DATA", help="Text: a file, a folder or builtin:NAME.")
    ] = "builtin:anarchism",
    blocks: Annotated[int, option("--blocks", count, "N", "Held-out blocks in each measurement.")] = 16,
    device: inputs.Device = "auto",
    seed: inputs.Seed = 0,
    json_file: inputs.Json = None,
) -> None:
    """The whole story in minutes: a real model, ruined by sharing, adapted, and writing with the smaller cache."""
    from depthkv.demo import print_figures, run_demo

    try:
        figures = run_demo(
            out, train=train, minutes=minutes, model_name=model, data=data, device=device, eval_blocks=blocks, seed=seed
        )
    except KeyboardInterrupt:
        show("depthkv: stopped; the same command goes on where it was")
        raise typer.Exit(130) from None
    write_json(json_file, figures)
    print_figures(figures, out, console())

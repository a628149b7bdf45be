"""The command line: `depthkv COMMAND`. Thin: every command checks its input, calls the library and shows the result.

Bad input exits with 2 and one line on stderr, Ctrl-C with 130. An internal error keeps its traceback.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer

from depthkv.cli.bench import bench_command
from depthkv.cli.demo import demo_command
from depthkv.cli.evaluate import evaluate_command
from depthkv.cli.export import export_command
from depthkv.cli.generate import generate_command
from depthkv.cli.heads import merge_heads_command
from depthkv.cli.inspect import inspect_command
from depthkv.cli.output import remember_command
from depthkv.cli.plan import plan_command
from depthkv.cli.recipe import recipe_command
from depthkv.cli.report import report_command
from depthkv.cli.router import router_command
from depthkv.cli.serve import serve_command
from depthkv.cli.train import adapt_command
from depthkv.compress.space import AXES
from depthkv.errors import DepthKVError
from depthkv.evaluate.run import SUITES
from depthkv.machine import versions

__all__ = ["app", "main"]

# typer brings its own copy of click since 0.2x; by this name the base of its usage errors is found in either
_ClickException: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_SEVERAL = {name: _NUMBER for name in ("--retention", "--length", "--prompt-tokens", "--batch-size", "--keep")}
_SEVERAL["--recipe"] = re.compile(r".+\.json")
_SEVERAL["--axes"] = re.compile("|".join(AXES))
_SEVERAL["--plan"] = re.compile(r".+\.json")
_SEVERAL["--suite"] = re.compile("|".join([*SUITES, "all"]))
"""Options that may be followed by several values where a command takes them more than once, and what those look like:
the argument after them could be MODEL."""

app = typer.Typer(
    name="depthkv",
    help="Keep the KV cache of only some layers of a language model, train it for that, measure the cost.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("demo", short_help="The whole story on SmolLM2-135M, in minutes.")(demo_command)
app.command("inspect", short_help="Layers, cache sizes, what can share with what.")(inspect_command)
app.command("merge-heads", short_help="Fewer KV heads, to be adapted.")(merge_heads_command)
app.command("adapt", short_help="Train a model to keep fewer layers' caches.")(adapt_command)
app.command("plan", short_help="Choose the layers to keep, by measuring.")(plan_command)
app.command("router", short_help="Choose the layers to keep for each prompt.")(router_command)
app.command("recipe", short_help="Bits and tokens of the caches that stay, by hand.")(recipe_command)
app.command("evaluate", short_help="What is lost at several retentions.")(evaluate_command)
app.command("report", short_help="One HTML page of what was measured.")(report_command)
app.command("generate", short_help="Text, and the size of its cache.")(generate_command)
app.command("serve", short_help="An OpenAI-compatible server.")(serve_command)
app.command("export", short_help="A checkpoint that vLLM serves.")(export_command)
app.command("bench", short_help="Speed and memory, full and shared in turns.")(bench_command)


def _show_versions(asked: bool) -> None:
    if asked:
        for name, value in versions().items():
            print(name, value)
        raise typer.Exit


@app.callback()
def _before_the_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_versions, is_eager=True, help="Versions and hardware, for bug reports."
        ),
    ] = False,
) -> None: ...


def _repeatable_options() -> dict[str, set[str]]:
    """By command."""
    group: Any = typer.main.get_command(app)
    return {
        name: {option for p in command.params if getattr(p, "multiple", False) for option in p.opts}
        for name, command in group.commands.items()
    }


_REPEATABLE = _repeatable_options()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments without the program's name; None takes those of the process.
    """
    _quiet_libraries()
    remember_command(sys.argv[1:] if argv is None else argv)
    arguments = _spread_values(sys.argv[1:] if argv is None else argv)
    try:
        code = app(args=arguments or ["--help"], prog_name="depthkv", standalone_mode=False)
    except DepthKVError as error:
        return _fail(str(error))
    except _ClickException as error:
        return _fail(getattr(error, "format_message", error.__str__)())
    except torch.OutOfMemoryError as error:
        return _fail(f"expected enough memory on the device, got: {error}")
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; nothing must be flushed into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    if code == 130:
        print("depthkv: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _fail(message: str) -> int:
    line = " ".join(message.split())
    print(f"depthkv: {line}", file=sys.stderr)
    return 2


def _spread_values(arguments: Sequence[str]) -> list[str]:
    """`--retention 1 .5 .33` as one option per value, which is what the parser knows."""
    repeatable = _REPEATABLE.get(arguments[0], set()) if arguments else set()
    spread: list[str] = []
    taking = ""
    for i, argument in enumerate(arguments):
        if argument == "--":
            return spread + list(arguments[i:])
        if taking and (arguments[i - 1] == taking or _SEVERAL[taking].fullmatch(argument)):
            spread.append(f"{taking}={argument}")
        elif argument in _SEVERAL and argument in repeatable and i + 1 < len(arguments):
            taking = argument
        else:
            taking = ""
            spread.append(argument)
    return spread


def _quiet_libraries() -> None:
    """Only what goes wrong is worth a line on stderr; progress is shown by the commands themselves."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

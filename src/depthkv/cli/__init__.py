"""The command line: `depthkv COMMAND`. Thin: every command checks its input, calls the library and shows the result.

Bad input exits with 2 and one line on stderr, Ctrl-C with 130. An internal error keeps its traceback.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import torch
import typer

from depthkv.cli.output import remember_command
from depthkv.errors import DepthKVError
from depthkv.machine import versions

__all__ = ["main"]

# typer brings its own copy of click since 0.2x; by this name the base of its usage errors is found in either
_ClickException: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

_COMMANDS = {
    "demo": ("demo.demo_command", "The whole story on SmolLM2-135M, in minutes."),
    "inspect": ("inspect.inspect_command", "Layers, cache sizes, what can share with what."),
    "merge-heads": ("heads.merge_heads_command", "Fewer KV heads, to be adapted."),
    "adapt": ("train.adapt_command", "Train a model to keep fewer layers' caches."),
    "plan": ("plan.plan_command", "Choose the layers to keep, by measuring."),
    "router": ("router.router_command", "Choose the layers to keep for each prompt."),
    "recipe": ("recipe.recipe_command", "Bits and tokens of the caches that stay, by hand."),
    "evaluate": ("evaluate.evaluate_command", "What is lost at several retentions."),
    "report": ("report.report_command", "One HTML page of what was measured."),
    "generate": ("generate.generate_command", "Text, and the size of its cache."),
    "serve": ("serve.serve_command", "An OpenAI-compatible server."),
    "export": ("export.export_command", "A checkpoint that vLLM serves."),
    "bench": ("bench.bench_command", "Speed and memory, full and shared in turns."),
}
"""Where each is and what it does, in the order of the help. Only the one that runs is imported: some take seconds."""

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_JSON = re.compile(r".+\.json")
_NUMBERS = ("--retention", "--length", "--prompt-tokens", "--batch-size", "--keep")
_SEVERAL = (*_NUMBERS, "--recipe", "--plan", "--axes", "--suite")
"""Options that may be followed by several values where a command takes them more than once."""


def _app(name: str) -> typer.Typer:
    """All commands, of which only `name` can run."""
    app = typer.Typer(
        name="depthkv",
        help="Keep the KV cache of only some layers of a language model, train it for that, measure the cost.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    app.callback()(_before_the_command)
    for command, (place, short_help) in _COMMANDS.items():
        module, _, function = place.partition(".")
        run = getattr(import_module(f"depthkv.cli.{module}"), function) if command == name else _not_imported
        app.command(command, short_help=short_help)(run)
    return app


def _not_imported() -> None:
    raise NotImplementedError


def _show_versions(asked: bool) -> None:
    if asked:
        for name, value in versions().items():
            print(name, value)
        raise typer.Exit


def _before_the_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_versions, is_eager=True, help="Versions and hardware, for bug reports."
        ),
    ] = False,
) -> None: ...


def _repeatable_options(app: typer.Typer, name: str) -> set[str]:
    group: Any = typer.main.get_command(app)
    params = group.commands[name].params if name in group.commands else []
    return {option for p in params if getattr(p, "multiple", False) for option in p.opts}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments without the program's name; None takes those of the process.
    """
    _quiet_libraries()
    given = list(sys.argv[1:] if argv is None else argv)
    remember_command(given)
    name = next((argument for argument in given if argument != "--"), "")
    try:
        app = _app(name)
        arguments = _spread_values(given, _repeatable_options(app, name))
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


def _spread_values(arguments: Sequence[str], repeatable: set[str]) -> list[str]:
    """`--retention 1 .5 .33` as one option per value, which is what the parser knows."""
    spread: list[str] = []
    taking = ""
    for i, argument in enumerate(arguments):
        if argument == "--":
            return spread + list(arguments[i:])
        if taking and (arguments[i - 1] == taking or _looks_like(taking).fullmatch(argument)):
            spread.append(f"{taking}={argument}")
        elif argument in _SEVERAL and argument in repeatable and i + 1 < len(arguments):
            taking = argument
        else:
            taking = ""
            spread.append(argument)
    return spread


def _looks_like(option: str) -> re.Pattern[str]:
    """What a value looks like, since the argument after it could be MODEL. Names are imported only where needed."""
    if option == "--axes":
        from depthkv.compress.space import AXES

        return re.compile("|".join(AXES))
    if option == "--suite":
        from depthkv.evaluate.run import SUITES

        return re.compile("|".join([*SUITES, "all"]))
    return _NUMBER if option in _NUMBERS else _JSON


def _quiet_libraries() -> None:
    """Only what goes wrong is worth a line on stderr; progress is shown by the commands themselves."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

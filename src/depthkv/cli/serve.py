"""The command serve: an OpenAI-compatible server, vLLM's or the embedded one."""

from __future__ import annotations

import importlib.util
import inspect
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from depthkv.adaptive.files import load_router
from depthkv.architectures import max_positions, positions_of_one_rope
from depthkv.checkpoint import load
from depthkv.cli import inputs
from depthkv.cli.inputs import count, naming, option, positive, retention_value
from depthkv.cli.output import show, waiting
from depthkv.errors import DepthKVError
from depthkv.memory import format_bytes, parse_bytes

_ENGINES = ("auto", "vllm", "embedded")
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_LONGEST = 4096
"""Tokens of a request where neither the operator nor the model sets a lower limit."""


def _engine(text: str) -> str:
    if text not in _ENGINES:
        raise typer.BadParameter(f"expected an engine among {', '.join(_ENGINES)}, got {text!r}")
    return text


def _port(text: str | int) -> int:
    value = inputs.count_or_none(text)
    if value > 65535:
        raise typer.BadParameter(f"expected a port from 0 to 65535, got {text!r}")
    return value


def serve_command(
    model: inputs.Model,
    engine: Annotated[
        str, option("--engine", _engine, "NAME", "auto (vLLM if it is installed and can load MODEL), vllm or embedded.")
    ] = "auto",
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, option("--port", _port, "N", "0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="DEPTHKV_API_KEY", metavar="KEY", help="What clients must send."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Of the model; else MODEL's own.")] = None,
    kv_budget: Annotated[
        str | None,
        typer.Option("--kv-budget", metavar="SIZE", help="Most bytes of all caches together, such as 2GiB."),
    ] = None,
    min_retention: Annotated[
        float | None,
        option("--min-retention", retention_value, "R", "Least share of layers that keep a cache, under pressure too."),
    ] = None,
    max_retention: Annotated[
        float | None, option("--max-retention", retention_value, "R", "Largest share of layers that keep a cache.")
    ] = None,
    plan: inputs.PlanFile = None,
    router: Annotated[
        Path | None, typer.Option("--router", metavar="FILE", help='For requests with kv_retention "adaptive".')
    ] = None,
    max_sequences: Annotated[int, option("--max-sequences", count, "N", "Requests answered at once.")] = 16,
    max_queue: Annotated[int, option("--max-queue", count, "N", "Requests that may wait; more get 429.")] = 256,
    max_context: Annotated[
        int | None, option("--max-context", count, "N", "Tokens of a prompt and its answer; else the model's.")
    ] = None,
    max_tokens: Annotated[int, option("--max-tokens", count, "N", "Most tokens of an answer.")] = 512,
    max_body: Annotated[str, typer.Option("--max-body", metavar="SIZE", help="Most bytes of a request.")] = "1MiB",
    timeout: Annotated[float, option("--timeout", positive, "SECONDS", "For a whole request.")] = 300.0,
    drain: Annotated[int, option("--drain", count, "SECONDS", "For what runs and waits at SIGTERM.")] = 60,
    dtype: inputs.Dtype = "auto",
    device: inputs.Device = "auto",
) -> None:
    """An OpenAI-compatible server for one machine, with a page to try the model at /.

    With vLLM installed, it runs vLLM instead. Without --min-retention, a checkpoint with a plan may go down to a
    quarter of its layers under pressure, and one without a plan is not shared.
    """
    with naming("--kv-budget"):
        budget = None if kv_budget is None else parse_bytes(kv_budget)
    with naming("--max-body"):
        body = parse_bytes(max_body)
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise DepthKVError("--api-key: expected printable ASCII, got something else")
    name = name or model.rstrip("/").rpartition("/")[2].removeprefix("builtin:")
    own: dict[str, object] = {"min_retention": min_retention, "max_retention": max_retention, "plan": plan}
    own |= {"router": router, "max_queue": max_queue, "max_tokens": max_tokens, "max_body": max_body}
    own |= {"timeout": timeout, "drain": drain, "device": device}
    defaults = inspect.signature(serve_command).parameters
    if _uses_vllm(engine, model, [name for name, value in own.items() if value != defaults[name].default]):
        from depthkv.serve import vllm

        line = vllm.command(
            model,
            name=name,
            host=host,
            port=port,
            dtype=dtype,
            kv_budget=budget,
            max_sequences=max_sequences,
            max_context=max_context,
        )
        show(f"running: {shlex.join(line)}")
        key = {} if api_key is None else {"VLLM_API_KEY": api_key}
        os.execve(line[0], line, os.environ | key)  # in the place of this process, so that signals reach it
    if missing := [needed for needed in _NEEDED if importlib.util.find_spec(needed) is None]:
        raise DepthKVError(
            f"expected the embedded server's packages (pip install 'depthkv[serve]'), got no {missing[0]}"
        )
    from depthkv.serve.app import create_app
    from depthkv.serve.engine import Engine
    from depthkv.serve.request import EngineSettings
    from depthkv.serve.run import allowed_hosts, bind, serve

    with bind(host, port) as listening:
        config, kinds = inputs.read_config(model)
        given = None if plan is None else inputs.read_plan(plan, kinds)
        chosen_router = None if router is None else load_router(router, kinds)
        one_rope = positions_of_one_rope(config)
        if max_context is not None:
            inputs.require_positions(config, max_context, "--max-context")
            if one_rope is not None and max_context > one_rope:
                raise DepthKVError(
                    f"--max-context: expected at most {one_rope:,} tokens, beyond which this model's rotary embedding "
                    f"changes for all that run, got {max_context:,}"
                )
        settings = EngineSettings(
            kv_budget=budget,
            max_sequences=max_sequences,
            max_queue=max_queue,
            max_context=max_context or min(most for most in (max_positions(config), one_rope, _LONGEST) if most),
            timeout_s=timeout,
        )
        with waiting(f"loading {model}"):
            loaded, tokenizer, own_plan = load(model, dtype=dtype, device=device, progress=show)
            with naming(model):
                made = Engine(
                    loaded,
                    tokenizer,
                    given or own_plan,
                    settings,
                    min_retention=min_retention,
                    max_retention=max_retention,
                    router=chosen_router,
                )
        least = made.depths.num_bytes(made.depths.least, 2)
        if budget is not None and budget < least:
            made.stop()
            why = f"expected at least {format_bytes(least)}, two tokens with the fewest layers, got {kv_budget}"
            raise DepthKVError(f"--kv-budget: {why}")
        hosts = allowed_hosts(host, listening.getsockname()[0])
        app = create_app(made, name=name, api_key=api_key, max_tokens=max_tokens, max_body=body, hosts=hosts)
        if api_key is None and hosts is None:
            show(f"anybody who reaches {host} can use this server: --api-key asks for a key")
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        depths, limit = made.depths, "no KV budget" if budget is None else f"a KV budget of {format_bytes(budget)}"
        show(
            f"{name} at {address}/v1, {depths.default:.0%} of the layers keep a cache "
            f"({depths.min_retention:.0%} to {depths.max_retention:.0%}), {limit}; a page to try it is at /"
        )
        serve(app, listening, drain)


def _uses_vllm(engine: str, model: str, own: Sequence[str]) -> bool:
    """Args: engine and model as asked for, and the parameters that were asked for and vLLM does not have."""
    from depthkv.serve import vllm

    if engine == "embedded" or (engine == "auto" and not vllm.is_installed()):
        return False
    if not vllm.is_installed():
        raise DepthKVError("expected vLLM to be installed for --engine vllm (pip install 'depthkv[vllm]'), got none")
    if not own and vllm.can_load(model):
        return True
    why = f"expected a folder of depthkv export for vLLM, got {model}"
    if own:
        option = own[0].replace("_", "-")
        why = f"expected options that vLLM has, too, got --{option}, which only the embedded server takes"
    if engine == "vllm":
        raise DepthKVError(why)
    show(f"the embedded server runs, not vLLM: {why}")
    return False

"""The command line of vLLM that serves a checkpoint."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from depthkv.export import TYPE_PREFIX, is_exported
from depthkv.vllm_plugin import MODELS


def is_installed() -> bool:
    """Whether vLLM can be imported; it is not imported for that."""
    return importlib.util.find_spec("vllm") is not None


def can_load(model: str) -> bool:
    """Whether `model` is a folder that vLLM serves as it is meant.

    That is an export of `depthkv export` of a family that the plugin knows, or a checkpoint without a plan. One that
    was saved with its plan would run with every layer's cache there, and an adapter, a .gguf file or a built-in model
    would not run at all.
    """
    path = Path(model) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if is_exported(config):
            return config["model_type"].removeprefix(TYPE_PREFIX) in MODELS
        return "kv_source_layers" not in config
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def command(
    model: str,
    *,
    name: str,
    host: str,
    port: int,
    dtype: str,
    kv_budget: int | None,
    max_sequences: int,
    max_context: int | None,
) -> list[str]:
    """What to run: the module behind `vllm serve`, since that program is broken in vLLM's build for CPUs.

    The API key goes through the environment, as VLLM_API_KEY, where no list of processes shows it.
    """
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    line += ["--host", host, "--port", str(port), "--served-model-name", name]
    line += ["--dtype", dtype, "--max-num-seqs", str(max_sequences)]
    line += [] if max_context is None else ["--max-model-len", str(max_context)]
    return line + ([] if kv_budget is None else ["--kv-cache-memory-bytes", str(kv_budget)])

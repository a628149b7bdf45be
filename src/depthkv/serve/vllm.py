"""The command line of vLLM that serves a checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def is_installed() -> bool:
    """Whether vLLM can be imported; it is not imported for that."""
    return importlib.util.find_spec("vllm") is not None


def can_load(model: str) -> bool:
    """Whether `model` is a whole checkpoint of transformers: no adapter, no .gguf file, nothing built in."""
    return (Path(model) / "config.json").is_file()


def command(
    model: str, *, name: str, host: str, port: int, kv_budget: int | None, max_sequences: int, max_context: int | None
) -> list[str]:
    """What to run; the API key goes through the environment, as VLLM_API_KEY, where no list of processes shows it."""
    line = ["vllm", "serve", model, "--host", host, "--port", str(port), "--served-model-name", name]
    line += ["--max-num-seqs", str(max_sequences)]
    line += [] if max_context is None else ["--max-model-len", str(max_context)]
    return line + ([] if kv_budget is None else ["--kv-cache-memory-bytes", str(kv_budget)])

"""The state of an unfinished training run on disk: everything that is needed to go on exactly as if it had not stopped.

safetensors for tensors, JSON for the rest, no pickle. A state is written beside the old one and then renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from depthkv.errors import CheckpointError

FORMAT = "depthkv-adapt"
VERSION = 1
_PREFIX = "adapt-state-"


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run has come."""

    step: int
    """Optimizer steps done."""
    seconds: float
    """Time used, as the budget counts it."""
    losses: list[float]
    """One per optimizer step, nats per token."""


def has_state(directory: str | os.PathLike[str]) -> bool:
    """Whether `directory` holds the state of a run."""
    return _newest(Path(directory)) is not None


def discard_state(directory: str | os.PathLike[str]) -> None:
    """Delete the state in `directory`, and nothing else there."""
    for path in Path(directory).glob(f"{_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def save_state(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trained: dict[str, nn.Parameter],
    position: Position,
    settings: dict[str, Any],
) -> None:
    """Write the state, then delete the one before it.

    Raises:
        CheckpointError: the folder cannot be written; the previous state is left as it was.
    """
    directory = Path(directory)
    target = directory / f"{_PREFIX}{position.step:08d}"
    temporary = directory / f"{_PREFIX}{position.step:08d}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({n: _plain(p) for n, p in model.named_parameters()}, temporary / "weights.safetensors")
        moments = {
            f"{key}:{name}": _plain(value)
            for name, parameter in trained.items()
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        moments["rng:cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            moments["rng:cuda"] = torch.cuda.get_rng_state()
        save_file(moments, temporary / "optimizer.safetensors")
        header = {"format": FORMAT, "version": VERSION, "settings": settings, **vars(position)}
        (temporary / "state.json").write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"expected to write the training state to {directory}, got {error}") from error
    for path in directory.glob(f"{_PREFIX}*"):
        if path != target:
            shutil.rmtree(path, ignore_errors=True)


def load_state(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trained: dict[str, nn.Parameter],
    settings: dict[str, Any],
) -> Position | None:
    """Put the state in `directory` into model, optimizer and random generators; None if there is none.

    Raises:
        CheckpointError: a damaged state, or one of a run with other settings, data or weights; the error names what.
    """
    path = _newest(Path(directory))
    if path is None:
        return None
    try:
        header = json.loads((path / "state.json").read_text(encoding="utf-8"))
        weights = load_file(path / "weights.safetensors")
        moments = load_file(path / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"expected a training state in {path}, got {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
        raise CheckpointError(f'expected a training state of version {VERSION} in {path}, got another "state.json"')
    _check_settings(path, header.get("settings"), settings)
    parameters = dict(model.named_parameters())
    if {n: w.shape for n, w in weights.items()} != {n: p.shape for n, p in parameters.items()}:
        raise CheckpointError(f"expected a training state of the same model in {path}, got other weights")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for name, parameter in trained.items():
        state = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key}:{name}" in moments:
                # AdamW keeps its step count where a fused step wants it: on the parameter's device
                state[key] = moments[f"{key}:{name}"].to(parameter.device)
        if state:
            optimizer.state[parameter] = state
    torch.set_rng_state(moments["rng:cpu"])
    if "rng:cuda" in moments and torch.cuda.is_available():
        torch.cuda.set_rng_state(moments["rng:cuda"])
    return Position(step=header["step"], seconds=header["seconds"], losses=header["losses"])


def _check_settings(path: Path, found: object, expected: dict[str, Any]) -> None:
    # through JSON, as the file went: tuples are lists there
    wanted: dict[str, Any] = json.loads(json.dumps(expected))
    if not isinstance(found, dict):
        raise CheckpointError(f"expected the settings of the unfinished run in {path}, got none")
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"expected the settings of the unfinished run in {path.parent} ({name} = {found.get(name)!r}), "
                f"got {name} = {wanted.get(name)!r}; give the same settings, or delete {path} to start anew"
            )


def _newest(directory: Path) -> Path | None:
    found = sorted(p for p in directory.glob(f"{_PREFIX}*") if p.suffix != ".tmp" and p.is_dir())
    return found[-1] if found else None


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()

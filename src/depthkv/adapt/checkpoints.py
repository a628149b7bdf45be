"""Checkpoints of an unfinished training run: whole or not there, and known to be whole before they are used.

A checkpoint is written under another name, sealed with the size and SHA-256 of each of its files, and renamed. What a
kill, a full disk or a bad disk leaves behind is recognised, and the checkpoint before it is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from depthkv.errors import CheckpointError

FORMAT = "depthkv-adapt"
VERSION = 3
SEAL = "depthkv.json"
STAGING = ".saving"
"""Where a checkpoint is written before it is renamed."""
_PREFIX = "checkpoint-"


def has_state(directory: str | os.PathLike[str]) -> bool:
    """Whether `directory` holds a checkpoint of a run."""
    return bool(_checkpoints(Path(directory)))


def newest_step(directory: str | os.PathLike[str]) -> int | None:
    """The step of the newest checkpoint, whole or not; None if there is none."""
    found = _checkpoints(Path(directory))
    return _step(found[-1]) if found else None


def discard_state(directory: str | os.PathLike[str]) -> None:
    """Delete the checkpoints in `directory`, and nothing else there."""
    folder = Path(directory)
    for path in [*_checkpoints(folder), folder / STAGING]:
        shutil.rmtree(path, ignore_errors=True)


def seal(folder: Path, header: dict[str, Any]) -> None:
    """Write `header` and the sizes and hashes of all files into `folder`, and see that everything is on the disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, _sha256(path)]
    text = json.dumps({"format": FORMAT, "version": VERSION, **header, "files": files}, indent=1)
    with (folder / SEAL).open("w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def newest_whole(directory: str | os.PathLike[str], warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its header; None if there is no checkpoint at all.

    Args:
        directory: of the run.
        warn: is told of each damaged one that is passed over.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    found = _checkpoints(Path(directory))
    problem = ""
    for path in reversed(found):
        header, problem = _inspect(path)
        if header is not None:
            return path, header
        warn(f"the checkpoint {path} is damaged ({problem}) and passed over")
    if found:
        raise CheckpointError(f"expected a whole checkpoint in {directory}, got {found[-1].name}: {problem}")
    return None


def check_settings(path: Path, found: object, expected: dict[str, Any]) -> None:
    """Refuse to go on from the checkpoint `path` of a run with other settings.

    Raises:
        CheckpointError: names the first setting that differs.
    """
    # through JSON, as the file went: tuples are lists there
    wanted: dict[str, Any] = json.loads(json.dumps(expected))
    if not isinstance(found, dict):
        raise CheckpointError(f"expected the settings of the unfinished run in {path}, got none")
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"expected the settings of the unfinished run in {path.parent} ({name} = {found.get(name)!r}), "
                f"got {name} = {wanted.get(name)!r}; give the same settings, or delete that folder to start anew"
            )


def _checkpoints(directory: Path) -> list[Path]:
    paths = [p for p in directory.glob(f"{_PREFIX}*") if p.is_dir() and p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(paths, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def _inspect(path: Path) -> tuple[dict[str, Any] | None, str]:
    """The header of a whole checkpoint, or None and what is wrong."""
    try:
        header = json.loads((path / SEAL).read_text(encoding="utf-8"))
        if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
            return None, f"{SEAL} is not of version {VERSION}"
        for name, (size, digest) in header["files"].items():
            file = path / name
            if file.stat().st_size != size or _sha256(file) != digest:
                return None, f"{name} is not what was written"
    except FileNotFoundError as error:
        return None, f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, str(error) or type(error).__name__
    return header, ""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

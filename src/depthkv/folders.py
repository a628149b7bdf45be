"""Checkpoint folders that are written beside their place and renamed, so that no half-written one is ever seen."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from depthkv.errors import CheckpointError
from depthkv.files import make_ordinary

# Files that belong to a checkpoint and give way when it is replaced; anything else in the folder is kept.
_OWN_FILES = (
    "config.json generation_config.json plan.json adapter_config.json adapter_model.safetensors "
    "model.safetensors model-*.safetensors model.depthkv*.safetensors *.index.json *.index.depthkv.json base "
    "pytorch_model*.bin tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json "
    "chat_template.* vocab.json vocab.txt merges.txt spiece.model"
).split()


@contextlib.contextmanager
def written_folder(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder beside `directory` to write a checkpoint to; it takes the place of `directory` at the end.

    Raises:
        CheckpointError: `directory` holds something else, or cannot be written; what was there is left as it was.
    """
    target = Path(os.path.realpath(Path(directory).expanduser()))
    require_replaceable(target)
    work = target.with_name(f".{target.name}.new-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
        for path in work.rglob("*.safetensors"):  # safetensors writes them for their owner alone
            make_ordinary(path)
        _replace(target, work)
    except CheckpointError:
        raise
    except Exception as problem:  # safetensors reports a full disk with an exception type of its own
        full = "No space left" in str(problem) or getattr(problem, "errno", None) == errno.ENOSPC
        reason = "no space left on the disk" if full else one_line(problem)
        raise CheckpointError(f"expected to write the checkpoint {directory}, got {reason}") from problem
    finally:
        shutil.rmtree(work, ignore_errors=True)


def require_replaceable(target: Path) -> None:
    """Refuse folders that `save` would not write to; for a check before hours of work instead of after them."""
    if target.is_dir():
        entries = sorted(path.name for path in target.iterdir())
        if entries and not {"config.json", "adapter_config.json"} & set(entries):
            raise CheckpointError(f"expected a new, empty or checkpoint folder, got {target}, which holds {entries[0]}")
    elif target.exists():
        raise CheckpointError(f"expected a folder to write the checkpoint to, got the file {target}")


def _replace(target: Path, work: Path) -> None:
    """Put `work` in the place of `target`; files that are no checkpoint's move over."""
    if not target.exists():
        os.rename(work, target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    os.rename(target, old)
    try:
        os.rename(work, target)
    except OSError:
        os.rename(old, target)
        raise
    for path in sorted(old.iterdir()):
        own = any(fnmatch.fnmatch(path.name, pattern) for pattern in _OWN_FILES)
        if not own and not (target / path.name).exists():
            os.rename(path, target / path.name)
    shutil.rmtree(old, ignore_errors=True)


def one_line(problem: BaseException) -> str:
    """Its text without line breaks, or its type."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 300 else text[:297] + "..."

"""Where the name of a model leads: a hub id, a folder, a config file, a .gguf file or `builtin:NAME`."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from depthkv.downloads import BUILTIN_ADAPTERS, BUILTIN_MODELS, Progress, fetch_builtin_model
from depthkv.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a name leads, in the form that transformers' from_pretrained takes."""

    name: str
    """As the user gave it."""
    folder: str
    """A local folder, a config file or a hub id."""
    gguf_file: str | None = None
    """Name of a .gguf file in `folder`."""
    prepared: Path | None = None
    """Where a built-in model's config and tokenizer are kept in transformers' own files, which read much faster."""
    local_files_only: bool = False

    @property
    def kwargs(self) -> dict[str, Any]:
        """Arguments for every from_pretrained."""
        kwargs: dict[str, Any] = {"local_files_only": self.local_files_only}
        if self.gguf_file is not None:
            kwargs["gguf_file"] = self.gguf_file
        return kwargs

    @property
    def is_prepared(self) -> bool:
        """Whether `prepared` is there."""
        return self.prepared is not None and self.prepared.is_dir()

    def prepare(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep what takes seconds to parse out of a built-in model's file. Only speed is lost where this fails."""
        if self.prepared is None or self.is_prepared:
            return
        work = self.prepared.with_name(f".{self.prepared.name}.new-{os.getpid()}")
        with contextlib.suppress(OSError):
            work.mkdir()
            config.save_pretrained(work)
            tokenizer.save_pretrained(work)
            os.replace(work, self.prepared)
        shutil.rmtree(work, ignore_errors=True)


def locate(name: str | os.PathLike[str], progress: Progress | None = None) -> Location:
    """Find what `name` means, fetching a built-in model if need be.

    Raises:
        CheckpointError: nothing of that name, or a file that cannot be a model.
    """
    text = os.fspath(name)
    if not text:
        raise CheckpointError("expected the name of a model, got ''")
    if text.startswith("builtin:"):
        short = text.removeprefix("builtin:")
        if short not in BUILTIN_MODELS:
            choices = ", ".join([*(f"builtin:{model}" for model in BUILTIN_MODELS), *BUILTIN_ADAPTERS])
            raise CheckpointError(f"expected one of {choices}, got {text!r}")
        path = fetch_builtin_model(short, progress)
        # versions of transformers write these files differently, so each keeps its own
        prepared = path.parent / f"transformers-{transformers.__version__}"
        return Location(
            name=text, folder=str(path.parent), gguf_file=path.name, prepared=prepared, local_files_only=True
        )
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"expected config.json in the folder {text}, got none")
        return Location(name=text, folder=str(path), local_files_only=True)
    if text.lower().endswith(".gguf"):
        _require_gguf(path)
        return Location(name=text, folder=str(path.parent), gguf_file=path.name, local_files_only=True)
    if path.is_file():
        if path.suffix != ".json":
            raise CheckpointError(f"expected a folder, a .gguf file or a config.json, got the file {text}")
        return Location(name=text, folder=str(path), local_files_only=True)
    looks_like_path = text.startswith((".", "~", os.sep)) or text.count("/") > 1 or text.endswith(("/", ".json"))
    if isinstance(name, os.PathLike) or looks_like_path or (os.sep != "/" and os.sep in text):
        raise CheckpointError(f"expected a model folder or .gguf file, got {text!r}, which does not exist")
    return _locate_on_hub(text)


def _locate_on_hub(name: str) -> Location:
    """One quick request decides; from_pretrained alone would retry for half a minute without a connection."""
    choices = "expected a folder, a .gguf file, builtin:NAME or a model id of the Hugging Face hub"
    try:
        HfApi().model_info(name, timeout=10)
    except HFValidationError as problem:
        raise CheckpointError(f"{choices}, got {name!r}") from problem
    except RepositoryNotFoundError as problem:
        raise CheckpointError(f"{choices}, got {name!r}, which the hub does not have (or keeps private)") from problem
    except Exception as problem:  # no connection: the type depends on the HTTP library under huggingface_hub
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            reason = "which is no local file, not in the local cache, and the hub cannot be reached"
            raise CheckpointError(f"{choices}, got {name!r}, {reason}") from problem
        return Location(name=name, folder=name, local_files_only=True)
    return Location(name=name, folder=name)


def _require_gguf(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"expected a .gguf file, got {str(path)!r}, which does not exist")
    with path.open("rb") as stream:
        if (magic := stream.read(4)) != b"GGUF":
            raise CheckpointError(f"expected a file that starts with 'GGUF', got {path}, which starts with {magic!r}")

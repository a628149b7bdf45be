"""Files that are either whole or not there, and JSON files that say what they are."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from depthkv.errors import DepthKVError


@contextmanager
def replacing(
    path: str | os.PathLike[str], what: str, error_class: type[DepthKVError] = DepthKVError
) -> Iterator[Path]:
    """A file beside `path` to write to. It is renamed to `path` at the end, or deleted if the block fails.

    Args:
        path: where to; folders above it are made.
        what: for the error, such as "the plan".
        error_class: of the error.

    Raises:
        DepthKVError: the file cannot be written; the one that was there before is as it was.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=target.parent, prefix=".", suffix=target.suffix, delete=False
        ) as placeholder:
            temporary = Path(placeholder.name)
        yield temporary
        make_ordinary(temporary)  # temporary files are private otherwise
        temporary.replace(target)
    except OSError as error:
        raise error_class(f"expected to write {what} to {Path(path)}, got {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(
    path: str | os.PathLike[str], text: str, what: str, error_class: type[DepthKVError] = DepthKVError
) -> None:
    """Write `text` in UTF-8, as `replacing` does."""
    with replacing(path, what, error_class) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(
    path: str | os.PathLike[str],
    what: str,
    error_class: type[DepthKVError] = DepthKVError,
    parse_constant: Callable[[str], Any] | None = None,
) -> Any:
    """What a JSON file holds.

    Args:
        path: of the file.
        what: for the error, such as "plan".
        error_class: of the error.
        parse_constant: as for `json.loads`: what to make of NaN and infinities.

    Raises:
        DepthKVError: the file cannot be read, or is no JSON; names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=parse_constant)
    except OSError as error:
        raise error_class(f"expected a {what} file at {path}, got {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise error_class(f"{path}: expected a {what} in JSON, got {error or 'too deep a nesting'}") from error


def checked_header(
    data: object, name: str, version: int, known: Set[str], error_class: type[DepthKVError] = DepthKVError
) -> dict[str, Any]:
    """`data` itself, if it is a JSON object of this format and version with known keys only.

    Raises:
        DepthKVError: it is something else.
    """
    if not isinstance(data, dict):
        raise error_class(f"expected a JSON object, got {type(data).__name__}")
    if data.get("format") != name:
        raise error_class(f'expected "format": "{name}", got {data.get("format")!r}')
    if unknown := sorted(str(key) for key in data.keys() - known):
        raise error_class(f"expected only the keys {sorted(known)}, got {unknown[0]!r}")
    if data.get("version") != version or isinstance(data["version"], bool):
        raise error_class(f'expected "version": {version}, got {data.get("version")!r}')
    return data


def make_ordinary(path: Path) -> None:
    """Give a file that only its owner may read the mode that new files have."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)

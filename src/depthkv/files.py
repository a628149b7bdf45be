"""Files that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        temporary.chmod(0o666 & ~_umask())  # temporary files are private otherwise
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Losses by block of text, kept in a file: what was measured once is not measured again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from depthkv.errors import DepthKVError
from depthkv.files import write_text

VERSION = 1


def load_losses(
    path: str | os.PathLike[str], what: str, name: str, fingerprint: str, num_blocks: int
) -> dict[str, list[float]]:
    """By what was measured, the loss of each block; none where there is no file.

    Args:
        path: of the file.
        what: for errors: whose losses, such as "plans".
        name: of the format.
        fingerprint: of model, text and whatever else the losses depend on.
        num_blocks: of the text.

    Raises:
        DepthKVError: the file is damaged, or holds losses of something else.
    """
    if not Path(path).exists():
        return {}
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        losses = data["losses"]
        known = data["format"] == name and data["version"] == VERSION
        numbers = all(
            len(row) == num_blocks and all(isinstance(v, float) and math.isfinite(v) for v in row)
            for row in losses.values()
        )
        found = data["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        got = f"a damaged file ({type(error).__name__}: {error})"
        raise DepthKVError(f"{path}: expected losses of {what}, got {got}") from error
    if not known or found != fingerprint or not numbers:
        raise DepthKVError(
            f"{path}: expected losses of this model on this text, in this dtype and with prompts of this length, got "
            "others; name another file or remove it"
        )
    return dict(losses)


def save_losses(
    path: str | os.PathLike[str], what: str, name: str, fingerprint: str, losses: Mapping[str, Sequence[float]]
) -> None:
    """Write what `load_losses` reads."""
    data = {"format": name, "version": VERSION, "fingerprint": fingerprint, "losses": losses}
    write_text(path, json.dumps(data) + "\n", f"the losses of {what}")

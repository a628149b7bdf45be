"""Is what the model writes still sound? Repetition and length of greedy text, and how long it is the full cache's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NGRAM = 4
"""Tokens in a row that count as a repetition when they come again."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """Of one text that was written after a prompt."""

    repetition: float
    """Share of its runs of `NGRAM` tokens that occurred in it before, per cent. Prose has a few, a loop nearly 100."""
    length: float
    """Tokens, without the end-of-text token."""
    ended: float
    """100 if it ended by itself before the limit, else 0."""
    same_prefix: float
    """Tokens in common with the full cache's text before the first difference."""


def health(tokens: Sequence[int], reference: Sequence[int], limit: int) -> Health:
    """Measure one text.

    Args:
        tokens: what was written.
        reference: what the full cache wrote after the same prompt.
        limit: most tokens that could be written.
    """
    runs = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    same = 0
    while same < min(len(tokens), len(reference)) and tokens[same] == reference[same]:
        same += 1
    return Health(
        repetition=100 * (1 - len(set(runs)) / len(runs)) if runs else 0.0,
        length=float(len(tokens)),
        ended=100.0 if len(tokens) < limit else 0.0,
        same_prefix=float(same),
    )

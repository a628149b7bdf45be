"""Losses of recipes, kept in a file: a run that was stopped goes on, another budget starts from what is known."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from depthkv.calibrate.store import fingerprint
from depthkv.compress.measure import streamed_losses
from depthkv.compress.recipe import CacheRecipe
from depthkv.evaluate.text import PIECE
from depthkv.kept_losses import load_losses, save_losses

__all__ = ["RecipeLosses"]

Measure = Callable[[CacheRecipe], Sequence[float]]
"""From a recipe to its loss on each block of text, nats per token."""

FORMAT = "depthkv-recipe-losses"


class RecipeLosses:
    """`streamed_losses` of recipes; none is measured twice.

    Args:
        model: a causal language model of transformers in evaluation mode, neither shared nor routed.
        blocks: token ids, `[blocks, tokens]`.
        prompt_tokens: at the beginning of each; the loss is of what follows.
        batch_size: blocks in one forward.
        path: a file to keep them in, written after each.

    Raises:
        DepthKVError: the file holds losses of another model, text, dtype or prompt, or is damaged.
    """

    def __init__(
        self,
        model: Any,
        blocks: torch.Tensor,
        prompt_tokens: int,
        *,
        batch_size: int = 4,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.model, self.blocks, self.prompt_tokens = model, blocks, prompt_tokens
        self.batch_size, self.path = batch_size, path
        self.num_measured = 0
        """By this object, those in the file not counted."""
        self._key = fingerprint(model, blocks, ["recipes", prompt_tokens, PIECE, str(model.dtype)])
        self._kept = {} if path is None else load_losses(path, "recipes", FORMAT, self._key, len(blocks))

    def __call__(self, recipe: CacheRecipe) -> list[float]:
        """The loss of each block."""
        name = _name(recipe)
        if name not in self._kept:
            plain = not recipe.is_quantised and recipe.tokens is None
            how = recipe.plan if plain else recipe
            self._kept[name] = streamed_losses(
                self.model, how, self.blocks, self.prompt_tokens, batch_size=self.batch_size
            )
            self.num_measured += 1
            if self.path is not None:
                save_losses(self.path, "recipes", FORMAT, self._key, self._kept)
        return self._kept[name]


def _name(recipe: CacheRecipe) -> str:
    """What the loss depends on; what does nothing is left out."""
    facts = recipe.to_dict()
    for key in ("format", "version", "provenance"):
        del facts[key]
    if recipe.tokens is None:
        del facts["rule"]
        if not recipe.is_quantised:
            for key in ("group_size", "sinks", "recent"):
                del facts[key]
    return json.dumps(facts, separators=(",", ":"))

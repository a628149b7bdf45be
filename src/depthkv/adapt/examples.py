"""The examples of a training run, in the order in which it sees them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import nn

from depthkv.adapt.config import AdaptConfig
from depthkv.adapt.loss import Batch
from depthkv.errors import DataError

Examples = torch.Tensor | Sequence[Batch]
"""Packed blocks `[blocks, block_size]`, or examples of any length (`input_ids`, `labels`, each `[tokens]`)."""


class EndlessExamples(torch.utils.data.Dataset[Batch]):
    """Examples in the order of training: an endless row of permutations, one per epoch.

    Epoch `e`'s permutation is a pure function of `(seed, e)`.
    """

    def __init__(self, examples: Examples, config: AdaptConfig, world_size: int) -> None:
        self._examples, self._seed = examples, config.seed
        self._length = config.num_steps(world_size) * config.batch_size * config.accumulate_steps * world_size
        self._epoch, self._order = -1, list[int]()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> Batch:
        example = self._examples[self.row(position)]
        return {"input_ids": example} if isinstance(example, torch.Tensor) else example

    def row(self, position: int) -> int:
        """Which example comes at `position`."""
        epoch, place = divmod(position, len(self._examples))
        if epoch != self._epoch:
            self._order = list(range(len(self._examples)))
            random.Random(f"depthkv-order:{self._seed}:{epoch}").shuffle(self._order)
            self._epoch = epoch
        return self._order[place]


def check_blocks(model: nn.Module, blocks: torch.Tensor, config: AdaptConfig) -> None:
    """Refuse blocks that `model` cannot train on.

    Raises:
        DataError: another size, none at all, or token ids outside the vocabulary.
    """
    if blocks.dim() != 2 or blocks.shape[1] != config.block_size:
        raise DataError(f"expected blocks of {config.block_size} tokens, got a tensor of shape {list(blocks.shape)}")
    if len(blocks) == 0:
        raise DataError("expected at least one block of training text, got none")
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    lowest, highest = int(blocks.min()), int(blocks.max())
    if lowest < 0 or highest >= vocabulary:
        raise DataError(f"expected token ids from 0 to {vocabulary - 1}, got {lowest} to {highest}")

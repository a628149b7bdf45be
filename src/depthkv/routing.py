"""Samplers: which layer each layer reads in one training step.

A sampler is one class with one method, `draw(step, kinds)`, a pure function of its fields and the step, so that a
resumed run and every data-parallel rank draw the same maps without talking to each other.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from depthkv.errors import DepthKVError

__all__ = ["RandomCrossLayer", "RoutingMap", "Sampler", "step_rng"]


class Sampler(Protocol):
    """Draws a routing map for a step."""

    def draw(self, step: int, kinds: Sequence[Hashable]) -> list[int]:
        """One source per layer, itself or any earlier layer of an equal kind.

        Args:
            step: counts the forwards of the model from 0.
            kinds: one per layer, see `depthkv.architectures.layer_kinds`.
        """
        ...


@dataclass(frozen=True)
class RoutingMap:
    """The map that one training step used. A source gives the pair that it computed from its own input, whether or not
    it reads its own, so this need not be a valid `SharingPlan`."""

    kv_source_layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RandomCrossLayer:
    """R-CLA (arXiv:2604.22782, section 3): every layer flips a coin and reads its own KV or a random earlier layer's.

    Distribution: independently for each layer, its own with probability `1 - cross_layer_prob`, otherwise uniform over
    the earlier layers of its kind. The first layer of each kind always reads its own.

    Raises:
        DepthKVError: a probability outside [0, 1], a seed that is not an integer.
    """

    cross_layer_prob: float = 0.6
    """Probability that a layer leaves its own KV (the paper's fine-tuning uses 0.6)."""
    seed: int = 0

    def __post_init__(self) -> None:
        probability = self.cross_layer_prob
        if isinstance(probability, bool) or not isinstance(probability, (int, float)) or not 0 <= probability <= 1:
            raise DepthKVError(f"expected cross_layer_prob between 0 and 1, got {probability!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise DepthKVError(f"expected an integer seed, got {self.seed!r}")

    def draw(self, step: int, kinds: Sequence[Hashable]) -> list[int]:
        """See `Sampler.draw`."""
        rng = step_rng(self.seed, step)
        earlier: dict[Hashable, list[int]] = {}
        sources = []
        for layer, kind in enumerate(kinds):
            candidates = earlier.setdefault(kind, [])
            leaves = rng.random() < self.cross_layer_prob
            sources.append(rng.choice(candidates) if leaves and candidates else layer)
            candidates.append(layer)
        return sources


def step_rng(seed: int, step: int) -> random.Random:
    """A generator that depends on nothing but the seed and the step (the same on every platform and rank)."""
    return random.Random(f"depthkv:{seed}:{step}")

"""How sure a mean is: bootstrap over documents, paired against another way to run the same model."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import torch

from depthkv.errors import DepthKVError

__all__ = ["Score", "score"]

RESAMPLES = 2000
"""Bootstrap samples. The ends of a 95 % interval then move by a few per cent of its width between seeds."""

BETTER_THAN_FULL = (
    "A loss below the full cache's comes from training on such text, which the model with its full cache has not seen. "
    "Compare it with a model that was fine-tuned on as much."
)
"""What such a figure must not be shown without."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """A mean with its 95 % interval, and how far it is from the full cache's.

    The intervals are percentiles of a bootstrap over documents (Efron 1979): parts of one document are alike, so
    documents are drawn, not parts. They say how much the figure would move on other documents of the kind, nothing
    about other training seeds. With a single document there is no interval: low and high are NaN.
    """

    value: float
    low: float
    high: float
    difference: float | None = None
    """`value` less the full cache's on the same items; None where there is nothing to compare with."""
    difference_low: float | None = None
    difference_high: float | None = None
    """The interval of the difference is paired, so it is much narrower than the two intervals suggest."""
    count: int
    """Items that the mean is over."""

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON."""
        return asdict(self)


def score(
    values: Sequence[float],
    documents: Sequence[Hashable],
    baseline: Sequence[float] | None = None,
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> Score:
    """The mean of `values` with its interval, and its difference from the mean of `baseline`.

    Args:
        values: one for each item, such as a block of text or a question.
        documents: which document each item is from, `[items]`.
        baseline: the same items under the full cache.
        weights: of the items, such as their tokens; equal without.
        seed: of the resampling; the same seed draws the same documents for every arm.

    Raises:
        DepthKVError: no items, or lengths that differ.
    """
    for name, other in (("documents", documents), ("baseline values", baseline), ("weights", weights)):
        if other is not None and len(other) != len(values):
            raise DepthKVError(f"expected as many {name} as values, got {len(other)} and {len(values)}")
    if not values:
        raise DepthKVError("expected at least one value, got none")
    weight = torch.ones(len(values)) if weights is None else torch.tensor(list(weights))
    numbers = {name: i for i, name in enumerate(dict.fromkeys(documents))}
    index = torch.tensor([numbers[name] for name in documents])
    own = torch.tensor(list(values), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(numbers), (RESAMPLES, len(numbers)), generator=generator)

    def summed(items: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, index, items.double())

    def interval(items: torch.Tensor) -> tuple[float, float]:
        if len(numbers) == 1:
            return math.nan, math.nan
        means = summed(items * weight)[drawn].sum(1) / summed(weight)[drawn].sum(1)
        low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high

    def mean(items: torch.Tensor) -> float:
        return math.fsum((items * weight).tolist()) / math.fsum(weight.tolist())

    low, high = interval(own)
    if baseline is None:
        return Score(value=mean(own), low=low, high=high, count=len(values))
    apart = own - torch.tensor(list(baseline), dtype=torch.float64)
    apart_low, apart_high = interval(apart)
    return Score(
        value=mean(own),
        low=low,
        high=high,
        difference=mean(apart),
        difference_low=apart_low,
        difference_high=apart_high,
        count=len(values),
    )

"""A layer joins the leader whose keys and values are so near to its own that little would be lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from depthkv.adaptive.router import MadeRouter, Pair, Prompt
from depthkv.architectures import LayerKind
from depthkv.errors import DepthKVError, PlanError
from depthkv.sharing import share

__all__ = ["SimilarityRouter", "kv_distance", "passes", "similarity_router", "similarity_weights"]

POSITIONS = 64
"""Positions of the prompt that are compared."""

_PASSES = 5
"""Over the calibration prompts, to find the threshold: decisions change what later layers compute."""


def kv_distance(own: Pair, other: Pair, positions: torch.Tensor) -> torch.Tensor:
    """Squared distance of two pairs at some positions, relative to the first: of keys plus of values. A scalar.

    Both have the same rotation at each position, so that the rotary embedding does not count.
    """
    mine, theirs = _sampled(own, positions), _sampled(other, positions)
    return _distances(mine, (theirs[0].to(mine[0].device)[None], theirs[1].to(mine[1].device)[None]))[0]


def _sampled(pair: Pair, positions: torch.Tensor) -> Pair:
    at = positions.to(pair[0].device)
    return pair[0][:, at].float(), pair[1][:, positions.to(pair[1].device)].float()


def _distances(own: Pair, others: Pair) -> torch.Tensor:
    """`[leaders]`, of pairs of sampled positions, those of `others` with a dimension for the leaders in front."""
    parts = []
    for mine, theirs in zip(own, others, strict=True):
        squares = (theirs - mine).square().flatten(1).sum(dim=1)
        parts.append(squares / mine.square().sum().clamp(min=1e-12))
    return parts[0] + parts[1]


class SimilarityRouter(MadeRouter):
    """Joins the leader with the least `weights[layer, leader] x kv_distance`, where that is at most the threshold.

    Args:
        weights: `[layers, layers]`, what a unit of distance costs; see `similarity_router`.
        threshold: the larger, the more layers join.
        kinds: of the layers it was made for.
        order: for giving up leaders, see `Ladder`.
    """

    def __init__(
        self, weights: torch.Tensor, threshold: float, kinds: Sequence[LayerKind], order: Sequence[int] = ()
    ) -> None:
        super().__init__(kinds, order)
        self.weights = weights.double().cpu()
        self.threshold = threshold
        if self.weights.shape != (len(kinds), len(kinds)):
            raise PlanError(f"expected weights for {len(kinds)} layers, got shape {list(weights.shape)}")

    def source(self, layer: int, prompt: Prompt, own: Pair | None) -> int:
        assert own is not None
        leaders = prompt.leaders(layer)
        positions = prompt.positions(POSITIONS)
        samples: dict[int, Pair] = prompt.notes.setdefault("samples", {})
        for leader in leaders:
            if leader not in samples:
                samples[leader] = _sampled(prompt.pairs[leader], positions)
        mine = _sampled(own, positions)
        theirs = [torch.stack([samples[i][side].to(mine[side].device) for i in leaders]) for side in (0, 1)]
        # one difference of all leaders at once: many small ones would take longer than the layer
        distances = _distances(mine, (theirs[0], theirs[1]))
        prices = distances.double().cpu() * self.weights[layer, leaders]
        best = int(prices.argmin())
        return leaders[best] if prices[best] <= self.threshold or not prompt.may_lead else layer


def similarity_weights(distances: torch.Tensor, cost: torch.Tensor | None) -> torch.Tensor:
    """What a unit of distance costs, for each pair.

    Args:
        distances: mean over calibration prompts, `[layers, layers]`.
        cost: loss increase when only layer l reads j, nats, as `depthkv plan` measures it; without it every unit of
            distance costs the same.
    """
    if cost is None:
        return torch.ones_like(distances)
    # a pair that is better shared than not costs a little, so that the nearest of such pairs is taken
    least = 1e-4
    weights = cost.double().clamp(min=least) / distances.double().clamp(min=1e-6)
    return torch.where(torch.isfinite(cost), weights, torch.inf)


@torch.no_grad()
def similarity_router(
    model: Any,
    prompts: Sequence[torch.Tensor],
    retention: float,
    *,
    cost: torch.Tensor | None = None,
    order: Sequence[int] = (),
    advance: Callable[[int], None] = lambda done: None,
) -> SimilarityRouter:
    """A router that keeps `retention` of the layers on average over the prompts.

    Args:
        model: a causal language model of transformers, neither shared nor routed.
        prompts: token ids, each `[tokens]`, of text like that to come.
        retention: mean share of layers that keep a cache, above 0 and at most 1.
        cost: see `similarity_weights`.
        order: for giving up leaders.
        advance: called with 1 after each prompt that was read, `passes(...)` times in all.

    Raises:
        DepthKVError: no prompts, or a retention outside its range.
    """
    from depthkv.architectures import layer_kinds
    from depthkv.calibrate.probe import Probe

    if not prompts or not 0 < retention <= 1:
        raise DepthKVError(
            f"expected prompts and a retention above 0 and at most 1, got {len(prompts)} and {retention}"
        )
    kinds = layer_kinds(model.config)
    size = len(kinds)
    device = model.get_input_embeddings().weight.device
    recorded = torch.full((len(prompts), size, size), math.nan, dtype=torch.float64)
    with Probe(model) as probe:
        for number, tokens in enumerate(prompts):
            with probe.recording() as found:
                model(input_ids=tokens[None].to(device), logits_to_keep=1)
            pairs = {layer: (keys[0], values[0]) for layer, (keys, values) in found.pairs.items()}
            positions = Prompt(kinds=kinds, num_tokens=len(tokens)).positions(POSITIONS)
            for layer in range(size):
                for source in range(layer):
                    if kinds[source] == kinds[layer]:
                        recorded[number, layer, source] = kv_distance(pairs[layer], pairs[source], positions)
            advance(1)
    weights = similarity_weights(recorded.nanmean(dim=0).nan_to_num(1.0), cost)

    def kept(router: SimilarityRouter) -> float:
        leaders = 0
        with share(model, router) as handle:
            for tokens in prompts:
                model(input_ids=tokens[None].to(device), use_cache=False, logits_to_keep=1)
                leaders += sum(source == layer for layer, source in enumerate(handle.last_maps[0]))
                advance(1)
        return leaders / (size * len(prompts))

    # a first guess from what every layer computes on its own, then by what happens
    priced = (recorded * weights).nan_to_num(torch.inf).amin(dim=2)[:, 1:].flatten()
    finite = priced[priced.isfinite()].sort().values
    low, high = 0.0, float(finite[-1]) * 2 if len(finite) else 1.0
    guess = float(finite[min(len(finite) - 1, round((1 - retention) * len(finite)))]) if len(finite) else 0.0
    best: tuple[float, SimilarityRouter] | None = None
    for _ in range(_PASSES):
        router = SimilarityRouter(weights, guess, kinds, order)
        share_kept = kept(router)
        if best is None or abs(share_kept - retention) < best[0]:
            best = (abs(share_kept - retention), router)
        if share_kept > retention:
            low = guess
        else:
            high = guess
        # the geometric mean: distances spread over orders of magnitude
        guess = math.sqrt(max(low, high / 100) * high)
    assert best is not None
    return best[1]


def passes(num_prompts: int) -> int:
    """How many prompts `similarity_router` reads."""
    return num_prompts * (_PASSES + 1)

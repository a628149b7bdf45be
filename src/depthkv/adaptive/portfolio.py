"""One of several plans for each input, by the loss that each is expected to have on it and the bytes that it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from depthkv.adaptive.features import NUM_STATISTICS, prompt_features
from depthkv.adaptive.router import MadeRouter, Pair, Prompt, Router
from depthkv.architectures import LayerKind
from depthkv.errors import DepthKVError, PlanError
from depthkv.plan import SharingPlan
from depthkv.sharing import share

__all__ = ["PortfolioRouter", "decision_layer", "fit_portfolio", "portfolio_features"]

_PENALTIES = tuple(10.0**exponent for exponent in range(-1, 6))
"""Of the ridge regression that are tried."""


class PortfolioRouter(MadeRouter):
    """Takes the plan with the least `predicted loss + price x retention`.

    The prediction is linear in features of the prompt after the layers in which the plans agree: how often the prompt
    repeats itself, and its pooled hidden state. So difficult prompts, where fewer layers would cost much, get more.

    Args:
        plans: of any sizes.
        weights: `[plans, features]`, nats; the first feature is 1.
        center: `[features - 1]`, subtracted from the features.
        scale: `[features - 1]`, by which they are divided then.
        price: nats for keeping all layers instead of none.
        kinds: of the layers.
        order: for giving up leaders, see `Ladder`.
    """

    needs_kv = False

    def __init__(
        self,
        plans: Sequence[SharingPlan],
        weights: torch.Tensor,
        center: torch.Tensor,
        scale: torch.Tensor,
        price: float,
        kinds: Sequence[LayerKind],
        order: Sequence[int] = (),
    ) -> None:
        super().__init__(kinds, order, center.numel() - NUM_STATISTICS)
        self.plans, self.weights, self.center, self.scale = tuple(plans), weights, center, scale
        self.price = price
        if (
            not plans
            or center.ndim != 1
            or weights.shape != (len(plans), len(center) + 1)
            or scale.shape != center.shape
        ):
            raise PlanError(f"expected weights of {len(plans)} plans and {len(center) + 1} features, got other shapes")
        self.decides_at = decision_layer(plans)
        self._retentions = torch.tensor([plan.retention for plan in plans], dtype=torch.float64)

    def source(self, layer: int, prompt: Prompt, own: Pair | None) -> int:
        if layer < self.decides_at:
            return self.plans[0].kv_source_layers[layer]
        if layer == self.decides_at:
            assert prompt.hidden is not None
            prompt.notes["plan"] = self.choose(prompt_features(prompt.tokens, prompt.hidden))
        chosen: int = prompt.notes["plan"]
        return self.plans[chosen].kv_source_layers[layer]

    def predicted(self, features: torch.Tensor) -> torch.Tensor:
        """Loss of each plan, nats, `[..., plans]`, from features `[..., features - 1]`."""
        normed = (features.double() - self.center) / self.scale
        return self.weights[:, 0] + normed @ self.weights[:, 1:].T

    def choose(self, features: torch.Tensor) -> int:
        """Index of the plan for features `[features - 1]`."""
        return int((self.predicted(features) + self.price * self._retentions).argmin())


def decision_layer(plans: Sequence[SharingPlan]) -> int:
    """The first layer in which not all plans agree; the last layer where they are all the same."""
    columns = zip(*(plan.kv_source_layers for plan in plans), strict=True)
    return next((layer for layer, column in enumerate(columns) if len(set(column)) > 1), plans[0].num_layers - 1)


def fit_portfolio(
    plans: Sequence[SharingPlan],
    losses: torch.Tensor,
    features: torch.Tensor,
    retention: float,
    kinds: Sequence[LayerKind],
    order: Sequence[int] = (),
) -> PortfolioRouter:
    """Ridge regression of each plan's loss, and the price at which the mean retention is at most `retention`.

    Features: `portfolio_features`. The penalty of the regression is the one whose choices, each made without the input
    that it is for, cost least.

    Args:
        plans: candidates.
        losses: of each plan on each calibration input, nats, `[inputs, plans]`.
        features: of the same inputs, `[inputs, features]`, see `portfolio_features`.
        retention: mean share of the layers that may keep a cache.
        kinds: of the layers.
        order: for giving up leaders.

    Raises:
        DepthKVError: fewer than two inputs, or no plan that is small enough.
    """
    if len(losses) < 2 or losses.shape != (len(features), len(plans)):
        raise DepthKVError(f"expected losses of {len(plans)} plans on two inputs or more, got {list(losses.shape)}")
    shares = torch.tensor([plan.retention for plan in plans], dtype=torch.float64)
    if float(shares.min()) > retention + 1e-9:
        raise DepthKVError(
            f"expected a plan of at most {retention:.0%} of the layers, got none below {shares.min():.0%}"
        )
    x, y = features.double(), losses.double()
    center, scale = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    x = (x - center) / scale
    best: tuple[float, float, torch.Tensor] | None = None
    for penalty in _PENALTIES:
        weights, left_out = _ridge(x, y, penalty)
        price = _price(left_out, shares, retention)
        chosen = (left_out + price * shares).argmin(dim=1)
        # what counts is what is chosen, not how near the predictions are
        loss = float(y.gather(1, chosen[:, None]).mean())
        if best is None or loss < best[0]:
            best = (loss, price, weights)
    assert best is not None
    return PortfolioRouter(plans, best[2], center, scale, best[1], kinds, order)


def _price(predicted: torch.Tensor, shares: torch.Tensor, retention: float) -> float:
    """The least price at which the plans that are chosen keep at most `retention` on average."""

    def mean_retention(price: float) -> float:
        return float(shares[(predicted + price * shares).argmin(dim=1)].mean())

    if mean_retention(0.0) <= retention + 1e-9:
        return 0.0
    low, high = 0.0, 1.0
    while mean_retention(high) > retention + 1e-9:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_retention(middle) > retention + 1e-9 else (low, middle)
    return high


def _ridge(x: torch.Tensor, y: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `[plans, 1 + features]`, and what is predicted for each input by weights fitted without it.

    Args:
        x: features with a mean of 0.
        y: losses.
        penalty: on the squared weights.
    """
    number, mean = len(x), y.mean(dim=0)
    kernel = x @ x.T
    inverse = torch.linalg.inv(kernel + penalty * torch.eye(number, dtype=x.dtype))
    # leaving one out in closed form (Hastie et al., The Elements of Statistical Learning, section 7.10)
    hat = kernel @ inverse + 1 / number
    left_out = y - (y - mean - hat @ (y - mean)) / (1 - hat.diagonal())[:, None]
    return torch.cat([mean[:, None], (x.T @ inverse @ (y - mean)).T], dim=1), left_out


@torch.no_grad()
def portfolio_features(
    model: Any,
    plans: Sequence[SharingPlan],
    prompts: Sequence[torch.Tensor],
    advance: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Features of each prompt where the plans part, `[prompts, features]`."""
    from depthkv.architectures import layer_kinds

    collector = _Collector(plans, layer_kinds(model.config))
    device = model.get_input_embeddings().weight.device
    with share(model, collector):
        for tokens in prompts:
            model(input_ids=tokens[None].to(device), use_cache=False, logits_to_keep=1)
            advance(1)
    return torch.stack(collector.features)


class _Collector(Router):
    """Takes the first plan, and notes what the decision would be made on."""

    needs_kv = False

    def __init__(self, plans: Sequence[SharingPlan], kinds: Sequence[LayerKind]) -> None:
        self.plan, self.decides_at = plans[0], decision_layer(plans)
        self.features: list[torch.Tensor] = []

    def source(self, layer: int, prompt: Prompt, own: Pair | None) -> int:
        if layer == self.decides_at:
            assert prompt.hidden is not None
            self.features.append(prompt_features(prompt.tokens, prompt.hidden).double())
        return self.plan.kv_source_layers[layer]

"""Similarity of layers' keys and values from one pass over text, by second moments that are summed as the text goes by.

For each KV head h the moments of all layers' features together are kept, `[layers x head_dim, layers x head_dim]`: what
a follower's head h could read is its source's head h, so other heads need not be compared. Nothing grows with the text.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

RIDGE = 1e-3
"""Of the ridge regression: times the mean variance of the source's features."""

SUMS = ("count", "shift", "sums", "products", "cosines")
"""Attributes of `Moments` that grow with the text."""


class Moments:
    """Of one quantity, such as keys before the rotary embedding, in all layers of one kind."""

    def __init__(self, num_layers: int, num_heads: int, head_dim: int, device: torch.device | str = "cpu") -> None:
        size = num_layers * head_dim
        self.shape = (num_layers, num_heads, head_dim)
        self.count = torch.zeros((), dtype=torch.float64)
        self.shift = torch.zeros(num_heads, size, device=device)
        """Mean over the first batch: keys have large means, and moments about zero would drown the variance in fp32."""
        self.sums = torch.zeros(num_heads, size, dtype=torch.float64, device=device)
        self.products = torch.zeros(num_heads, size, size, device=device)
        self.cosines = torch.zeros(num_heads, num_layers, num_layers, dtype=torch.float64, device=device)

    def add(self, features: torch.Tensor) -> None:
        """Take in `[tokens, layers, heads, head_dim]`."""
        tokens, layers, heads, head_dim = features.shape
        by_head = features.float().permute(2, 0, 1, 3)  # [heads, tokens, layers, head_dim]
        flat = by_head.reshape(heads, tokens, layers * head_dim)
        if self.count == 0:
            self.shift = flat.mean(dim=1)
        moved = flat - self.shift[:, None]
        self.sums += moved.sum(dim=1, dtype=torch.float64)
        self.products += moved.transpose(1, 2) @ moved
        unit = torch.nn.functional.normalize(by_head, dim=-1)
        self.cosines += torch.einsum("htid,htjd->hij", unit, unit).double()
        self.count += tokens

    def state(self) -> dict[str, torch.Tensor]:
        """Everything summed so far, for a file."""
        return {name: getattr(self, name).cpu().contiguous() for name in SUMS}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `state`."""
        for name, value in state.items():
            setattr(self, name, value.to(getattr(self, name).device))

    def similarities(self) -> dict[str, torch.Tensor]:
        """By measure, for each head and over all of them: `[1 + heads, layers, layers]`, entry [0] is the aggregate and
        [:, l, j] compares reader l with source j.

        `cka`: linear centred kernel alignment (arXiv:1905.00414), the aggregate is the mean over the heads. `cosine`:
        mean over tokens. `r2`: variance of layer l's features that a ridge regression from layer j's explains.
        `squared_distance`: mean over tokens of the squared Euclidean distance, summed over the heads in the aggregate.
        """
        heads = self.shape[1]
        found = [self._of_head(head) for head in range(heads)]  # one at a time: all would take several times the sums
        cka, explained, distance = (torch.stack([entry[i] for entry in found]) for i in range(3))
        variance = torch.stack([entry[3] for entry in found])  # [heads, layers]
        cosine = self.cosines / self.count.to(self.cosines.device)
        total = explained.sum(0) / variance.sum(0)[:, None]
        return {
            "cka": _with_aggregate(cka, cka.mean(0)),
            "cosine": _with_aggregate(cosine, cosine.mean(0)),
            "r2": _with_aggregate(explained / variance[:, :, None], total),
            "squared_distance": _with_aggregate(distance, distance.sum(0)),
        }

    def _of_head(self, head: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """CKA, explained variance and squared distance, each `[layers, layers]`, and variance `[layers]`, in fp64."""
        layers, _, head_dim = self.shape
        count = self.count.to(self.sums.device)
        moved = self.sums[head] / count
        covariance = self.products[head].double() / count - moved[:, None] * moved[None, :]
        covariance = covariance.view(layers, head_dim, layers, head_dim).transpose(1, 2)  # [layers, layers, d, d]
        means = (moved + self.shift[head].double()).view(layers, head_dim)
        own = covariance.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
        variance = own.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-30)
        norms = own.flatten(1).norm(dim=-1).clamp(min=1e-30)
        cka = covariance.flatten(2).norm(dim=-1) ** 2 / (norms[:, None] * norms[None, :])
        explained = torch.zeros_like(cka)
        for j in range(layers):
            ridge = RIDGE * (variance[j] / head_dim).clamp(min=1e-12)
            to_reader = covariance[j]  # of source features with each reader's, [layers, d_source, d_reader]
            weights = torch.linalg.solve(
                own[j] + ridge * torch.eye(head_dim, dtype=own.dtype, device=own.device), to_reader
            )
            explained[:, j] = 2 * (weights * to_reader).sum((-2, -1)) - (weights * (own[j] @ weights)).sum((-2, -1))
        apart = (means[:, None] - means[None, :]).square().sum(-1)
        cross = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        distance = (variance[:, None] + variance[None, :] - 2 * cross + apart).clamp(min=0)
        return cka, explained, distance, variance


def _with_aggregate(by_head: torch.Tensor, aggregate: torch.Tensor) -> torch.Tensor:
    """`[1 + heads, layers, layers]`."""
    return torch.cat([aggregate[None], by_head]).cpu()

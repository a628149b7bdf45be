"""What training minimises. Each objective is one small class: `bound(model, dtype)` gives the loss of a batch.

The teacher of a distillation is the model with every layer's own cache: the text's own next token says which word was
right, the teacher says how right the others would have been.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from depthkv.adapt.loss import Batch, LossFunction, next_token_loss, predicted
from depthkv.adapt.teacher import Teacher, recorded_outputs
from depthkv.decoder import find_decoder
from depthkv.errors import DepthKVError
from depthkv.head import headless, plain_head

_CHUNK_ELEMENTS = 2**24
"""Logits of one chunk: 64 MB in fp32."""


class Objective(Protocol):
    """Something to minimise."""

    def bound(self, model: nn.Module, dtype: torch.dtype) -> AbstractContextManager[LossFunction]:
        """A function from a batch to its mean loss per predicted token, nats; on exit the model is as before.

        Args:
            model: a causal language model, routed or about to be.
            dtype: of the matrix products of the head.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LanguageModelLoss:
    """The plain loss of the paper: predict the text's next token."""

    def bound(self, model: nn.Module, dtype: torch.dtype) -> AbstractContextManager[LossFunction]:
        """See `Objective.bound`."""
        return next_token_loss(model, dtype)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """`weight * KL(teacher || routed model) + (1 - weight) * language-model loss`.

    The teacher's distribution is its `top_k` likeliest tokens and one bucket for all others, so a teacher can be stored
    (`top_k` numbers a token instead of a vocabulary) and the loss needs no second soft-max over it.
    """

    teacher: Teacher
    top_k: int = 32
    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise DepthKVError(f"expected top_k of at least 1, got {self.top_k}")
        if not 0 <= self.weight <= 1:
            raise DepthKVError(f"expected a weight between 0 and 1, got {self.weight}")
        if not self.temperature > 0:
            raise DepthKVError(f"expected a temperature above 0, got {self.temperature}")

    @contextmanager
    def bound(self, model: nn.Module, dtype: torch.dtype) -> Iterator[LossFunction]:
        """See `Objective.bound`."""
        head = plain_head(model)
        if head is None:
            raise DepthKVError(
                "expected a model whose logits are its linear head's result for distillation, got one that caps, "
                "scales or adapts them"
            )
        vocabulary = head.out_features

        def piece(
            hidden: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            targets: torch.Tensor,
            known: torch.Tensor,
            index: torch.Tensor,
        ) -> torch.Tensor:
            with torch.autocast(hidden.device.type, enabled=False):
                low = None if bias is None else bias.to(dtype)
                scores = linear(hidden.to(dtype), weight.to(dtype), low).float()
                text = (scores.logsumexp(-1) - scores.gather(1, targets[:, None]).squeeze(1)).sum()
                scores = scores / self.temperature
                ours = scores.gather(1, index) - scores.logsumexp(-1, keepdim=True)
                return (1 - self.weight) * text + self.weight * self.temperature**2 * _bucketed_kl(known, ours)

        def loss(batch: Batch) -> torch.Tensor:
            rows, targets = predicted(batch)
            known, index = self.teacher.top(batch, self.top_k, self.temperature)
            known, index = known.flatten(0, 1)[rows], index.flatten(0, 1)[rows]
            hidden = last_hidden(batch).flatten(0, 1)[rows]
            chunk = max(1, _CHUNK_ELEMENTS // vocabulary)
            total = hidden.new_zeros((), dtype=torch.float32)
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                # the chunk's logits are computed again in backward instead of being kept
                arguments = (hidden[part], head.weight, head.bias, targets[part], known[part], index[part])
                total = total + checkpoint(piece, *arguments, use_reentrant=False)
            return total / max(1, len(hidden))

        with self.teacher.of(model), headless(model, head) as last_hidden:
            yield loss


@dataclass(frozen=True, kw_only=True)
class AttentionMatching:
    """Language-model loss plus `weight` times the mean relative error of the layers' attention outputs.

    Layer by layer: `|routed - teacher|^2 / |teacher|^2` of what attention adds to the residual stream.
    """

    teacher: Teacher
    weight: float = 1.0

    @contextmanager
    def bound(self, model: nn.Module, dtype: torch.dtype) -> Iterator[LossFunction]:
        """See `Objective.bound`."""
        decoder = find_decoder(model)
        modules = [decoder.attention(layer) for layer in range(decoder.num_layers)]

        def loss(batch: Batch) -> torch.Tensor:
            expected = self.teacher.attention_outputs(batch)
            with recorded_outputs(modules) as outputs:
                text = text_loss(batch)
            errors = [relative_error(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True)]
            return text + self.weight * torch.stack(errors).mean()

        with self.teacher.of(model), next_token_loss(model, dtype) as text_loss:
            yield loss


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """`|ours - theirs|^2 / |theirs|^2`, fp32."""
    theirs = theirs.float()
    return (ours.float() - theirs).square().sum() / theirs.square().sum().clamp(min=1e-12)


def _bucketed_kl(known: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """KL of two distributions given by log probabilities `[rows, k]` of k tokens; the rest is one bucket. Sum."""
    inside = (known.exp() * (known - ours)).sum()
    rest_known, rest_ours = (torch.log1p(-log.exp().sum(-1).clamp(max=1 - 1e-6)) for log in (known, ours))
    return inside + (rest_known.exp() * (rest_known - rest_ours)).sum()

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

from depthkv.adapt.loss import Batch, LossFunction, SoftTargets, next_token_loss, predicted
from depthkv.adapt.teacher import Teacher, recorded_outputs
from depthkv.decoder import find_decoder
from depthkv.errors import DepthKVError
from depthkv.head import undistributed

__all__ = ["AttentionMatching", "Distillation", "LanguageModelLoss", "Objective"]


class Objective(Protocol):
    """Something to minimise."""

    def bound(self, model: nn.Module, dtype: torch.dtype) -> AbstractContextManager[LossFunction]:
        """A function from a batch to its mean loss per predicted token, nats; on exit the model is as before.

        Args:
            model: a causal language model, routed or about to be; perhaps wrapped by DistributedDataParallel.
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
    (`top_k` numbers a token instead of a vocabulary), and at temperature 1 the loss needs no second soft-max over it.
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

        def loss(batch: Batch) -> torch.Tensor:
            rows, _ = predicted(batch)
            known, tokens = self.teacher.top(batch, self.top_k, self.temperature)
            soft = SoftTargets(
                log_probabilities=known.flatten(0, 1)[rows],
                tokens=tokens.flatten(0, 1)[rows],
                weight=self.weight,
                temperature=self.temperature,
            )
            return mixed_loss(batch, soft)

        with self.teacher.of(undistributed(model)), next_token_loss(model, dtype) as mixed_loss:
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
        decoder = find_decoder(undistributed(model))
        modules = [decoder.attention(layer) for layer in range(decoder.num_layers)]

        def loss(batch: Batch) -> torch.Tensor:
            expected = self.teacher.attention_outputs(batch)
            with recorded_outputs(modules) as outputs:
                text = text_loss(batch)
            errors = [
                relative_error(_visible(ours, batch), _visible(theirs, batch))
                for ours, theirs in zip(outputs, expected, strict=True)
            ]
            return text + self.weight * torch.stack(errors).mean()

        with self.teacher.of(undistributed(model)), next_token_loss(model, dtype) as text_loss:
            yield loss


def _visible(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The rows of `[batch, tokens, hidden_size]` that are no padding: what pad tokens attend to means nothing."""
    mask = batch.get("attention_mask")
    return outputs if mask is None else outputs[mask.bool().to(outputs.device)]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """`|ours - theirs|^2 / |theirs|^2`, fp32."""
    theirs = theirs.float()
    return (ours.float() - theirs).square().sum() / theirs.square().sum().clamp(min=1e-12)

"""Next-token cross entropy without ever holding the logits of a whole batch.

With a vocabulary of 49k, the logits of 4 x 512 tokens take 400 MB in fp32, their gradient as much again. Here a chunk
of rows goes through the head, its loss and its gradient are taken at once, and the buffers serve the next chunk. The
result is the same sum: no approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from depthkv.head import headless, plain_head

_CHUNK_ELEMENTS = 2**25
"""Logits of one chunk: 128 MB in fp32. Larger is no faster, smaller makes thin matrix products."""
_ADD_ROWS = 2048

Batch = Mapping[str, torch.Tensor]
"""`input_ids` `[batch, tokens]`; perhaps `labels` of the same shape (-100 = not predicted) and `attention_mask`."""
LossFunction = Callable[[Batch], torch.Tensor]


class NextTokenLoss(Protocol):
    """A `LossFunction` that can take a teacher's word into account."""

    def __call__(self, batch: Batch, soft: SoftTargets | None = None) -> torch.Tensor:
        """Mean loss; the rows of `soft` are those of `predicted`."""
        ...


@dataclass(frozen=True, kw_only=True)
class SoftTargets:
    """What a teacher expects at each row: its likeliest tokens, and one bucket for all others.

    The loss becomes `(1 - weight) * cross entropy + weight * temperature^2 * KL(teacher || model)`.
    """

    log_probabilities: torch.Tensor
    """`[rows, k]`, of the teacher at `temperature`."""
    tokens: torch.Tensor
    """`[rows, k]`, ids without repetition in a row."""
    weight: float
    temperature: float

    def rows(self, part: slice) -> SoftTargets:
        """The same for some rows."""
        return replace(self, log_probabilities=self.log_probabilities[part], tokens=self.tokens[part])

    def divergence(self, ours: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """KL of each row, and by how much the teacher's rest exceeds ours (a ratio), both `[rows, 1]`.

        Args:
            ours: the model's log probabilities of `tokens`, at `temperature`.
        """
        known = self.log_probabilities.to(ours.dtype)
        inside = (known.exp() * (known - ours)).sum(-1, keepdim=True)
        rest, our_rest = ((1 - log.exp().sum(-1, keepdim=True)).clamp(min=1e-6) for log in (known, ours))
        return inside + rest * (rest.log() - our_rest.log()), rest / our_rest

    def to(self, device: torch.device) -> SoftTargets:
        """The same on another device."""
        known, tokens = self.log_probabilities.to(device), self.tokens.to(device)
        return replace(self, log_probabilities=known, tokens=tokens)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of `hidden @ weight.T + bias`; gradients are computed in forward, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        dtype: torch.dtype,
        soft: SoftTargets | None,
    ) -> torch.Tensor:
        rows, vocabulary = max(1, hidden.shape[0]), weight.shape[0]  # a batch may predict nothing: loss 0
        text = 1.0 if soft is None else 1 - soft.weight
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        chunk = -(-rows // -(-rows * vocabulary // _CHUNK_ELEMENTS))  # equal chunks
        with torch.autocast(hidden.device.type, enabled=False):
            hidden_low, weight_low = hidden.detach().to(dtype), weight.detach().to(dtype)
            wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            loss = torch.zeros((), dtype=wide_dtype, device=hidden.device)
            grad_hidden = torch.empty_like(hidden_low) if needs_hidden else None
            grad_weight = torch.zeros_like(weight) if needs_weight else None
            product = torch.empty_like(weight_low) if needs_weight else None
            grad_bias = torch.zeros_like(bias) if needs_bias and bias is not None else None
            low = hidden_low.new_empty(chunk, vocabulary)
            wide = low if dtype == wide_dtype else torch.empty_like(low, dtype=wide_dtype)
            for start in range(0, len(hidden), chunk):
                some = hidden_low[start : start + chunk]
                index = targets[start : start + chunk, None]
                logits, scores = low[: len(some)], wide[: len(some)]
                torch.mm(some, weight_low.T, out=logits)
                if bias is not None:
                    logits += bias.detach()
                if scores is not logits:
                    scores.copy_(logits)
                largest = scores.amax(dim=-1, keepdim=True)
                target_scores = scores.gather(1, index)
                if soft is not None:
                    few = soft.rows(slice(start, start + chunk))
                    few_scores = scores.gather(1, few.tokens)
                total = scores.sub_(largest).exp_().sum(dim=-1, keepdim=True)
                loss += text * (total.log() + largest - target_scores).sum()
                # scores becomes the gradient: (softmax - one at the target) / rows
                if soft is None:
                    scores.mul_((1 / rows) / total)
                else:
                    loss += _add_soft_gradient(scores, total, few, few_scores - largest, rows)
                scores.scatter_add_(1, index, scores.new_full((len(some), 1), -text / rows))
                if grad_bias is not None:
                    grad_bias += scores.sum(dim=0)
                if scores is not logits:
                    logits.copy_(scores)
                if grad_hidden is not None:
                    torch.mm(logits, weight_low, out=grad_hidden[start : start + chunk])
                if grad_weight is not None and product is not None:
                    torch.mm(logits.T, some, out=product)
                    # in pieces: adding bf16 to fp32 makes an fp32 copy, which then stays in the processor's cache
                    for first in range(0, vocabulary, _ADD_ROWS):
                        grad_weight[first : first + _ADD_ROWS] += product[first : first + _ADD_ROWS]
        ctx.gradients = [grad_hidden.to(hidden.dtype) if grad_hidden is not None else None, grad_weight, grad_bias]
        return loss / rows

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> Any:
        gradients = ctx.gradients
        del ctx.gradients  # in place below, so once only
        return *(g if g is None else g.mul_(grad_loss) for g in gradients), None, None, None


def _add_soft_gradient(
    scores: torch.Tensor, total: torch.Tensor, soft: SoftTargets, few_scores: torch.Tensor, rows: int
) -> torch.Tensor:
    """Turn `scores`, which are exponentials that add up to `total`, into the gradient but for the text's own tokens.

    With q the model's soft-max at the temperature, p the teacher's and r the ratio of their rests, the KL's gradient is
    q - p at the teacher's likeliest tokens and q - r q at all others.

    Args:
        few_scores: logits at the teacher's tokens, less the largest of the row.
        rows: of the whole batch.

    Returns:
        The sum of what the rows add to the loss.
    """
    temperature, weight = soft.temperature, soft.weight
    # at temperature 1 one soft-max serves both parts
    warm = scores if temperature == 1 else scores.pow(1 / temperature)
    warm_total = total if temperature == 1 else warm.sum(dim=-1, keepdim=True)
    ours = few_scores / temperature - warm_total.log()
    kl, ratio = soft.divergence(ours)
    pull = weight * temperature / rows
    if warm is scores:
        scores.mul_(((1 - weight) / rows + pull * (1 - ratio)) / total)
    else:
        scores.mul_((1 - weight) / rows / total).addcmul_(warm, pull * (1 - ratio) / warm_total)
    scores.scatter_add_(1, soft.tokens, pull * (ratio * ours.exp() - soft.log_probabilities.to(ours.dtype).exp()))
    return weight * temperature**2 * kl.sum()


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    dtype: torch.dtype | None = None,
    soft: SoftTargets | None = None,
) -> torch.Tensor:
    """Mean cross entropy in nats of a linear head, equal to `cross_entropy(linear(hidden, weight, bias), targets)`.

    Args:
        hidden: `[rows, hidden_size]`.
        weight: `[vocabulary, hidden_size]`; `bias` is `[vocabulary]` or None.
        targets: `[rows]`, token ids.
        dtype: of the matrix products; None takes the weight's. Soft-max and loss are in fp32 (fp64 for fp64).
        soft: a teacher's word, mixed with `targets`.

    Returns:
        A scalar, 0 without rows, that can be differentiated once.
    """
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, dtype or weight.dtype, soft
    )
    return loss


def predicted(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions of `[batch * tokens]` predict a token, as indices, and the tokens that they predict."""
    tokens = batch["input_ids"]
    labels = batch.get("labels", tokens)
    following = torch.full_like(labels, -100)
    following[:, :-1] = labels[:, 1:]
    if "attention_mask" in batch:
        # also no label beside a pad token on the left, and none for a pad token on the right
        visible = batch["attention_mask"].bool()
        following[:, :-1][~(visible[:, :-1] & visible[:, 1:])] = -100
    following = following.flatten()
    rows = (following != -100).nonzero().squeeze(1)
    return rows, following[rows]


@contextmanager
def next_token_loss(model: nn.Module, dtype: torch.dtype) -> Iterator[NextTokenLoss]:
    """A function from a batch to the mean loss of predicting each token from those before it.

    Where the model gives out its linear head's result unchanged, the head hands over its input and the loss is taken in
    chunks; otherwise (soft-capped or scaled logits, an adapter on the head) from the model's own logits. On exit the
    head is as before.
    """
    head = plain_head(model)
    if head is None:

        def from_logits(batch: Batch, soft: SoftTargets | None = None) -> torch.Tensor:
            rows, targets = predicted(batch)
            given = {name: value for name, value in batch.items() if name != "labels"}
            logits = model(**given, use_cache=False).logits.flatten(0, 1)[rows].float()
            total = cross_entropy(logits, targets.to(logits.device), reduction="sum")
            if soft is not None:
                soft = soft.to(logits.device)
                kl, _ = soft.divergence((logits / soft.temperature).log_softmax(-1).gather(1, soft.tokens))
                total = (1 - soft.weight) * total + soft.weight * soft.temperature**2 * kl.sum()
            return total / max(1, len(rows))

        yield from_logits
        return

    def from_hidden(batch: Batch, soft: SoftTargets | None = None) -> torch.Tensor:
        rows, targets = predicted(batch)
        hidden = last_hidden(batch).flatten(0, 1)[rows]
        soft = None if soft is None else soft.to(hidden.device)
        return chunked_cross_entropy(hidden, head.weight, head.bias, targets.to(hidden.device), dtype, soft)

    with headless(model, head) as last_hidden:
        yield from_hidden

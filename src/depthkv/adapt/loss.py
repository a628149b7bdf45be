"""Next-token cross entropy without ever holding the logits of a whole batch.

With a vocabulary of 49k, the logits of 4 x 512 tokens take 400 MB in fp32, their gradient as much again. Here a chunk
of rows goes through the head, its loss and its gradient are taken at once, and the buffers serve the next chunk. The
result is the same sum: no approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
    ) -> torch.Tensor:
        rows, vocabulary = hidden.shape[0], weight.shape[0]
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
            for start in range(0, rows, chunk):
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
                total = scores.sub_(largest).exp_().sum(dim=-1, keepdim=True)
                loss += (total.log() + largest - target_scores).sum()
                # scores becomes the gradient: (softmax - one at the target) / rows
                scores.mul_((1 / rows) / total)
                scores.scatter_add_(1, index, scores.new_full((len(some), 1), -1 / rows))
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
        return *(g if g is None else g.mul_(grad_loss) for g in gradients), None, None


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Mean cross entropy in nats of a linear head, equal to `cross_entropy(linear(hidden, weight, bias), targets)`.

    Args:
        hidden: `[rows, hidden_size]`.
        weight: `[vocabulary, hidden_size]`; `bias` is `[vocabulary]` or None.
        targets: `[rows]`, token ids.
        dtype: of the matrix products; None takes the weight's. Soft-max and loss are in fp32 (fp64 for fp64).

    Returns:
        A scalar that can be differentiated once.
    """
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, dtype or weight.dtype)  # type: ignore[no-untyped-call]
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
def next_token_loss(model: nn.Module, dtype: torch.dtype) -> Iterator[LossFunction]:
    """A function from a batch to the mean loss of predicting each token from those before it.

    Where the model gives out its linear head's result unchanged, the head hands over its input and the loss is taken in
    chunks; otherwise (soft-capped or scaled logits, an adapter on the head) from the model's own logits. On exit the
    head is as before.
    """
    head = plain_head(model)
    if head is None:

        def from_logits(batch: Batch) -> torch.Tensor:
            rows, targets = predicted(batch)
            given = {name: value for name, value in batch.items() if name != "labels"}
            logits = model(**given, use_cache=False).logits.flatten(0, 1)
            return cross_entropy(logits[rows].float(), targets.to(logits.device))

        yield from_logits
        return

    def from_hidden(batch: Batch) -> torch.Tensor:
        rows, targets = predicted(batch)
        hidden = last_hidden(batch).flatten(0, 1)[rows]
        return chunked_cross_entropy(hidden, head.weight, head.bias, targets.to(hidden.device), dtype)

    with headless(model, head) as last_hidden:
        yield from_hidden

"""Perplexity of blocks of tokens, under whatever plan is active, and the retention curve over several plans.

The logits of a whole batch never exist at once: with a vocabulary of 49k, those of 4 x 512 tokens take 400 MB in fp32.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from depthkv.errors import DataError, DepthKVError
from depthkv.head import headless, plain_head
from depthkv.memory import kv_bytes_per_token
from depthkv.plan import SharingPlan
from depthkv.sharing import share

_CHUNK_ELEMENTS = 2**24
"""Logits of one chunk: 64 MB in fp32."""

Progress = Callable[[int], None]
"""Called after each batch with the number of blocks that it held."""

_TokenLosses = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a model predicts each token of a block from those before it in the block."""

    loss: float
    """Mean over all predicted tokens, nats."""
    num_tokens: int
    """Predicted tokens: all but the first of each block."""
    block_losses: tuple[float, ...]
    """One mean per block, nats per token."""

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return _exp(self.loss)


@dataclass(frozen=True, kw_only=True)
class CurveRow:
    """One point of the retention curve."""

    retention: float
    """Share of the layers that keep a cache."""
    leaders: tuple[int, ...]
    """Layers that keep a cache."""
    loss: float
    """Nats per token."""
    perplexity: float
    kv_bytes_per_token: int
    """Bytes that one more token adds to the cache."""

    def to_dict(self) -> dict[str, Any]:
        """A row of `evaluate --json`."""
        return asdict(self) | {"leaders": list(self.leaders)}


def perplexity(
    model: nn.Module, blocks: torch.Tensor, *, batch_size: int = 4, progress: Progress | None = None
) -> Perplexity:
    """Loss and perplexity under whatever `share()` is active. The model is put into evaluation mode meanwhile.

    Soft-max and loss are taken in fp32. The same blocks, model and batch size give the same result.

    Args:
        model: a causal language model of transformers.
        blocks: token ids, `[blocks, tokens]`, from `depthkv.data.token_blocks`.
        batch_size: blocks in one forward.
        progress: called after each batch.

    Raises:
        DataError: no blocks, blocks of fewer than two tokens, or ids outside the vocabulary.
        DepthKVError: a loss that is not finite, as fp16 overflow gives.
    """
    _check_blocks(model, blocks, batch_size)
    device = next(model.get_input_embeddings().parameters()).device  # type: ignore[operator]
    training = model.training
    model.eval()
    means: list[float] = []
    try:
        with torch.no_grad(), _token_losses(model) as token_losses:
            for start in range(0, len(blocks), batch_size):
                batch = blocks[start : start + batch_size]
                means += token_losses(batch.to(device)).double().mean(dim=1).tolist()
                if progress is not None:
                    progress(len(batch))
    finally:
        model.train(training)
    # blocks are of equal length, so the mean of their means is the mean over tokens
    loss = statistics.fmean(means)
    if not math.isfinite(loss):
        raise DepthKVError(f"expected a finite loss, got {loss}; try dtype float32 or bfloat16")
    return Perplexity(loss=loss, num_tokens=blocks.shape[0] * (blocks.shape[1] - 1), block_losses=tuple(means))


def retention_curve(
    model: nn.Module,
    blocks: torch.Tensor,
    plans: Sequence[SharingPlan],
    *,
    batch_size: int = 4,
    kv_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> list[CurveRow]:
    """One row per plan, in their order, each measured under `share(model, plan)`. Equal plans are measured once.

    Args:
        model: neither shared nor routed.
        blocks: as for `perplexity`.
        plans: for as many layers as the model has.
        batch_size: blocks in one forward.
        kv_dtype: of the cache, for `kv_bytes_per_token`; None is the model's.
        progress: called after each batch, with blocks, for each plan in turn.

    Raises:
        PlanError: a plan does not fit the model.
        DataError, DepthKVError: as `perplexity`.
    """
    measured: dict[SharingPlan, CurveRow] = {}
    for plan in plans:
        if plan in measured:
            if progress is not None:
                progress(len(blocks))
            continue
        with share(model, plan):
            result = perplexity(model, blocks, batch_size=batch_size, progress=progress)
        config: Any = model.config
        dtype: Any = kv_dtype or model.dtype
        measured[plan] = CurveRow(
            retention=plan.retention,
            leaders=plan.leaders,
            loss=result.loss,
            perplexity=result.perplexity,
            kv_bytes_per_token=kv_bytes_per_token(config, dtype, plan),
        )
    return [measured[plan] for plan in plans]


def spread_blocks(blocks: torch.Tensor, wanted: int) -> torch.Tensor:
    """At most `wanted` of the blocks, evenly over all of them, so that many documents take part."""
    count = min(len(blocks), wanted)
    return blocks[[i * len(blocks) // count for i in range(count)]]


@contextmanager
def _token_losses(model: nn.Module) -> Iterator[_TokenLosses]:
    """A function from tokens `[batch, tokens]` to the loss of each but the first, `[batch, tokens - 1]`, fp32."""
    head = plain_head(model)
    if head is None:
        # soft-capped or scaled logits: only the model knows how, so it computes them, few blocks at a time
        vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]

        def from_logits(tokens: torch.Tensor) -> torch.Tensor:
            rows = max(1, 4 * _CHUNK_ELEMENTS // (tokens.shape[1] * vocabulary))
            losses = []
            for start in range(0, len(tokens), rows):
                some = tokens[start : start + rows]
                logits = model(input_ids=some, use_cache=False).logits[:, :-1]
                losses.append(_cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten()).view(len(some), -1))
            return torch.cat(losses)

        yield from_logits
        return

    def from_hidden(tokens: torch.Tensor) -> torch.Tensor:
        rows = last_hidden({"input_ids": tokens})[:, :-1].flatten(0, 1).to(head.weight.device)
        targets = tokens[:, 1:].flatten()
        chunk = max(1, _CHUNK_ELEMENTS // head.out_features)
        losses = []
        for start in range(0, len(rows), chunk):
            logits = linear(rows[start : start + chunk], head.weight, head.bias)
            losses.append(_cross_entropy(logits, targets[start : start + chunk]))
        return torch.cat(losses).view(len(tokens), -1)

    with headless(model, head) as last_hidden:
        yield from_hidden


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`[rows, vocabulary]` and `[rows]` to `[rows]`, fp32."""
    scores = logits.float()
    chosen = scores.gather(1, targets.to(scores.device)[:, None]).squeeze(1)
    return scores.logsumexp(dim=1) - chosen


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _check_blocks(model: nn.Module, blocks: torch.Tensor, batch_size: int) -> None:
    if blocks.dim() != 2 or blocks.shape[0] < 1 or blocks.shape[1] < 2:
        raise DataError(f"expected at least one block of at least two tokens, got shape {list(blocks.shape)}")
    if batch_size < 1:
        raise DepthKVError(f"expected a batch size of at least 1, got {batch_size}")
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    lowest, highest = int(blocks.min()), int(blocks.max())
    if lowest < 0 or highest >= vocabulary:
        raise DataError(f"expected token ids from 0 to {vocabulary - 1}, got {lowest} to {highest}")

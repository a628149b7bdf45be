"""Perplexity of blocks of tokens, under whatever plan is active, and the retention curve over several plans."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from depthkv.errors import DepthKVError
from depthkv.evaluate.text import check_blocks, reading, rows_at_once, token_losses
from depthkv.memory import kv_bytes_per_token
from depthkv.plan import SharingPlan
from depthkv.sharing import share

__all__ = ["CurveRow", "Perplexity", "perplexity", "retention_curve", "spread_blocks"]

Progress = Callable[[int], None]
"""Called after each batch with the number of blocks that it held."""


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
    check_blocks(model, blocks, batch_size)
    device = next(model.get_input_embeddings().parameters()).device  # type: ignore[operator]
    training = model.training
    model.eval()
    means: list[float] = []
    try:
        rows = rows_at_once(model, blocks.shape[1], batch_size)
        with torch.no_grad(), reading(model) as (features, to_logits):
            for start in range(0, len(blocks), rows):
                batch = blocks[start : start + rows].to(device)
                losses = token_losses(features(batch), batch[:, 1:].flatten(), to_logits)
                means += losses.view(len(batch), -1).double().mean(dim=1).tolist()
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
    return blocks[spread(len(blocks), wanted)]


def spread(count: int, wanted: int) -> list[int]:
    """Indices of at most `wanted` of `count` items, evenly over all of them."""
    chosen = min(count, wanted)
    return [i * count // chosen for i in range(chosen)]


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf

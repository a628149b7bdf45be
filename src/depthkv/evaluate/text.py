"""How a model reads text under each of several arms: the loss of every token, and how far it is from the full cache.

The logits of a whole batch never exist at once: with a vocabulary of 49k, those of 4 x 512 tokens take 400 MB in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import DynamicCache

from depthkv.errors import DataError, DepthKVError
from depthkv.evaluate.arms import Arm, MakeCache
from depthkv.head import headless, plain_head

_CHUNK_ELEMENTS = 2**24
"""Logits of one chunk: 64 MB in fp32."""

PIECE = 16
"""Tokens fed at once through an arm's own cache: few, since a token sees those of its own piece uncompressed."""

Progress = Callable[[int], None]
"""Called after each batch with the number of blocks that it held."""

Features = Callable[[torch.Tensor], torch.Tensor]
"""From tokens to features, or from features to logits, see `reading`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What one arm made of all blocks; each tensor is `[blocks, tokens - first]`, on the CPU."""

    losses: torch.Tensor
    """Nats, fp32: of each token of its block from `first` on."""
    top1: torch.Tensor | None
    """Whether the likeliest next token is the first arm's, too; None if not asked for."""
    kl: torch.Tensor | None
    """Kullback-Leibler divergence of the first arm's next-token distribution from this one's, nats, fp32."""
    first: int = 1
    """The first token of a block that is predicted."""


def read_text(
    model: nn.Module,
    arms: Sequence[Arm],
    blocks: torch.Tensor,
    *,
    batch_size: int = 4,
    agreement: bool = False,
    prompt_tokens: int | None = None,
    progress: Progress | None = None,
) -> list[Reading]:
    """Feed the blocks to the model under each arm; the arms take turns batch by batch.

    Soft-max and loss are taken in fp32. The same blocks, model and batch size give the same result.

    Args:
        model: a causal language model of transformers, neither shared nor routed.
        arms: where `agreement` is asked for, the first is what the others are compared with.
        blocks: token ids, `[blocks, tokens]`, from `depthkv.data.token_blocks`.
        batch_size: blocks in one forward.
        agreement: compare the next-token distributions, at twice the work of the language-model head.
        prompt_tokens: so many tokens of each block are read at once, as a prompt is, and the others in pieces of
            `PIECE` through the cache that this left, under every arm; only the others are predicted. A single forward
            never reads from a cache, so it cannot tell what quantised or evicted tokens cost. None is a single forward,
            or pieces from the first token on for arms with a cache of their own.
        progress: called after each batch of each arm.

    Raises:
        DataError: no blocks, blocks of fewer than two tokens, or ids outside the vocabulary.
        DepthKVError: a prompt that leaves nothing to predict.
        PlanError: an arm's plan does not fit the model.
    """
    check_blocks(model, blocks, batch_size)
    if prompt_tokens is not None and not 0 < prompt_tokens < blocks.shape[1]:
        raise DepthKVError(f"expected prompts of 1 to {blocks.shape[1] - 1} tokens, got {prompt_tokens}")
    first = prompt_tokens or 1
    device = next(model.get_input_embeddings().parameters()).device  # type: ignore[operator]
    with arms[0].applied(model):  # an export runs in no other way
        rows = rows_at_once(model, blocks.shape[1], batch_size)
    losses: list[list[torch.Tensor]] = [[] for _ in arms]
    top1: list[list[torch.Tensor]] = [[] for _ in arms]
    kl: list[list[torch.Tensor]] = [[] for _ in arms]
    with torch.no_grad():
        for start in range(0, len(blocks), rows):
            batch = blocks[start : start + rows].to(device)
            targets = batch[:, first:].flatten()
            reference: torch.Tensor | None = None
            for i, arm in enumerate(arms):
                with arm.applied(model), reading(model, arm.make_cache, prompt_tokens) as (features, to_logits):
                    rows_here = features(batch)
                if agreement and reference is None:
                    reference = rows_here
                found = _compare(rows_here, reference if agreement else None, targets, to_logits)
                for kept, part in zip((losses[i], top1[i], kl[i]), found, strict=False):
                    kept.append(part.view(len(batch), -1).cpu())
                if progress is not None:
                    progress(len(batch))
    return [
        Reading(
            losses=torch.cat(losses[i]),
            top1=torch.cat(top1[i]) if agreement else None,
            kl=torch.cat(kl[i]) if agreement else None,
            first=first,
        )
        for i in range(len(arms))
    ]


def token_losses(features: torch.Tensor, targets: torch.Tensor, to_logits: Features) -> torch.Tensor:
    """Loss of each target, `[rows]`, fp32, from features `[rows, ...]` that `reading` gave."""
    return _compare(features, None, targets, to_logits)[0]


@contextmanager
def reading(
    model: nn.Module, make_cache: MakeCache | None = None, prompt_tokens: int | None = None
) -> Iterator[tuple[Features, Features]]:
    """Two functions: from tokens `[batch, tokens]` to features of all positions but the last, `[batch x (tokens - 1),
    ...]`, and from features to logits `[rows, vocabulary]`, which also works afterwards.

    Features are the input of the language-model head, or the logits themselves where the head is not a plain one.

    Args:
        model: in evaluation mode, under whatever holds meanwhile.
        make_cache: a cache to feed the tokens through in pieces of `PIECE`; None is one forward without a cache.
        prompt_tokens: as for `read_text`; features are then those from the prompt's last position on.
    """
    head = plain_head(model)

    def fed(forward: Callable[[dict[str, Any]], torch.Tensor]) -> Features:
        def features(tokens: torch.Tensor) -> torch.Tensor:
            if make_cache is None and prompt_tokens is None:
                return forward({"input_ids": tokens, "use_cache": False})[:, :-1].flatten(0, 1)
            config: Any = model.config
            cache = DynamicCache(config=config) if make_cache is None else make_cache(config)  # type: ignore[no-untyped-call, unused-ignore]
            prompt, rest = tokens[:, : prompt_tokens or 0], tokens[:, prompt_tokens or 0 : -1]
            pieces = [piece for piece in (prompt, *torch.split(rest, PIECE, dim=1)) if piece.shape[1]]
            parts = [forward({"input_ids": piece, "past_key_values": cache, "use_cache": True}) for piece in pieces]
            if prompt_tokens is not None:
                parts[0] = parts[0][:, -1:]
            return torch.cat(parts, dim=1).flatten(0, 1)

        return features

    if head is None:
        # soft-capped or scaled logits: only the model knows how, so it computes them
        yield fed(lambda batch: model(**batch).logits), lambda features: features
        return
    weight, bias = head.weight, head.bias
    with headless(model, head) as last_hidden:
        yield fed(last_hidden), lambda features: linear(features.to(weight.device), weight, bias)


def rows_at_once(model: nn.Module, num_tokens: int, batch_size: int) -> int:
    """Blocks in one forward: fewer than `batch_size` where whole logits must be kept for them."""
    if plain_head(model) is not None:
        return batch_size
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return max(1, min(batch_size, 4 * _CHUNK_ELEMENTS // (num_tokens * vocabulary)))


def check_blocks(model: nn.Module, blocks: torch.Tensor, batch_size: int) -> None:
    """Refuse what cannot be read.

    Raises:
        DataError, DepthKVError: as `read_text` says.
    """
    if blocks.dim() != 2 or blocks.shape[0] < 1 or blocks.shape[1] < 2:
        raise DataError(f"expected at least one block of at least two tokens, got shape {list(blocks.shape)}")
    if batch_size < 1:
        raise DepthKVError(f"expected a batch size of at least 1, got {batch_size}")
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    lowest, highest = int(blocks.min()), int(blocks.max())
    if lowest < 0 or highest >= vocabulary:
        raise DataError(f"expected token ids from 0 to {vocabulary - 1}, got {lowest} to {highest}")


def _compare(
    features: torch.Tensor, reference: torch.Tensor | None, targets: torch.Tensor, to_logits: Features
) -> tuple[torch.Tensor, ...]:
    """Losses of the targets, and against the reference's features: same likeliest token, divergence. Each `[rows]`."""
    width = to_logits(features[:1]).shape[-1]
    chunk = max(1, _CHUNK_ELEMENTS // width)
    parts: list[tuple[torch.Tensor, ...]] = []
    for start in range(0, len(features), chunk):
        logits = to_logits(features[start : start + chunk]).float()
        wanted = targets[start : start + chunk].to(logits.device)
        normaliser = logits.logsumexp(dim=1)
        losses = normaliser - logits.gather(1, wanted[:, None]).squeeze(1)
        if reference is None:
            parts.append((losses,))
            continue
        expected = to_logits(reference[start : start + chunk]).float()
        same = logits.argmax(dim=1) == expected.argmax(dim=1)
        shift = expected.logsumexp(dim=1) - normaliser
        # sum of p (log p - log q); log p - log q is the difference of the logits less that of their normalisers
        divergence = ((expected - logits) * expected.softmax(dim=1)).sum(dim=1) - shift
        parts.append((losses, same, divergence.clamp(min=0)))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))

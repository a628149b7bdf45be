"""Loss of what follows a prompt when it is read through a cache: what a recipe costs.

A single forward over a text never reads from the cache, so it cannot show what quantised or evicted tokens cost. Here
the prompt is read at once, as in serving, and the rest in short pieces, each through the cache that the last one left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from depthkv.compress.recipe import CacheRecipe
from depthkv.errors import DepthKVError
from depthkv.plan import SharingPlan
from depthkv.sharing import share

PIECE = 16
"""Tokens read at once after the prompt. They are all there while the piece is read, beside what the recipe keeps."""

Advance = Callable[[int], None]


@torch.no_grad()
def streamed_losses(
    model: Any,
    how: SharingPlan | CacheRecipe,
    blocks: torch.Tensor,
    prompt_tokens: int,
    *,
    piece: int = PIECE,
    batch_size: int = 4,
    advance: Advance = lambda done: None,
) -> list[float]:
    """Mean loss of each block's tokens after the prompt, nats.

    Args:
        model: a causal language model of transformers in evaluation mode, neither shared nor routed.
        how: a recipe, or a plan, whose cache is then kept as it is.
        blocks: token ids, `[blocks, tokens]`.
        prompt_tokens: at the beginning of each.
        piece: tokens in one forward after the prompt.
        batch_size: blocks in one forward.
        advance: called with the number of blocks done.

    Raises:
        DepthKVError: a prompt that leaves nothing to score, or losses that are not finite.
    """
    if not 0 < prompt_tokens < blocks.shape[1]:
        raise DepthKVError(f"expected prompts of 1 to {blocks.shape[1] - 1} tokens, got {prompt_tokens}")
    device = model.get_input_embeddings().weight.device
    losses: list[float] = []
    with share(model, how):
        for start in range(0, len(blocks), batch_size):
            batch = blocks[start : start + batch_size].to(device)
            output = model(input_ids=batch[:, :prompt_tokens], use_cache=True, logits_to_keep=1)
            last, cache = output.logits[:, -1:], output.past_key_values
            total = torch.zeros(len(batch), device=device)
            for at in range(prompt_tokens, batch.shape[1], piece):
                target = batch[:, at : at + piece]
                output = model(input_ids=target, past_key_values=cache, use_cache=True)
                logits = torch.cat([last, output.logits[:, :-1]], dim=1).float()
                total += cross_entropy(logits.transpose(1, 2), target, reduction="none").sum(dim=1)
                last = output.logits[:, -1:]
            losses += (total / (batch.shape[1] - prompt_tokens)).tolist()
            advance(len(batch))
    if not all(map(math.isfinite, losses)):
        raise DepthKVError("expected finite losses, got others: the model overflows in this dtype")
    return losses

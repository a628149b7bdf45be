"""Loss of what follows a prompt when it is read through a cache: what a recipe costs.

A single forward over a text never reads from the cache, so it cannot show what quantised or evicted tokens cost. Here
the prompt is read at once, as in serving, and the rest in short pieces, each through the cache that the last one left.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from depthkv.compress.recipe import CacheRecipe
from depthkv.errors import DepthKVError
from depthkv.evaluate.arms import Arm
from depthkv.evaluate.text import Progress, read_text
from depthkv.plan import SharingPlan

__all__ = ["streamed_losses"]


def streamed_losses(
    model: Any,
    how: SharingPlan | CacheRecipe,
    blocks: torch.Tensor,
    prompt_tokens: int,
    *,
    batch_size: int = 4,
    advance: Progress | None = None,
) -> list[float]:
    """Mean loss of each block's tokens after the prompt, nats: `read_text` with one arm.

    Args:
        model: a causal language model of transformers, neither shared nor routed.
        how: a recipe, or a plan, whose cache is then kept as it is.
        blocks: token ids, `[blocks, tokens]`.
        prompt_tokens: at the beginning of each.
        batch_size: blocks in one forward.
        advance: called with the number of blocks done.

    Raises:
        DepthKVError: a prompt that leaves nothing to score, or losses that are not finite.
    """
    arm = Arm(label="how", recipe=how) if isinstance(how, CacheRecipe) else Arm(label="how", plan=how)
    (found,) = read_text(model, [arm], blocks, batch_size=batch_size, prompt_tokens=prompt_tokens, progress=advance)
    losses: list[float] = found.losses.mean(dim=1).tolist()
    if not all(map(math.isfinite, losses)):
        raise DepthKVError("expected finite losses, got others: the model overflows in this dtype")
    return losses

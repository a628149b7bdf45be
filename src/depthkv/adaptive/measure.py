"""What a plan or a router costs: the loss of what follows a prompt on which the decision was made."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from depthkv.adaptive.router import Router
from depthkv.architectures import LayerKind
from depthkv.calibrate.store import fingerprint
from depthkv.errors import DepthKVError
from depthkv.kept_losses import load_losses, save_losses
from depthkv.plan import SharingPlan
from depthkv.sharing import share

__all__ = ["continuation_losses", "plan_losses", "varied_plans"]

Advance = Callable[[int], None]
"""Called with 1 after each plan or batch."""

FORMAT = "depthkv-plan-losses"


@torch.no_grad()
def continuation_losses(
    model: Any, how: SharingPlan | Router, blocks: torch.Tensor, prompt_tokens: int, batch_size: int = 4
) -> tuple[list[float], list[tuple[int, ...]]]:
    """Mean loss of each block's tokens after the prompt, nats, and the map that each block got.

    The prompts are read alone, as in serving, so a router does not see what is scored.

    Args:
        model: a causal language model of transformers in evaluation mode, neither shared nor routed.
        how: the same plan for all, or a router.
        blocks: token ids, `[blocks, tokens]`.
        prompt_tokens: at the beginning of each.
        batch_size: blocks in one forward.

    Raises:
        DepthKVError: a prompt that leaves nothing to score, or that is empty.
    """
    if not 0 < prompt_tokens < blocks.shape[1]:
        raise DepthKVError(f"expected prompts of 1 to {blocks.shape[1] - 1} tokens, got {prompt_tokens}")
    device = model.get_input_embeddings().weight.device
    losses: list[float] = []
    maps: list[tuple[int, ...]] = []
    with share(model, how) as handle:
        for start in range(0, len(blocks), batch_size):
            batch = blocks[start : start + batch_size].to(device)
            targets = batch[:, prompt_tokens:]
            if isinstance(how, Router):
                first = model(input_ids=batch[:, :prompt_tokens], use_cache=True, logits_to_keep=1)
                rest = model(input_ids=targets, past_key_values=first.past_key_values, use_cache=True).logits
                logits = torch.cat([first.logits, rest[:, :-1]], dim=1)
                maps += handle.last_maps  # type: ignore[union-attr]
            else:
                keep = targets.shape[1] + 1
                logits = model(input_ids=batch, use_cache=False, logits_to_keep=keep).logits[:, :-1]
                maps += [how.kv_source_layers] * len(batch)
            # row by row: all logits in fp32 at once would take gigabytes
            losses += [float(cross_entropy(row.float(), t)) for row, t in zip(logits, targets, strict=True)]
    if not all(map(math.isfinite, losses)):
        raise DepthKVError("expected finite losses, got others: the model overflows in this dtype")
    return losses, maps


def plan_losses(
    model: Any,
    plans: Sequence[SharingPlan],
    blocks: torch.Tensor,
    prompt_tokens: int,
    *,
    batch_size: int = 4,
    path: str | os.PathLike[str] | None = None,
    advance: Advance = lambda done: None,
) -> torch.Tensor:
    """`continuation_losses` of each plan, `[blocks, plans]`, fp64; those in the file `path` are not measured again.

    Raises:
        DepthKVError: as there, or a file that belongs to another model, text or length of prompts.
    """
    key = fingerprint(model, blocks, ["continuation", prompt_tokens, str(model.dtype)])
    kept = {} if path is None else load_losses(path, "plans", FORMAT, key, len(blocks))
    columns = []
    for plan in plans:
        name = ",".join(map(str, plan.kv_source_layers))
        if name not in kept:
            kept[name] = continuation_losses(model, plan, blocks, prompt_tokens, batch_size)[0]
            if path is not None:
                save_losses(path, "plans", FORMAT, key, kept)
        columns.append(kept[name])
        advance(1)
    return torch.tensor(columns, dtype=torch.float64).T


def varied_plans(kinds: Sequence[LayerKind], retention: float) -> list[SharingPlan]:
    """Plans of about one size that differ in where their leaders are: a portfolio for those who have measured nothing.

    Evenly spaced ones; all leaders in one run of layers; and half of them in a run, the others evenly spaced. Runs
    begin at five places from the lowest to the highest. The same within each kind of layers.
    """
    found = [SharingPlan.for_retention(retention, kinds)]
    sizes = {kind: sum(1 for leader in found[0].leaders if kinds[leader] == kind) for kind in set(kinds)}
    for part in (1.0, 0.5):
        for place in (0.0, 0.25, 0.5, 0.75, 1.0):
            leaders: set[int] = set()
            for kind, size in sizes.items():
                members = [layer for layer, other in enumerate(kinds) if other == kind]
                run = round(part * (size - 1))
                start = 1 + round(place * (len(members) - 1 - run))
                mine = {0, *range(start, start + run)}
                rest = [i for i in range(len(members)) if i not in mine]
                missing = size - len(mine)
                mine |= {rest[i * len(rest) // missing] for i in range(missing)} if missing > 0 else set()
                leaders |= {members[i] for i in mine}
            found.append(SharingPlan.from_leaders(leaders, len(kinds), kinds))
    return list(dict.fromkeys(found))

"""Parting a padded batch into prompts that run alone, and putting their outputs together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

from depthkv.errors import PlanError


def prompt_starts(mask: Any, batch: int, tokens: int) -> list[int]:
    """The position of each prompt's first token in a batch that is padded on the left.

    Raises:
        PlanError: another mask than `[batch, tokens]`, padding elsewhere, or a prompt without a token.
    """
    if mask is None:
        return [0] * batch
    if not isinstance(mask, torch.Tensor) or mask.shape != (batch, tokens):
        got = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise PlanError(f"expected an attention mask of shape {[batch, tokens]} for adaptive sharing, got {got}")
    seen = mask.bool()
    counts = seen.sum(dim=1).tolist()
    starts = [tokens - int(count) for count in counts]
    for row, start in enumerate(starts):
        if start == tokens or not bool(seen[row, start:].all()):
            raise PlanError(
                f"expected prompts of at least one token, padded on the left only, got another mask for sequence {row}"
            )
    return starts


def first_alike(arguments: dict[str, Any], starts: Sequence[int]) -> list[int]:
    """For each sequence the first one with the same prompt: beams and several samples of one are read once."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    ids, positions = tensors.get("input_ids"), tensors.get("position_ids")
    known = {"input_ids", "attention_mask", "position_ids", "cache_position"}
    if ids is None or not set(tensors) <= known or (positions is not None and positions.ndim != 2):
        return list(range(len(starts)))
    seen: dict[tuple[Any, ...], int] = {}
    found = []
    for row, start in enumerate(starts):
        key: tuple[Any, ...] = (start, *ids[row, start:].tolist())
        if positions is not None and positions.shape[0] == len(starts):
            key = (key, tuple(positions[row, start:].flatten().tolist()))
        found.append(seen.setdefault(key, row))
    return found


def one_prompt(arguments: dict[str, Any], row: int, start: int, cache: Cache | None) -> dict[str, Any]:
    """The decoder's arguments for one sequence, without its padding."""
    inputs = arguments.get("input_ids")
    given = arguments["inputs_embeds"] if inputs is None else inputs
    batch, tokens = given.shape[:2]
    found = {}
    for name, value in arguments.items():
        if name == "past_key_values":
            value = cache
        elif name == "attention_mask":
            # ones, not None: positions that start anew would be taken for packed sequences without a mask
            value = None if value is None else value[row : row + 1, start:]
        elif name == "cache_position" and isinstance(value, torch.Tensor):
            value = value[: tokens - start]
        elif isinstance(value, torch.Tensor):
            if value.ndim == 3 and name == "position_ids" and value.shape[1] == batch:  # [sections, batch, tokens]
                value = value[:, row : row + 1, start:]
            elif value.ndim and value.shape[0] in (1, batch):
                value = value[row : row + 1] if value.shape[0] == batch else value
                value = value[:, start:] if value.ndim > 1 and value.shape[1] == tokens else value
        found[name] = value
    if start and found.get("position_ids") is None:
        found["position_ids"] = torch.arange(start, tokens, device=given.device)[None]
    return found


def without_cache(output: Any) -> Any:
    """The decoder's output, holding no cache alive."""
    if isinstance(output, tuple):
        return tuple(_NO_CACHE if isinstance(value, Cache) else value for value in output)
    if output.get("past_key_values") is not None:
        output["past_key_values"] = _NO_CACHE
    return output


_NO_CACHE = object()
"""Where the cache of one sequence was, and that of the batch will be."""


def join_outputs(outputs: Sequence[Any], starts: Sequence[int], tokens: int, cache: Cache | None) -> Any:
    """The decoder's output for the batch; hidden states of padding are zeros.

    Raises:
        PlanError: something else than hidden states was asked for, such as attention maps.
    """
    first = outputs[0]
    if isinstance(first, tuple):
        parts = [[output[i] for output in outputs] for i in range(len(first))]
        return tuple(_joined(part, f"output {i}", starts, tokens, cache) for i, part in enumerate(parts))
    names = list(first.keys())
    return type(first)(
        **{name: _joined([output[name] for output in outputs], name, starts, tokens, cache) for name in names}
    )


def _joined(values: list[Any], name: str, starts: Sequence[int], tokens: int, cache: Cache | None) -> Any:
    first = values[0]
    if first is None or first is _NO_CACHE:
        return None if first is None else cache
    if isinstance(first, tuple):
        return tuple(_joined([value[i] for value in values], name, starts, tokens, cache) for i in range(len(first)))
    if not isinstance(first, torch.Tensor) or first.ndim != 3:
        raise PlanError(
            f"expected hidden states alone to be asked for in a batch under adaptive sharing, got {name}, too"
        )
    whole = first.new_zeros(len(values), tokens, first.shape[-1])
    for row, (value, start) in enumerate(zip(values, starts, strict=True)):
        whole[row, start:] = value[0]
    return whole

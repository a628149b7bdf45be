"""What a config says about a model's KV cache and about which layers can share; no weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from depthkv.architectures import LayerKind, layer_kinds, text_config
from depthkv.compress.recipe import CacheRecipe
from depthkv.errors import DepthKVError
from depthkv.memory import (
    cache_bytes,
    kv_bytes_per_layer,
    kv_bytes_per_token,
    num_parameters,
    prefill_activation_bytes,
)
from depthkv.plan import SharingPlan, runs_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

__all__ = ["Inspection", "KindGroup", "PlanCost", "inspect_model"]


@dataclass(frozen=True, kw_only=True)
class KindGroup:
    """Layers that can share with each other, and with no others."""

    kind: LayerKind
    layers: tuple[int, ...]
    bytes_per_token: int
    """In one layer of this kind."""

    @property
    def rope_base(self) -> str:
        """The rotary base, "none" without a rotary embedding."""
        if self.kind.rope == "none":
            return "none"
        rope = json.loads(self.kind.rope)
        base = rope.get("rope_theta")
        scaling = rope.get("rope_type", "default")
        shown = f"{base:g}" if isinstance(base, (int, float)) else "default"
        return shown if scaling == "default" else f"{shown}, {scaling}"


@dataclass(frozen=True, kw_only=True)
class PlanCost:
    """What one plan or recipe costs in memory."""

    name: str
    plan: SharingPlan
    recipe: CacheRecipe | None
    """Around the plan."""
    bytes_per_token: int
    """With a recipe, the mean over the context."""
    cache_bytes: int
    """At the context and batch asked for."""
    activation_bytes: int
    """Of the prefill of one sequence of the context asked for."""
    sequences: int | None
    """Sequences of the context asked for that fit beside weights and activations; None without a memory size."""
    longest_context: int | None
    """Tokens of each prompt that fit beside weights and activations at the batch asked for; None without a memory
    size."""
    sequences_ratio: float | None
    """By those of the full cache; None without a memory size or where the full cache has room for none."""
    context_ratio: float | None
    """The longest context by that of the full cache; None without a memory size or where nothing fits there."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Everything that `inspect` shows."""

    model_type: str
    dtype: torch.dtype
    context: int
    """Tokens per sequence."""
    batch: int
    """Sequences."""
    max_positions: int | None
    """Positions that the model was trained for."""
    groups: tuple[KindGroup, ...]
    costs: tuple[PlanCost, ...]
    """One per plan, in the order asked for."""
    full: PlanCost
    """What the full cache costs, which the others are compared with."""
    num_parameters: int | None
    """None where the config alone does not tell."""
    is_quantized: bool
    """The checkpoint's weights are stored smaller than `dtype`; they are counted at `dtype`."""
    memory: int | None
    """Bytes of one device."""

    @property
    def num_layers(self) -> int:
        return sum(len(group.layers) for group in self.groups)

    @property
    def weight_bytes(self) -> int | None:
        """Parameters at `dtype`."""
        return None if self.num_parameters is None else self.num_parameters * int(self.dtype.itemsize)

    def to_dict(self) -> dict[str, Any]:
        """What `inspect --json` writes."""
        per_layer = {layer: group.bytes_per_token for group in self.groups for layer in group.layers}
        return {
            "model_type": self.model_type,
            "num_layers": self.num_layers,
            "dtype": str(self.dtype).removeprefix("torch."),
            "context": self.context,
            "batch": self.batch,
            "max_positions": self.max_positions,
            "num_parameters": self.num_parameters,
            "weight_bytes": self.weight_bytes,
            "is_quantized": self.is_quantized,
            "memory": self.memory,
            "kv_bytes_per_token_per_layer": [per_layer[layer] for layer in range(self.num_layers)],
            "kv_bytes_per_token": sum(per_layer.values()),
            "groups": [
                {
                    "attention": group.kind.attention,
                    "window": group.kind.window,
                    "rope_base": group.rope_base,
                    "kv_heads": group.kind.kv_heads,
                    "head_dim": group.kind.head_dim,
                    "kv_bytes_per_token_per_layer": group.bytes_per_token,
                    "layers": list(group.layers),
                }
                for group in self.groups
            ],
            "plans": [
                {
                    "name": cost.name,
                    "retention": cost.plan.retention,
                    "leaders": list(cost.plan.leaders),
                    "kv_source_layers": list(cost.plan.kv_source_layers),
                    "cache_recipe": None if cost.recipe is None else cost.recipe.figures(),
                    "kv_bytes_per_token": cost.bytes_per_token,
                    "cache_bytes": cost.cache_bytes,
                    "activation_bytes": cost.activation_bytes,
                    "sequences": cost.sequences,
                    "sequences_ratio": cost.sequences_ratio,
                    "longest_context": cost.longest_context,
                    "context_ratio": cost.context_ratio,
                }
                for cost in self.costs
            ],
        }


def default_plans(config: PreTrainedConfig) -> list[tuple[str, SharingPlan]]:
    """Full, half and quarter of the layers, and the plan that the config carries, if any."""
    kinds = layer_kinds(config)
    plans = [
        (name, SharingPlan.for_retention(retention, kinds))
        for name, retention in (("full", 1.0), ("half", 0.5), ("quarter", 0.25))
    ]
    sources = getattr(config, "kv_source_layers", None)
    if sources is not None:
        plans.append(("its own", SharingPlan(sources)))
    return plans


def inspect_model(
    config: PreTrainedConfig,
    plans: Sequence[tuple[str, SharingPlan | CacheRecipe]],
    *,
    dtype: torch.dtype,
    context: int,
    batch: int = 1,
    memory: int | None = None,
) -> Inspection:
    """Compute what `inspect` shows.

    Into `memory` have to go the weights (where the config tells how many), the cache of all sequences and the
    activations of the prefill of one, since engines that serve many read one prompt after the other. `generate()` reads
    the whole batch at once: `depthkv.memory.device_room` counts that.

    Args:
        config: of a causal language model.
        plans: (name, plan or recipe), each for the layers of the model.
        dtype: of cache and weights.
        context: tokens per sequence.
        batch: sequences.
        memory: bytes of one device.

    Raises:
        UnsupportedModelError: layers that cannot share.
        PlanError: a plan for another number of layers.
    """
    if context < 1 or batch < 1:
        raise DepthKVError(f"expected a context and batch of at least 1, got {context} and {batch}")
    kinds = layer_kinds(config)
    members: dict[LayerKind, list[int]] = {}
    for layer, kind in enumerate(kinds):
        members.setdefault(kind, []).append(layer)
    parameters = num_parameters(config)
    room = None if memory is None else memory - (parameters or 0) * int(dtype.itemsize)
    full = _cost(config, "full", SharingPlan.full(len(kinds)), dtype, context, batch, room, None)
    costs = [_cost(config, name, plan, dtype, context, batch, room, full) for name, plan in plans]
    inner = text_config(config)
    return Inspection(
        model_type=inner.model_type,
        dtype=dtype,
        context=context,
        batch=batch,
        max_positions=getattr(inner, "max_position_embeddings", None),
        groups=tuple(
            KindGroup(kind=kind, layers=tuple(layers), bytes_per_token=kv_bytes_per_layer(kind, dtype))
            for kind, layers in members.items()
        ),
        costs=tuple(costs),
        full=full,
        num_parameters=parameters,
        is_quantized=getattr(config, "quantization_config", None) is not None,
        memory=memory,
    )


def _cost(
    config: PreTrainedConfig,
    name: str,
    how: SharingPlan | CacheRecipe,
    dtype: torch.dtype,
    context: int,
    batch: int,
    room: int | None,
    full: PlanCost | None,
) -> PlanCost:
    """What `how` costs, with `room` bytes beside the weights, compared with `full` or itself."""
    kinds = layer_kinds(config)
    recipe = how if isinstance(how, CacheRecipe) else None
    plan = how.plan if isinstance(how, CacheRecipe) else how

    def held(tokens: int, sequences: int) -> int:
        if recipe is not None:
            return recipe.cache_bytes(config, dtype, tokens, sequences)
        return cache_bytes(config, dtype, tokens, sequences, plan)

    def taken(tokens: int, sequences: int) -> int:
        """The cache at its largest up to so many tokens, and what is unpacked of it in a step."""
        if recipe is None:
            return held(tokens, sequences)
        largest = max(held(n, sequences) for n in recipe.largest_lengths(tokens))
        return largest + recipe.working_bytes(kinds, dtype, tokens, sequences)

    activations = prefill_activation_bytes(config, dtype, context, 1, plan)
    sequences = longest = None
    if room is not None:
        sequences = _longest(lambda number: taken(context, number) + activations <= room)
        longest = _longest(
            lambda tokens: taken(tokens, batch) + prefill_activation_bytes(config, dtype, tokens, 1, plan) <= room
        )
    return PlanCost(
        name=name,
        plan=plan,
        recipe=recipe,
        bytes_per_token=round(held(context, 1) / context) if recipe else kv_bytes_per_token(config, dtype, plan),
        cache_bytes=held(context, batch),
        activation_bytes=activations,
        sequences=sequences,
        longest_context=longest,
        sequences_ratio=_ratio(sequences, full.sequences if full else sequences),
        context_ratio=_ratio(longest, full.longest_context if full else longest),
    )


def _ratio(value: int | None, full: int | None) -> float | None:
    return value / full if value is not None and full else None


def _longest(fits: Callable[[int], bool]) -> int:
    """The most tokens that fit."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def layer_ranges(layers: Sequence[int]) -> str:
    """Ascending layers as `"0-4, 6, 8-10"`; an even step is shortened: `"5, 11, ..., 29"`."""
    steps = {b - a for a, b in pairwise(layers)}
    if len(layers) > 4 and len(steps) == 1 and steps != {1}:
        return f"{layers[0]}, {layers[1]}, ..., {layers[-1]}"
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs_of(layers))

"""The roofline (doi:10.1145/1498765.1498785): what a forward moves and computes, and how fast this machine could do it.

Counted are the least bytes and the matrix products that no implementation can do without. Left out are activations that
move between kernels, softmax, norms, rotary embeddings, and copies such as those of a cache that grows by
concatenation. So a measured time is above the limit, and their quotient says how much of the time the limit explains.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from depthkv.architectures import LayerKind, text_config
from depthkv.compress.recipe import CacheRecipe
from depthkv.decoder import Decoder
from depthkv.memory import kv_bytes_per_layer
from depthkv.plan import SharingPlan

__all__ = ["MachineLimits", "Work", "forward_work", "measure_limits", "roofline"]

PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one forward of the model needs, over all sequences of the batch."""

    weight_bytes: int
    """Weights read, each once: the layers', without followers' K and V projections, the head's, and of the embedding
    the rows of the tokens."""
    cache_read_bytes: int
    """Keys and values read by every layer: a follower reads its leader's again, because other layers ran in between."""
    cache_written_bytes: int
    """Keys and values of the new tokens, of leaders only."""
    weight_flops: int
    """Of products with weights; a multiplication and an addition are 2."""
    attention_flops: int
    """Of queries with keys and of scores with values, for those pairs of positions only that may see each other: half
    of the square in a causal prefill."""

    @property
    def num_bytes(self) -> int:
        """All bytes moved."""
        return self.weight_bytes + self.cache_read_bytes + self.cache_written_bytes

    @property
    def flops(self) -> int:
        """All floating-point operations."""
        return self.weight_flops + self.attention_flops


@dataclass(frozen=True, kw_only=True)
class MachineLimits:
    """What this machine reached with nothing else to do."""

    bandwidth_bytes_per_s: float
    """Reading, or copying (bytes read and written), a tensor larger than the caches: whichever is faster."""
    matmul_flops_per_s: float
    """The fastest product of two square matrices in the model's dtype."""


def roofline(
    work: Mapping[str, Work], limits: MachineLimits, measured_s: Mapping[str, float | None]
) -> dict[str, float | None]:
    """Bytes, FLOPs, the least seconds that they take, and the share of the measured seconds that this explains.

    The limit is the larger of the seconds for the bytes and those for the FLOPs. A share can exceed 1 where weights or
    cache fit into a cache of the processor and are not read from memory, and where the clock was slower when the limits
    were measured.

    Args:
        work: by phase, see `PHASES`.
        limits: of the machine on which the seconds were measured.
        measured_s: seconds by phase; None leaves the share open.

    Returns:
        `PHASE_bytes`, `PHASE_flops`, `PHASE_limit_s` and `PHASE_share` for each phase.
    """
    figures: dict[str, float | None] = {}
    for phase, needed in work.items():
        limit = max(
            needed.num_bytes / limits.bandwidth_bytes_per_s,
            needed.flops / limits.matmul_flops_per_s,
        )
        seconds = measured_s.get(phase)
        figures |= {
            f"{phase}_bytes": needed.num_bytes,
            f"{phase}_flops": needed.flops,
            f"{phase}_limit_s": limit,
            f"{phase}_share": limit / seconds if seconds else None,
        }
    return figures


# Counting


def forward_work(
    decoder: Decoder,
    how: SharingPlan | CacheRecipe,
    *,
    batch_size: int,
    new_tokens: int,
    past_tokens: int = 0,
    last_logits_only: bool = True,
) -> Work:
    """What one forward under `how` needs: a prefill without past tokens, a decoding step with one new token.

    The weights are those of the modules themselves. Adapters of PEFT count as they stand, on or off, so count under
    `share` what runs under it. Of experts (mixture of experts), each token uses as many as the config says; how many
    different ones a batch reads is what independent and equally likely choices lead one to expect.

    Args:
        decoder: from `find_decoder`.
        how: `SharingPlan.full` for the model as it is. Under a recipe every layer reads what its source keeps, packed
            as it lies in memory; to unpack it before it is read, as depthkv does, moves more.
        batch_size: sequences.
        new_tokens: of each sequence, in this forward.
        past_tokens: of each sequence, in the cache already.
        last_logits_only: `logits_to_keep=1`, as in `generate()`. Layers above the last leader then run for the last
            position only, see `depthkv.prefill`.
    """
    recipe = how if isinstance(how, CacheRecipe) else None
    plan = how.plan if isinstance(how, CacheRecipe) else how
    config = text_config(decoder.config)
    dtype: torch.dtype = decoder.model.dtype  # type: ignore[assignment]
    implementation = str(getattr(config, "_attn_implementation", None) or "eager")
    stops_early = last_logits_only and (
        implementation in ("eager", "sdpa") or implementation.startswith("flash_attention")
    )
    followers = set(plan.followers)
    weight_bytes = cache_read = weight_flops = attention_flops = 0
    for layer, kind in enumerate(decoder.kinds):
        positions = 1 if stops_early and layer > plan.leaders[-1] else new_tokens
        weights = _layer_weights(decoder, layer, layer in followers)
        weight_bytes += weights.bytes_read(batch_size * positions)
        weight_flops += weights.flops_per_token * batch_size * positions
        pairs, keys = _visible(kind, past_tokens + new_tokens - positions, positions)
        read = keys * kv_bytes_per_layer(kind, dtype)
        if recipe is not None and kind.window is None:
            pairs -= (past_tokens - recipe.kept_tokens(past_tokens)) * positions
            read -= past_tokens * kv_bytes_per_layer(kind, dtype)
            read += recipe.layer_bytes(kind, recipe.bits[plan.kv_source_layers[layer]], dtype, past_tokens)
        attention_flops += 4 * config.num_attention_heads * kind.head_dim * pairs * batch_size
        cache_read += read * batch_size
    # the decoder without its layers: embeddings and the last norm
    rest = _Weights(config)
    rest.add(decoder.module, skipped=decoder.layers)
    weight_bytes += rest.bytes_read(batch_size * new_tokens)
    weight_flops += rest.flops_per_token * batch_size * new_tokens
    get_head = getattr(decoder.model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if isinstance(head, nn.Module):
        weights = _Weights(config)
        weights.add(head)
        positions = batch_size * (1 if last_logits_only else new_tokens)
        weight_bytes += weights.bytes_read(positions)
        weight_flops += weights.flops_per_token * positions
    return Work(
        weight_bytes=weight_bytes,
        cache_read_bytes=cache_read,
        cache_written_bytes=batch_size
        * new_tokens
        * sum(kv_bytes_per_layer(decoder.kinds[leader], dtype) for leader in plan.leaders),
        weight_flops=weight_flops,
        attention_flops=attention_flops,
    )


def _visible(kind: LayerKind, first: int, queries: int) -> tuple[int, int]:
    """Pairs of a query and a key that it may see, and how many keys are seen at all, of `queries` positions from
    `first` on."""
    positions = torch.arange(first, first + queries)
    if kind.window is None:
        seen = positions + 1
    elif kind.attention == "chunked_attention":
        seen = positions % kind.window + 1
    else:
        seen = (positions + 1).clamp(max=kind.window)
    earliest = first + 1 - int(seen[0])
    return int(seen.sum()), first + queries - earliest


def _layer_weights(decoder: Decoder, layer: int, is_follower: bool) -> _Weights:
    """Of one decoder layer; a follower's without what computes its own K and V."""
    config, family, kind = text_config(decoder.config), decoder.family, decoder.kinds[layer]
    weights = _Weights(config)
    if not is_follower:
        weights.add(decoder.layers[layer])
        return weights
    attention = decoder.attention(layer)
    names = [] if family.fused is not None else [family.k_proj, family.v_proj]
    names += [family.k_norm] if family.k_norm else []
    skipped = [module for name in names if isinstance(module := getattr(attention, name, None), nn.Module)]
    fused = getattr(attention, family.fused) if family.fused is not None else None
    if fused is None or not _is_sliced(fused):
        weights.add(decoder.layers[layer], skipped)
        return weights
    weights.add(decoder.layers[layer], [*skipped, fused])
    projection = _Weights(config)
    projection.add(fused)
    query, both = config.num_attention_heads, 2 * kind.kv_heads
    weights.dense_bytes += projection.dense_bytes * query // (query + both)
    weights.flops_per_token += projection.flops_per_token * query // (query + both)
    return weights


def _is_sliced(fused: nn.Module) -> bool:
    """Whether a follower computes only the query rows of this projection; as in `attention.fused_forward`."""
    from transformers.pytorch_utils import Conv1D

    return type(fused) in (nn.Linear, Conv1D) and not hasattr(fused, "_hf_hook")


@dataclass
class _Weights:
    """Adds up the weights of modules."""

    config: Any
    dense_bytes: int = 0
    """Read in every forward."""
    flops_per_token: int = 0
    tables: list[tuple[int, int]] = field(default_factory=list)
    """Rows of embeddings and bytes of a row; a token reads one."""
    experts: list[tuple[int, int, int]] = field(default_factory=list)
    """How many there are, how many each token uses, and the bytes of one."""

    def add(self, module: nn.Module, skipped: Collection[nn.Module] = ()) -> None:
        """Count `module` and all below it, but for `skipped`."""
        if any(module is other for other in skipped):
            return
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.Embedding):
            self.tables.append((module.num_embeddings, module.embedding_dim * module.weight.element_size()))
        elif any(parameter.ndim == 3 for parameter in own):
            self._add_experts(own)
        elif own:
            self.dense_bytes += sum(parameter.numel() * parameter.element_size() for parameter in own)
            features = getattr(module, "in_features", None), getattr(module, "out_features", None)
            if isinstance(features[0], int) and isinstance(features[1], int):  # a quantised weight has another shape
                self.flops_per_token += 2 * features[0] * features[1]
            elif "norm" not in type(module).__name__.lower():  # norms of heads have weights of 2 dimensions, too
                self.flops_per_token += sum(2 * parameter.numel() for parameter in own if parameter.ndim == 2)
        unused = _unused_adapters(module)
        for child in module.children():
            self.add(child, [*skipped, *unused])

    def _add_experts(self, parameters: list[nn.Parameter]) -> None:
        total = next(int(parameter.shape[0]) for parameter in parameters if parameter.ndim == 3)
        used = min(total, int(getattr(self.config, "num_experts_per_tok", None) or total))
        size = sum(parameter.numel() * parameter.element_size() for parameter in parameters) // total
        self.experts.append((total, used, size))
        products = sum(parameter.numel() for parameter in parameters if parameter.ndim == 3) // total
        self.flops_per_token += 2 * products * used

    def bytes_read(self, tokens: int) -> int:
        """By a forward of so many tokens."""
        found = self.dense_bytes
        found += sum(min(tokens, rows) * size for rows, size in self.tables)
        for total, used, size in self.experts:
            found += round(total * (1 - (1 - used / total) ** tokens) * size)
        return found


def _unused_adapters(module: nn.Module) -> list[nn.Module]:
    """Parts of a PEFT layer that its forward passes over."""
    names = getattr(module, "adapter_layer_names", None)
    if names is None or not hasattr(module, "base_layer"):
        return []
    off = bool(module.disable_adapters) or bool(module.merged)
    active = () if off else tuple(module.active_adapters)  # type: ignore[arg-type]
    parts = [part for name in names if isinstance(part := getattr(module, name, None), nn.ModuleDict)]
    unused: list[nn.Module] = [layer for part in parts for key, layer in part.items() if key not in active]
    return unused


# Measuring


def measure_limits(device: torch.device, dtype: torch.dtype) -> MachineLimits:
    """What `device` reaches in a fraction of a second each; see `MachineLimits`.

    Args:
        device: of the model.
        dtype: of the model.
    """
    return MachineLimits(bandwidth_bytes_per_s=_bandwidth(device), matmul_flops_per_s=_matmul_rate(device, dtype))


def _bandwidth(device: torch.device) -> float:
    num_bytes = 256 * 2**20
    if device.type == "cuda":
        num_bytes = max(2**20, min(2**30, torch.cuda.mem_get_info(device)[0] // 4))
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.zeros_like(source)
    copying = 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)
    return max(copying, source.nbytes / _fastest(lambda: source.sum(), device))


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    best, size = 0.0, 256
    largest = 8192 if device.type == "cuda" else 2048
    while size <= largest:
        left = torch.randn(size, size, device=device).to(dtype)
        right = torch.randn(size, size, device=device).to(dtype)
        seconds = _fastest(lambda left=left, right=right: left @ right, device)  # type: ignore[misc]
        best = max(best, 2 * size**3 / seconds)
        if seconds > 0.03:  # a larger one would take 8 times as long
            break
        size *= 2
    return best


def _fastest(run: Callable[[], Any], device: torch.device, budget_s: float = 0.1) -> float:
    """Seconds of the fastest of several runs, after one to warm up."""
    _timed(run, device)
    best = _timed(run, device)
    ends = time.perf_counter() + budget_s
    for _ in range(50):
        if time.perf_counter() >= ends:
            break
        best = min(best, _timed(run, device))
    return best


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        # events, because launching a kernel takes longer than a small product
        stream = torch.cuda.current_stream(device)
        began, ended = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]
            for _ in range(2)
        )
        began.record(stream)
        run()
        ended.record(stream)
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start

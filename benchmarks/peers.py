"""Training-free ways to a smaller KV cache, as arms for the suites of `depthkv.evaluate`.

Each is restated from its paper as far as a comparison needs it. They run on Llama-like models with full attention, with
batches that need no padding. `equal_bytes_arms` puts them side by side at a share of the full cache's bytes.

| arm | what it does | paper |
|---|---|---|
| KVSharer | layers whose K/V are most unlike read each other's, if the output stays alike | arXiv:2410.18517 |
| MiniCache | neighbouring layers keep one direction for each token and their own norms | arXiv:2405.14366 |
| quantised | transformers' `QuantizedLayer` with a quantiser of a few lines, 8 or 4 bits | arXiv:2402.02750 (KIVI) |
| window | the first 4 and the latest tokens | arXiv:2309.17453 (StreamingLLM) |
| shallower | the layers that change the hidden state least are left out | arXiv:2403.03853 (ShortGPT) |

The untrained model with every k-th layer's cache is `depthkv.evaluate.arms.plan_arms` itself.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, QuantizedLayer

from depthkv import SharingPlan, share
from depthkv.decoder import find_decoder
from depthkv.errors import DepthKVError
from depthkv.evaluate.arms import Arm

SINKS = 4
KEPT = 0.05
"""Of MiniCache: the share of tokens that are not merged, the paper's gamma."""
OVERHEAD = 0.08
"""Of MiniCache at equal bytes: what norms and unmerged tokens may take beyond the share."""
TOWARDS_LATER = 0.6
"""Of MiniCache: where on the arc from the earlier layer's direction to the later one's the merged one lies."""
THRESHOLD = 0.5
"""Of KVSharer: least cosine similarity of the last hidden states with the full cache's."""
CALIBRATION_TOKENS = 64
"""Of KVSharer: read of each block, as in the authors' code."""


def equal_bytes_arms(model: nn.Module, blocks: torch.Tensor, *, tokens: int | None = None) -> dict[float, list[Arm]]:
    """Arms whose cache takes about a half and a quarter of the full one's bytes.

    Of the layers as many are kept as come nearest to that. MiniCache has a group for each of them and `OVERHEAD` more.

    Args:
        model: that will be measured.
        blocks: training text, `[blocks, tokens]`, for the rules that look at the model.
        tokens: context at which the window takes that share; None is at any length.
    """
    decoder = find_decoder(model)
    size = decoder.num_layers
    arms = {}
    for fraction, bits in ((0.5, 8), (0.25, 4)):
        keep = round(fraction * size)
        sizes = group_sizes(size, keep)
        kept = max(0.0, OVERHEAD * keep / size - 1 / decoder.kinds[0].head_dim)
        window = fraction if tokens is None else round(fraction * tokens)
        sharing, within = kvsharer_plan(model, blocks, size - keep)
        arms[fraction] = [
            Arm(label=f"KVSharer{'' if within else ', threshold given up'}, {fraction:.0%}", plan=sharing),
            Arm(label=f"MiniCache, {fraction:.0%}", make_cache=lambda c, s=sizes, k=kept: merged_cache(c, s, k)),
            Arm(label=f"quantised to {bits} bits, {fraction:.0%}", make_cache=lambda c, b=bits: quantised_cache(c, b)),
            Arm(label=f"StreamingLLM window, {fraction:.0%}", make_cache=lambda c, w=window: window_cache(c, w)),
            shallower(model, blocks, keep, f"ShortGPT with {keep} layers, {fraction:.0%}"),
        ]
    return arms


@torch.no_grad()
def measured_bytes(model: Any, arm: Arm, tokens: int, batch: int = 1) -> int:
    """Bytes of every tensor in the cache after so many random tokens: all but one at once, then one."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.get_input_embeddings().num_embeddings, (batch, tokens), generator=generator)
    prompt = prompt.to(next(model.parameters()).device)
    with arm.applied(model):
        cache = DynamicCache(config=model.config) if arm.make_cache is None else arm.make_cache(model.config)
        for part in (prompt[:, :-1], prompt[:, -1:]):
            model(input_ids=part, past_key_values=cache, use_cache=True)
    return stored_bytes(cache)


def stored_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache holds, quantised ones as they are packed, each storage once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: object) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if hasattr(value, "__tensor_flatten__"):  # a tensor made of others
                for name in value.__tensor_flatten__()[0]:
                    visit(getattr(value, name))
            else:
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (DynamicLayer, Group)):
            visit(vars(value))

    visit(list(cache.layers))
    return sum(storages.values())


# Time


class WindowLayer(DynamicLayer):
    """Keeps the first `SINKS` tokens and the latest, `window` in all, at the positions that they had.

    A window below 1 is a share of the tokens so far, which takes that share of the full cache's bytes at any length.
    """

    def __init__(self, window: float) -> None:
        super().__init__()
        self.window = window
        self.seen = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(key_states, value_states)
        self.seen += key_states.shape[-2]
        window = int(self.window) if self.window >= 1 else max(SINKS + 1, round(self.window * self.seen))
        if keys.shape[-2] > window:
            late = keys.shape[-2] - (window - SINKS)
            self.keys = torch.cat([keys[..., :SINKS, :], keys[..., late:, :]], dim=-2)
            self.values = torch.cat([values[..., :SINKS, :], values[..., late:, :]], dim=-2)
        return keys, values

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = self.keys.shape[-2] if self.is_initialized else 0
        return kept + query_length, self.seen - kept  # every kept token counts as one before the query


def window_cache(config: Any, window: float) -> Cache:
    """StreamingLLM's cache. A forward of many tokens sees all of them and what was kept before it."""
    return Cache(layers=[WindowLayer(window) for _ in range(config.num_hidden_layers)])


# Bits


class PackedLayer(QuantizedLayer):
    """transformers' quantised layer with codes of 8 or 4 bits: asymmetric, groups of numbers along the channels.

    transformers' own quanto backend knows no 8 bits, and on a GPU it wants CUDA's compiler. At 4 bits the codes are
    those of quanto.
    """

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        groups = tensor.reshape(*tensor.shape[:-1], -1, min(self.q_group_size, tensor.shape[-1]))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        top = 2**self.nbits - 1
        # a group of equal numbers has no scale of its own
        scale = ((high - low).float() / top).clamp(min=1e-8).to(tensor.dtype)
        codes = ((groups.float() - low.float()) / scale.float()).round().clamp(0, top).to(torch.uint8)
        if self.nbits == 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        return codes, scale, low

    def _dequantize(self, qtensor: Any) -> torch.Tensor:
        codes, scale, low = qtensor
        if self.nbits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        numbers: torch.Tensor = codes.float() * scale.float() + low.float()
        return numbers.to(scale.dtype).flatten(-2)


def quantised_cache(config: Any, bits: int, residual_length: int = 32) -> Cache:
    """transformers' quantised cache: the latest `residual_length` tokens are kept as they are."""
    layers = [
        PackedLayer(nbits=bits, q_group_size=64, residual_length=residual_length)
        for _ in range(config.num_hidden_layers)
    ]
    return Cache(layers=layers)


# Depth


class Group:
    """What layers of one MiniCache group keep together."""

    def __init__(self, size: int, kept: float = KEPT) -> None:
        self.size = size
        self.kept = kept
        self.tokens = 0
        self.pending: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.directions: list[torch.Tensor] = []
        """Of keys and of values, `[batch, kv_heads, tokens, head_dim]` each."""
        self.norms: list[torch.Tensor] = []
        """Of keys and of values, `[layers, batch, kv_heads, tokens, 1]` each."""
        self.places = torch.empty(0, 0, dtype=torch.long)
        """Tokens that are not merged, `[batch, kept]`."""
        self.exact: list[torch.Tensor] = []
        """Their keys and values, `[layers, batch, kv_heads, kept, head_dim]` each."""

    def restore(self, member: int) -> list[torch.Tensor]:
        """Keys and values of one layer."""
        restored = []
        for direction, norms, exact in zip(self.directions, self.norms, self.exact, strict=True):
            whole = direction * norms[member]
            index = self.places[:, None, :, None].expand_as(exact[member])
            restored.append(whole.scatter(2, index, exact[member]))
        return restored

    def merge(self) -> None:
        """Take in the step's keys and values of all layers."""
        parts = [torch.stack([self.pending[i][what] for i in range(self.size)]) for what in (0, 1)]
        self.pending.clear()
        directions, norms, apart = [], [], []
        for part in parts:
            length = part.float().norm(dim=-1, keepdim=True).clamp(min=1e-6)
            unit = part.float() / length
            directions.append(merged_direction(unit).to(part.dtype))
            norms.append(length.to(part.dtype))
            cosine = (unit[1:] * unit[:-1]).sum(-1).clamp(-1, 1)
            apart.append(cosine.arccos().sum(dim=(0, 2)))  # [batch, tokens]
        # counted over all tokens so far: of a short step alone, less than one token would be kept
        count = math.ceil(self.kept * (self.tokens + parts[0].shape[-2])) - self.places.shape[-1]
        places = (apart[0] + apart[1]).topk(count, dim=-1).indices
        index = places[None, :, None, :, None]
        exact = [p.gather(3, index.expand(*p.shape[:3], count, p.shape[-1])) for p in parts]
        if self.tokens == 0:
            self.directions, self.norms, self.places, self.exact = directions, norms, places, exact
        else:
            self.directions = [torch.cat(pair, dim=2) for pair in zip(self.directions, directions, strict=True)]
            self.norms = [torch.cat(pair, dim=3) for pair in zip(self.norms, norms, strict=True)]
            self.places = torch.cat([self.places, places + self.tokens], dim=1)
            self.exact = [torch.cat(pair, dim=3) for pair in zip(self.exact, exact, strict=True)]
        self.tokens += parts[0].shape[-2]


def merged_direction(units: torch.Tensor) -> torch.Tensor:
    """One unit vector for several, `[layers, ..., head_dim]`: on the arc between two (SLERP), the direction of the
    mean of more, which is an extension of ours: the paper merges pairs."""
    if len(units) != 2:
        return nn.functional.normalize(units.mean(0), dim=-1)
    angle = (units[0] * units[1]).sum(-1, keepdim=True).clamp(-1, 1).arccos()
    earlier, later = ((share_of * angle).sin() for share_of in (1 - TOWARDS_LATER, TOWARDS_LATER))
    # the sine of the whole angle, by which both are divided, goes with the length
    arc = earlier * units[0] + later * units[1]
    return nn.functional.normalize(torch.where(angle < 1e-4, units[1], arc), dim=-1)


class MergedLayer(DynamicLayer):
    """One layer's view of its group."""

    def __init__(self, group: Group, member: int) -> None:
        super().__init__()
        self.group, self.member = group, member

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.is_initialized = True
        group = self.group
        past = group.restore(self.member) if group.tokens else [key_states[..., :0, :], value_states[..., :0, :]]
        keys, values = torch.cat([past[0], key_states], dim=-2), torch.cat([past[1], value_states], dim=-2)
        group.pending[self.member] = (key_states, value_states)
        if len(group.pending) == group.size:
            group.merge()
        return keys, values

    def get_seq_length(self) -> int:
        return self.group.tokens


def group_sizes(num_layers: int, groups: int) -> list[int]:
    """Layers of each MiniCache group, as even as possible.

    The paper pairs the layers of the upper half only. Pairs from the first layer on, and more than two in a group, are
    an extension of ours. The larger groups come last, where the paper finds neighbours to be most alike.
    """
    small, larger = divmod(num_layers, groups)
    return [small] * (groups - larger) + [small + 1] * larger


def merged_cache(config: Any, sizes: Sequence[int], kept: float = KEPT) -> Cache:
    """MiniCache over all layers from the first, in groups of these sizes."""
    layers: list[Any] = []
    for size in sizes:
        group = Group(size, kept)
        layers += [MergedLayer(group, i) for i in range(size)]
    if len(layers) != config.num_hidden_layers:
        raise DepthKVError(f"expected groups of {config.num_hidden_layers} layers in all, got {len(layers)}")
    return Cache(layers=layers)


@torch.no_grad()
def kvsharer_plan(model: Any, blocks: torch.Tensor, num_shared: int) -> tuple[SharingPlan, bool]:
    """KVSharer's rule: pairs of layers by the distance of their mean K and V, the most unlike first.

    The later layer of a pair reads the earlier one, or what that one reads, and so do the later one's own readers. A
    pair is taken if the last hidden states of each block stay as alike the full cache's as `THRESHOLD`, on average.

    Returns:
        (the plan, whether the threshold held up to `num_shared` layers). Where it did not, the remaining layers were
        shared in the same order without it.
    """
    decoder = find_decoder(model)
    tokens = blocks[:, :CALIBRATION_TOKENS].to(next(model.parameters()).device)
    cache = DynamicCache(config=model.config)
    expected = _last_hidden(model, tokens, cache)
    means = [torch.stack([layer.keys, layer.values]).float().mean(dim=1).flatten() for layer in cache.layers]
    size = decoder.num_layers
    pairs = [(i, j) for j in range(size) for i in range(j) if decoder.kinds[i] == decoder.kinds[j]]
    ranked = sorted(pairs, key=lambda pair: -float((means[pair[0]] - means[pair[1]]).norm()))
    sources = list(range(size))
    shared = 0
    for checked in (True, False):
        for earlier, later in ranked:
            if shared == num_shared:
                return SharingPlan(sources), checked
            if sources[later] != later:
                continue
            trial = [sources[earlier] if source == later else source for source in sources]
            if checked:
                with share(model, SharingPlan(trial)):
                    alike = torch.cosine_similarity(_last_hidden(model, tokens), expected, dim=1).mean()
                if not alike > THRESHOLD:
                    continue
            sources = trial
            shared += 1
        if shared == num_shared:
            return SharingPlan(sources), checked
    raise DepthKVError(f"expected at most {shared} layers to share, got {num_shared}")


def _last_hidden(model: Any, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
    """The last hidden states, `[blocks, tokens x hidden]`."""
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model
    found: torch.Tensor = inner(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)[0]
    return found.float().flatten(1)


@torch.no_grad()
def block_influence(model: Any, blocks: torch.Tensor) -> list[float]:
    """ShortGPT's measure of each layer: 1 less the cosine of its input and output, mean over tokens."""
    decoder = find_decoder(model)
    influence: list[float] = []

    def measure(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        influence.append(1 - float(torch.cosine_similarity(before.float(), after.float(), dim=-1).mean()))

    handles = [layer.register_forward_hook(measure, with_kwargs=True) for layer in decoder.layers]
    try:
        _last_hidden(model, blocks.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return influence


def shallower(model: Any, blocks: torch.Tensor, keep: int, label: str) -> Arm:
    """Leave out the layers of least influence; the first always stays, as caches count their tokens there."""
    influence = block_influence(model, blocks)
    order = sorted(range(1, len(influence)), key=lambda i: influence[i])
    return Arm(label=label, patch=lambda inner: without_layers(inner, order[: len(influence) - keep]))


@contextmanager
def without_layers(model: nn.Module, dropped: Sequence[int]) -> Iterator[None]:
    """These layers pass their input on and cache nothing meanwhile."""
    layers = [find_decoder(model).layers[i] for i in dropped]
    # accelerate keeps its hooks in an instance's `forward`: whatever is there is put back
    before = [vars(layer).get("forward") for layer in layers]

    def skip(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    for layer in layers:
        layer.forward = types.MethodType(skip, layer)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward

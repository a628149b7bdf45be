"""One layer reads another's keys and values: the only place where that happens.

The attention module's own `forward` runs unchanged. It is handed a stand-in for its cache; K is rotated by then, so
what passes through `update` is exactly what other layers may read (arXiv:2604.22782, section 3). With or without a real
cache, in training and in generation, the path is the same: `LayerCache.update` is where a follower reads its source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from depthkv.architectures import Family

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each `[batch, kv_heads, tokens, head_dim]`."""

Noise = Callable[[int, Pair], Pair]
"""From a layer and its pair to what its readers see. The same in must give the same out: layers may be recomputed."""


class Step:
    """What the layers share during one forward of the decoder (and its recomputation in backward)."""

    def __init__(
        self,
        *maps: tuple[int, ...],
        skip_unread: bool = True,
        keep_pairs: bool = False,
        noise: Noise | None = None,
    ) -> None:
        self.sources = maps[0]
        self.noise = noise
        """Changes what each source gives, itself included."""
        num_layers = len(self.sources)
        # one map for all sequences of the batch, or one for each: then a layer may read a mixture of layers
        self.mixed: list[tuple[int, ...] | None] = [
            None if len({m[i] for m in maps}) == 1 else tuple(m[i] for m in maps) for i in range(num_layers)
        ]
        readers: dict[int, int] = {}  # source -> its last reader, other than itself
        for layer in range(num_layers):
            for source in {m[layer] for m in maps} - {layer}:
                readers[source] = layer
        self.last_reader = readers
        # a layer computes K and V if it reads them itself or another layer does
        self.computes_kv = [not skip_unread or i in readers or any(m[i] == i for m in maps) for i in range(num_layers)]
        self.is_idle = [
            computed and i not in readers and all(m[i] != i for m in maps)
            for i, computed in enumerate(self.computes_kv)
        ]
        """Layers whose K and V are computed for nothing but that their weights get a gradient."""
        self.pairs: dict[int, Pair] = {}
        self.keep_pairs = keep_pairs
        """Checkpointed layers read their source's pair again when they are recomputed."""
        self.num_last_positions: int | None = None
        """Layers above the last leader run for so many last positions only; None = all."""
        self.tail_inputs: dict[str, Any] = {}
        self.observed: dict[int, bool] = {}
        """Leaders whose readers tell what they attend to (`depthkv.compress`)."""


class Context:
    """Tells every patched module which `Step` it is in."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.latest: Step | None = None
        self.in_force = False
        """The modules are patched: neither removed nor suspended."""

    def current(self) -> Step:
        step = self.step or self.latest
        if step is None:
            raise RuntimeError(
                "expected the attention layer to run inside the model's forward, got a call from outside"
            )
        return step

    @contextmanager
    def bound(self, step: Step) -> Iterator[None]:
        """Make `step` the current one."""
        previous, self.step = self.step, step
        try:
            yield
        finally:
            self.step = previous


class LayerCache:
    """What an attention module gets instead of its KV cache: sees each layer's pair and gives it its source's."""

    def __init__(self, step: Step, layer: int, cache: Any) -> None:
        self._step = step
        self._layer = layer
        self._cache = cache

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Pair:
        """The pair that the layer attends to.

        A leader's goes through the real cache first (if there is one): what that returns, past tokens included, is what
        followers read, so a quantised cache is read back once for the whole group.
        """
        step, layer = self._step, self._layer
        source = step.sources[layer]
        pair = (keys, values)
        if step.computes_kv[layer]:
            if self._cache is not None:
                pair = self._cache.update(keys, values, layer_idx, *args, **kwargs)
            if step.noise is not None:
                pair = step.noise(layer, pair)
            # first write wins: a recomputed pair must not replace the one that the autograd graph knows
            if layer in step.last_reader and layer not in step.pairs:
                step.pairs[layer] = pair
        mixed = step.mixed[layer]
        if mixed is not None:
            pair = self._mixture(mixed, pair)
        elif source != layer:
            pair = step.pairs[source]
            self._forget((source,))
            # layers may live on different devices (accelerate's device_map)
            pair = pair[0].to(keys.device), pair[1].to(values.device)
        if step.is_idle[layer] and keys.requires_grad:
            # DistributedDataParallel waits for a gradient of every weight: of these it is zero
            pair = pair[0] + 0 * keys.sum(), pair[1] + 0 * values.sum()
        return pair

    def _mixture(self, sources: tuple[int, ...], own: Pair) -> Pair:
        """Sequence b of the batch gets the pair of `sources[b]`."""
        pairs = {source: own if source == self._layer else self._step.pairs[source] for source in set(sources)}
        mixture = (
            torch.stack([pairs[source][part][row].to(own[part].device) for row, source in enumerate(sources)])
            for part in (0, 1)
        )
        keys, values = mixture
        self._forget(pairs)
        return keys, values

    def _forget(self, sources: Iterable[int]) -> None:
        """Drop pairs that no later layer reads."""
        step = self._step
        for source in sources:
            if step.last_reader.get(source) == self._layer and not step.keep_pairs:
                del step.pairs[source]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def attention_forward(
    context: Context, layer: int, cache_argument: str, original: Callable[..., Any]
) -> Callable[..., Any]:
    """The attention module's forward, with its cache replaced by a `LayerCache`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs[cache_argument] = LayerCache(context.current(), layer, kwargs.get(cache_argument))
        return original(*args, **kwargs)

    return forward


def projection_forward(
    context: Context, layer: int, out_features: int, original: Callable[..., Any]
) -> Callable[..., Any]:
    """`k_proj` or `v_proj`: not computed where nobody reads the result."""

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if context.current().computes_kv[layer]:
            return original(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        # the module's code reshapes, rotates and drops this; LayerCache.update gives the source's instead
        return hidden_states.new_zeros(*hidden_states.shape[:-1], out_features)

    return forward


def norm_forward(context: Context, layer: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """The norm on keys: not computed where nobody reads the result."""

    def forward(keys: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if context.current().computes_kv[layer]:
            return original(keys, *args, **kwargs)  # type: ignore[no-any-return]
        return keys

    return forward


@dataclass(frozen=True, kw_only=True)
class FusedLayout:
    """A projection that computes Q, K and V at once."""

    projection: nn.Module
    family: Family
    num_heads: int
    head_dim: int


def fused_forward(
    context: Context, layer: int, layout: FusedLayout, original: Callable[..., Any]
) -> Callable[..., Any]:
    """A fused QKV projection: only its query rows are computed where nobody reads K and V."""
    projection, num_heads, head_dim = layout.projection, layout.num_heads, layout.head_dim

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # an adapter, a quantised or an offloaded projection has no plain weight to slice: compute all of it
        plain = type(projection) in (nn.Linear, Conv1D) and not hasattr(projection, "_hf_hook")
        if context.current().computes_kv[layer] or not plain:
            return original(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        weight, bias = projection.weight, projection.bias
        assert isinstance(weight, torch.Tensor) and (bias is None or isinstance(bias, torch.Tensor))
        query_size = num_heads * head_dim
        if layout.family.fused_layout == "heads":
            # [heads, 3, head_dim, hidden]: a batched product reads the query rows in place, without copying them
            per_head = weight.view(num_heads, 3, head_dim, -1)[:, 0]
            tokens = hidden_states.reshape(1, -1, hidden_states.shape[-1])
            query = torch.matmul(tokens, per_head.transpose(1, 2))  # [heads, tokens, head_dim]
            if bias is not None:
                query = query + bias.view(num_heads, 3, 1, head_dim)[:, 0]
            query = query.transpose(0, 1)
            rest = query.new_zeros(*query.shape[:-1], 2 * head_dim)
            return torch.cat([query, rest], dim=-1).reshape(*hidden_states.shape[:-1], 3 * query_size)
        if isinstance(projection, Conv1D):  # weight is [in, out]
            query = hidden_states @ weight[:, :query_size]
            query = query if bias is None else query + bias[:query_size]
            out_features = weight.shape[1]
        else:
            query = nn.functional.linear(
                hidden_states, weight[:query_size], None if bias is None else bias[:query_size]
            )
            out_features = weight.shape[0]
        rest = query.new_zeros(*query.shape[:-1], out_features - query_size)
        return torch.cat([query, rest], dim=-1)

    return forward

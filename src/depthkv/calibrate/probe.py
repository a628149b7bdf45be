"""A patched model in which one layer can be made to read another's keys and values, starting from any layer.

What lies below the layer in question is the same for all its sources, so it is computed once, recorded, and passed over
afterwards: measuring every source of every layer then costs about a third of as many whole forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from depthkv.attention import Pair, Step
from depthkv.decoder import find_decoder
from depthkv.patches import Patches, adapter_switch, guarded, patch_layers


@dataclass(kw_only=True)
class Recording:
    """What the layers saw in one forward in which each read its own keys and values."""

    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    """Hidden states that enter each layer, `[batch, tokens, hidden_size]`."""
    pairs: dict[int, Pair] = field(default_factory=dict)
    """Keys (after the rotary embedding) and values of each layer, `[batch, kv_heads, tokens, head_dim]`."""
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    """Keys before the rotary embedding, `[batch, tokens, kv_heads, head_dim]`; only if asked for."""
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    """Arguments of each attention module; only if asked for."""
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    """What each attention module gave, `[batch, tokens, hidden_size]`; only if asked for."""


class Probe(Patches):
    """The model as it runs under a plan (an adapter that belongs to sharing is on), with each forward's map chosen.

    Use it as a context manager; leaving it restores the model exactly. In between the model is called as usual, inside
    `recording()` or `reading(layer, source)`.

    Raises:
        PlanError: the model is shared or routed already.
        UnsupportedModelError: as for `share`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(find_decoder(model), adapter_switch(model))
        self.decoder = self._decoder
        self.recorded = Recording()
        """Of the last forward inside `recording()`."""
        self._step = self._own()
        self._start: int | None = None
        """Layers below it are passed over; None records."""
        self._keys = self._attention = False
        """What to record beside inputs and pairs."""
        guarded(self, self._apply)

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return self.decoder.num_layers

    @contextmanager
    def recording(self, *, keys: bool = False, attention: bool = False) -> Iterator[Recording]:
        """Forwards in the block run with every layer's own keys and values; the last one is recorded.

        Args:
            keys: keys before the rotary embedding, too.
            attention: arguments and outputs of the attention modules, too.
        """
        self.recorded = Recording()
        self._step, self._start, self._keys, self._attention = self._own(), None, keys, attention
        # all pairs are kept, whoever reads them
        self._step.last_reader = dict.fromkeys(range(self.num_layers), self.num_layers)
        try:
            yield self.recorded
        finally:
            self._keys = self._attention = False

    @contextmanager
    def reading(self, layer: int, source: int) -> Iterator[None]:
        """Forwards in the block, of the batch that was recorded, run from `layer` on, which reads `source`."""
        sources = list(range(self.num_layers))
        sources[layer] = source
        self._step = Step(tuple(sources), keep_pairs=True)
        self._step.pairs = {source: self.recorded.pairs[source]}
        self._start = layer
        yield

    def attention_output(self, layer: int, source: int) -> torch.Tensor:
        """What the layer's attention gives when it reads `source`, `[batch, tokens, hidden_size]`.

        The recording must have been made with `attention`.
        """
        with self.reading(layer, source), self._context.bound(self._step):
            args, kwargs = self.recorded.calls[layer]
            return _first(self.decoder.attention(layer)(*args, **kwargs))

    def _own(self) -> Step:
        return Step(tuple(range(self._decoder.num_layers)), keep_pairs=True)

    def _apply(self) -> None:
        decoder, family = self._decoder, self._decoder.family
        everyone = set(range(decoder.num_layers))
        # innermost first: what is recorded is what the module's own code computed
        for layer in everyone:
            module = decoder.attention(layer)
            norm = getattr(module, family.k_norm, None) if family.k_norm else None
            if isinstance(norm, nn.Module):
                self._replace(norm, "forward", partial(self._record_keys, layer, False))
            elif family.fused is None:
                self._replace(getattr(module, family.k_proj), "forward", partial(self._record_keys, layer, False))
            else:
                self._replace(getattr(module, family.fused), "forward", partial(self._record_keys, layer, True))
        patch_layers(self, self._context, everyone, everyone)
        for layer in everyone:
            self._replace(decoder.attention(layer), "forward", partial(self._record_attention, layer))
            self._replace(decoder.layers[layer], "forward", partial(self._wrap_layer, layer))
        self._replace(decoder.module, "forward", self._wrap_decoder)

    def _wrap_decoder(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs["use_cache"] = False
            if self._start is None:
                self._step.pairs = self.recorded.pairs = {}
            with self._context.bound(self._step):
                return original(*args, **kwargs)

        return forward

    def _wrap_layer(self, layer: int, original: Callable[..., Any]) -> Callable[..., Any]:
        gives_tuple = False

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal gives_tuple
            if self._start is None:
                self.recorded.inputs[layer] = hidden_states
                output = original(hidden_states, *args, **kwargs)
                gives_tuple = isinstance(output, tuple)
                return output
            if layer < self._start:
                return (hidden_states,) if gives_tuple else hidden_states
            if layer == self._start:
                hidden_states = self.recorded.inputs[layer]
            return original(hidden_states, *args, **kwargs)

        return forward

    def _record_attention(self, layer: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._attention:
                return original(*args, **kwargs)
            self.recorded.calls[layer] = (args, dict(kwargs))
            output = original(*args, **kwargs)
            self.recorded.outputs[layer] = _first(output)
            return output

        return forward

    def _record_keys(self, layer: int, fused: bool, original: Callable[..., Any]) -> Callable[..., Any]:
        kind = self._decoder.kinds[layer]
        shape = (kind.kv_heads, kind.head_dim)

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            output: torch.Tensor = original(hidden_states, *args, **kwargs)
            if self._keys:
                keys = self._keys_of_fused(output, *shape) if fused else output
                # a norm may see [batch, kv_heads, tokens, head_dim], which is a view of [batch, tokens, ...]
                if keys.ndim == 4 and hidden_states.stride(1) < hidden_states.stride(2):
                    keys = keys.transpose(1, 2)
                self.recorded.keys[layer] = keys.reshape(keys.shape[0], -1, *shape)
            return output

        return forward

    def _keys_of_fused(self, output: torch.Tensor, kv_heads: int, head_dim: int) -> torch.Tensor:
        if self._decoder.family.fused_layout == "heads":
            return output.view(*output.shape[:-1], kv_heads, 3, head_dim)[..., 1, :]
        size = kv_heads * head_dim
        return output[..., -2 * size : -size]


def _first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found

"""What the layers share in one forward under adaptive sharing: a prompt that is being decided, or later tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from depthkv.adaptive.cache import GroupedLayer, Pair
from depthkv.adaptive.ladder import Sources
from depthkv.adaptive.router import Prompt, Router
from depthkv.architectures import LayerKind
from depthkv.attention import Context, LayerCache
from depthkv.errors import PlanError


class PromptStep:
    """One sequence's prompt: each layer's source is decided when the prompt gets there.

    A layer that joins a leader drops its own pair at once; so what is alive is what the cache keeps and the pair of
    the present layer.
    """

    def __init__(
        self,
        router: Router,
        kinds: Sequence[LayerKind],
        num_tokens: int,
        tokens: torch.Tensor | None,
        layers: Sequence[GroupedLayer] | None,
        may_lead: Callable[[list[int], int], bool],
    ) -> None:
        self.router = router
        self.prompt = Prompt(kinds=tuple(kinds), num_tokens=num_tokens, tokens=tokens)
        self.layers = layers
        """Where leaders' pairs are kept; None where there is no cache."""
        self.fixed: Sources | None = None
        self.may_lead = may_lead
        """Whether the layer has room, given the sources so far."""
        self.computes_kv = [True] * len(kinds)
        self.pairs: dict[int, Pair] = {}
        self.had_no_room = False
        self.num_last_positions: int | None = None
        """Of a map that is known: see `depthkv.attention.Step`."""
        self.tail_inputs: dict[str, Any] = {}

    @property
    def sources(self) -> Sequence[int]:
        """As far as they are known."""
        return self.prompt.sources if self.fixed is None else self.fixed

    def fix(self, sources: Sources) -> None:
        """The whole map is known."""
        self.fixed = sources
        self.computes_kv = [source == layer for layer, source in enumerate(sources)]

    def enter(self, layer: int, hidden: torch.Tensor | None) -> None:
        """The attention of `layer` begins."""
        prompt = self.prompt
        if len(prompt.sources) > layer:  # decided in this forward already: a recomputed layer
            return
        prompt.hidden = None if hidden is None else hidden[0]
        prompt.may_lead = self.may_lead(prompt.sources, layer)
        leaders = prompt.leaders(layer)
        if self.fixed is not None:
            self._decide(layer, self.fixed[layer])
        elif not leaders:
            self._decide(layer, layer)
        elif not self.router.needs_kv:
            self._decide(layer, self.router.source(layer, prompt, None))
        elif not prompt.may_lead and len(leaders) == 1:
            self._decide(layer, leaders[0])

    def pair(self, layer: int, keys: torch.Tensor, values: torch.Tensor, args: Any, kwargs: Any) -> Pair:
        """The pair that the layer reads, each `[1, kv_heads, tokens, head_dim]`."""
        prompt = self.prompt
        if len(prompt.sources) == layer:
            self._decide(layer, self.router.source(layer, prompt, (keys[0], values[0])))
        source = prompt.sources[layer]
        if source == layer and layer not in self.pairs:
            pair = (keys, values)
            if self.layers is not None:
                self.layers[layer].sources = [layer]
                pair = self.layers[layer].store(keys, values, *args, **kwargs)
            self.pairs[layer] = pair
            prompt.pairs[layer] = (pair[0][0], pair[1][0])
        pair = self.pairs[source]
        return pair[0].to(keys.device), pair[1].to(values.device)

    def _decide(self, layer: int, source: int) -> None:
        leaders = self.prompt.leaders(layer)
        if isinstance(source, bool):
            raise PlanError(f"expected {type(self.router).__name__} to answer with a layer, got {source}")
        if source == layer and leaders and self.fixed is None and not self.prompt.may_lead:
            self.had_no_room, source = True, leaders[-1]
        elif self.had_no_room and 0 <= source < layer:
            source = self.prompt.sources[source]  # what the router takes for a leader may have become none
        if source != layer and source not in leaders:
            raise PlanError(
                f"expected {type(self.router).__name__} to let layer {layer} read itself or a leader among {leaders}, "
                f"got layer {source}"
            )
        self.prompt.sources.append(int(source))
        self.computes_kv[layer] = source == layer


class TokenStep:
    """Tokens after the prompt: every sequence of the batch keeps to its own map."""

    def __init__(self, layers: Sequence[GroupedLayer]) -> None:
        self.layers = layers
        self.rows = [layer.rows for layer in layers]
        self.computes_kv = [bool(rows) for rows in self.rows]
        self.pairs: dict[int, Pair] = {}
        self.last_reader = {source: layer for layer, entry in enumerate(layers) for source in entry.sources}
        self.num_last_positions: int | None = None  # later tokens run through all layers

    def enter(self, layer: int, hidden: torch.Tensor | None) -> None:
        """The attention of `layer` begins."""

    def pair(self, layer: int, keys: torch.Tensor, values: torch.Tensor, args: Any, kwargs: Any) -> Pair:
        """The pairs that the layer reads, past tokens included, each `[batch, kv_heads, tokens, head_dim]`."""
        entry = self.layers[layer]
        if self.rows[layer] and layer not in self.pairs:
            self.pairs[layer] = entry.store(keys, values, *args, **kwargs)
        sources = sorted(set(entry.sources))
        if len(sources) == 1:
            pair = self.pairs[sources[0]]
            pair = pair[0].to(keys.device), pair[1].to(values.device)
        else:
            pair = self._mixture(entry, sources, keys.device)
        for source in sources:
            if self.last_reader[source] == layer:
                del self.pairs[source]
        return pair

    def _mixture(self, entry: GroupedLayer, sources: list[int], device: torch.device) -> Pair:
        """Sequence b gets the pair of its own source; alive for this layer only."""
        mixed = []
        for side in (0, 1):
            first = self.pairs[sources[0]][side]
            whole = first.new_empty(len(entry.sources), *first.shape[1:], device=device)
            for source in sources:
                rows = [row for row, read in enumerate(entry.sources) if read == source]
                kept = self.rows[source]
                part = self.pairs[source][side]
                places = torch.tensor([kept.index(row) for row in rows], device=part.device)
                part = part if len(rows) == len(kept) else part[places]
                whole[torch.tensor(rows, device=device)] = part.to(device)
            mixed.append(whole)
        return mixed[0], mixed[1]


class AdaptiveCache(LayerCache):
    """A `LayerCache` of a `PromptStep` or `TokenStep`, which know what each sequence reads."""

    _step: Any

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Pair:
        """The pair that the layer attends to."""
        pair: Pair = self._step.pair(self._layer, keys, values, args, kwargs)
        return pair


def attention_forward(
    context: Context, layer: int, cache_argument: str, original: Callable[..., Any]
) -> Callable[..., Any]:
    """The attention module's forward, with its cache replaced by an `AdaptiveCache`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        step: Any = context.current()
        step.enter(layer, args[0] if args else kwargs.get("hidden_states"))
        kwargs[cache_argument] = AdaptiveCache(step, layer, kwargs.get(cache_argument))
        return original(*args, **kwargs)

    return forward

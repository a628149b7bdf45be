"""`share(model, router)`: the map is chosen for each sequence in its prefill, and can shrink while it is written."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache, DynamicCache, StoppingCriteria

from depthkv.adaptive.budget import KVBudget, Limit, map_bytes, require_room, shed
from depthkv.adaptive.cache import GroupedLayer, grouped_layers, sources_of
from depthkv.adaptive.ladder import Ladder, Sources, nearest_sources
from depthkv.adaptive.prompts import first_alike, join_outputs, one_prompt, prompt_starts
from depthkv.adaptive.router import FixedRouter, Router
from depthkv.adaptive.steps import PromptStep, TokenStep, attention_forward
from depthkv.checkpointing import is_checkpointed
from depthkv.decoder import Decoder
from depthkv.errors import KVBudgetError, PlanError
from depthkv.memory import measured_cache_bytes
from depthkv.plan import SharingPlan
from depthkv.prefill import Tail
from depthkv.sharing import Patches, _guarded, _patch_layers, _patch_tail, check_plan


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one forward left in the cache."""

    num_tokens: int
    """Of each sequence so far, padding included."""
    maps: tuple[Sources, ...]
    """One for each sequence."""
    cache_bytes: int
    """Of the storage that the cache really holds."""
    given_up: tuple[tuple[int, int], ...]
    """Sequence and layer of each leader that was given up before this forward."""


class AdaptiveModel(Patches):
    """Handle that `share(model, router)` and `share(model, plan, kv_budget=...)` return."""

    def __init__(
        self,
        decoder: Decoder,
        router: Router,
        budget: KVBudget,
        switch: Callable[[bool], None] | None = None,
    ) -> None:
        router.check(decoder.kinds)
        budget.now()
        super().__init__(decoder, switch)
        self.router = router
        """What decides in prefill."""
        self.budget = budget
        """May be replaced at any time, also from another thread: it is looked at before each step."""
        self.on_step: Callable[[StepReport], None] | None = None
        """Called after every forward that leaves a cache."""
        self.ended_for_room = False
        """The last `generate()` ended because the budget had no room for another token."""
        self.last_maps: tuple[Sources, ...] = ()
        """The maps of the last forward, one for each sequence."""
        self._tail: Tail | None = None
        self._ladder = router.ladder or Ladder(decoder.kinds)
        self._dtype = next(decoder.model.parameters()).dtype
        self._latest: Callable[[], Cache | None] = lambda: None
        _guarded(self, self._apply)

    @classmethod
    def under(
        cls, decoder: Decoder, plan: SharingPlan, budget: KVBudget, switch: Callable[[bool], None] | None = None
    ) -> AdaptiveModel:
        """Every sequence begins with `plan`, and goes down its ladder."""
        check_plan(plan, decoder.kinds)
        return cls(decoder, FixedRouter(plan.kv_source_layers, Ladder.of(plan, decoder.kinds)), budget, switch)

    def _apply(self) -> None:
        decoder, context = self._decoder, self._context
        everyone = set(range(decoder.num_layers))
        _patch_layers(self, context, everyone, everyone, attention_forward)
        if isinstance(self.router, FixedRouter):  # what a sequence gives up only lengthens the tail
            self._tail = _patch_tail(self, context, SharingPlan(self.router.sources))
        self._replace(decoder.module, "forward", self._wrap_decoder)
        if callable(getattr(decoder.model, "generate", None)):
            self._replace(decoder.model, "generate", self._wrap_generate)

    def _wrap_decoder(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(self._decoder.module.forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            arguments |= arguments.pop("kwargs", {})
            return self._run(original, arguments)

        return forward

    def _run(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        decoder = self._decoder
        if is_checkpointed(decoder):
            raise PlanError("expected a model without gradient checkpointing, since adaptive sharing is for inference")
        inputs = arguments.get("input_ids")
        batch, tokens = (arguments["inputs_embeds"] if inputs is None else inputs).shape[:2]
        cache = arguments.get("past_key_values")
        uses_cache = arguments.get("use_cache")
        if cache is None and (getattr(decoder.config, "use_cache", True) if uses_cache is None else uses_cache):
            cache = arguments["past_key_values"] = DynamicCache(config=decoder.config)
        layers = None if cache is None else grouped_layers(cache, decoder.num_layers)
        given_up: list[tuple[int, int]] = []
        if layers is None or not layers[0].sources:
            output = self._read_prompts(original, arguments, cache, layers, batch, tokens)
        else:
            if len(layers[0].sources) != batch:
                raise PlanError(f"expected {len(layers[0].sources)} sequences, as in the cache, got {batch}")
            given_up = self._make_room(layers, tokens)
            with self._context.bound(TokenStep(layers)):  # type: ignore[arg-type]
                output = original(**arguments)
        if layers is not None:
            assert cache is not None
            for layer in layers:
                layer.advance(tokens)
            self._latest = weakref.ref(cache)
            self.last_maps = tuple(sources_of(layers))
            if self.on_step is not None:
                self.on_step(
                    StepReport(
                        num_tokens=layers[0].num_tokens,
                        maps=self.last_maps,
                        cache_bytes=measured_cache_bytes(cache),
                        given_up=tuple(given_up),
                    )
                )
        return output

    # Prompts

    @torch.no_grad()
    def _read_prompts(
        self,
        original: Callable[..., Any],
        arguments: dict[str, Any],
        cache: Cache | None,
        layers: list[GroupedLayer] | None,
        batch: int,
        tokens: int,
    ) -> Any:
        """Each sequence alone, without its padding: what is decided for it cannot depend on the others."""
        total, sequence = self.budget.now() if layers is not None else (None, None)
        smallest = nearest_sources(sorted(self._ladder.required), self._decoder.kinds)
        least = map_bytes(smallest, self._decoder.kinds, self._dtype, tokens)
        require_room([least] * batch, total, sequence, tokens)
        starts = prompt_starts(arguments.get("attention_mask"), batch, tokens)
        if batch == 1 and starts == [0]:
            step = self._prompt_step(arguments, layers, _least(total, sequence), tokens)
            with self._context.bound(step):  # type: ignore[arg-type]
                output = original(**arguments)
            self.last_maps = (tuple(step.prompt.sources),)
            if layers is not None:
                for layer, source in zip(layers, step.prompt.sources, strict=True):
                    layer.assign([source])
            return output
        parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self._decoder.kinds]
        maps: list[Sources] = []
        outputs: list[Any] = []
        left = total
        # under a budget of all together the room differs from row to row
        alike = first_alike(arguments, starts) if total is None else list(range(batch))
        for row, start in enumerate(starts):
            if (first := alike[row]) != row:
                maps.append(maps[first])
                outputs.append(outputs[first])
                for at, held in enumerate(parts):
                    if maps[first][at] == at and layers is not None:
                        held.append(held[sum(sources[at] == at for sources in maps[:first])])
                continue
            own = None if layers is None else [_fresh(layer) for layer in layers]
            room = _least(None if left is None else left // (batch - row), sequence)
            row_cache = None if own is None else Cache(layers=list(own))
            prompt = one_prompt(arguments, row, start, row_cache)
            step = self._prompt_step(prompt, own, room, tokens)
            with self._context.bound(step):  # type: ignore[arg-type]
                outputs.append(original(**prompt))
            maps.append(tuple(step.prompt.sources))
            for number, kept in enumerate(own or []):
                if kept.keys is not None and kept.values is not None:
                    parts[number].append((kept.keys, kept.values))
            if left is not None:
                left -= map_bytes(maps[-1], self._decoder.kinds, self._dtype, tokens)
        del step, own, row_cache, prompt
        self.last_maps = tuple(maps)
        for entry in layers or []:
            entry.sources = [sources[entry.layer] for sources in maps]
            if parts[entry.layer]:
                entry.fill(parts[entry.layer], tokens)
        return join_outputs(outputs, starts, tokens, cache)

    def _prompt_step(
        self, arguments: dict[str, Any], layers: list[GroupedLayer] | None, room: int | None, stored_tokens: int
    ) -> PromptStep:
        kinds, ladder = self._decoder.kinds, self._ladder
        ids = arguments.get("input_ids")
        num_tokens = (arguments["inputs_embeds"] if ids is None else ids).shape[1]

        def size(sources: Sequence[int]) -> int:
            return map_bytes(sources, kinds, self._dtype, stored_tokens)

        def may_lead(so_far: list[int], layer: int) -> bool:
            if room is None:
                return True
            ahead = [i if i in ladder.required else -1 for i in range(layer + 1, len(kinds))]
            return size([*so_far, layer, *ahead]) <= room

        step = PromptStep(self.router, kinds, num_tokens, None if ids is None else ids[0], layers, may_lead)
        step.num_last_positions = None if self._tail is None else self._tail.positions_needed()
        known = self.router.start(step.prompt)
        if known is not None:
            while room is not None and size(known) > room and (below := ladder.smaller(known)) is not None:
                known = below
            step.fix(known)
        return step

    # Later tokens

    def _make_room(self, layers: list[GroupedLayer], tokens: int) -> list[tuple[int, int]]:
        """Give up leaders, as far as the next tokens need it; returns the sequence and layer of each."""
        before = sources_of(layers)
        maps = shed(layers, self._ladder, *self.budget.now(), tokens)
        if maps == before:
            return []
        for layer in layers:
            layer.assign([sources[layer.layer] for sources in maps])
        return [
            (row, layer)
            for row, (old, new) in enumerate(zip(before, maps, strict=True))
            for layer in range(len(old))
            if old[layer] == layer != new[layer]
        ]

    def has_room(self, cache: Cache, num_tokens: int = 1) -> bool:
        """Whether so many more tokens of each sequence would fit, with as many leaders given up as that needs."""
        layers = grouped_layers(cache, self._decoder.num_layers)
        try:
            shed(layers, self._ladder, *self.budget.now(), num_tokens)
        except KVBudgetError:
            return False
        return True

    # generate()

    @contextmanager
    def limited(self, kv_budget: Limit | None) -> Iterator[None]:
        """Another budget of the whole batch meanwhile; None changes nothing."""
        before = self.budget
        if kv_budget is not None:
            self.budget = replace(before, total=kv_budget)
            self.budget.now()
        try:
            yield
        finally:
            self.budget = before

    def _wrap_generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(*args: Any, kv_budget: Limit | None = None, **kwargs: Any) -> Any:
            with self.limited(kv_budget):
                self.ended_for_room = False
                given = kwargs.pop("stopping_criteria", None) or []
                return original(*args, stopping_criteria=[*given, _OutOfRoom(self)], **kwargs)

        return generate


class _OutOfRoom(StoppingCriteria):
    """Ends generation like `max_length` where the budget has no room for one more token, whatever is given up."""

    def __init__(self, handle: AdaptiveModel) -> None:
        self._handle = handle

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        cache = self._handle._latest()
        done = cache is not None and not self._handle.has_room(cache)
        self._handle.ended_for_room |= done
        return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _fresh(layer: GroupedLayer) -> GroupedLayer:
    own = layer.own
    return GroupedLayer(layer.layer, type(own)(own.sliding_window) if layer.window is not None else type(own)())

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
from depthkv.adaptive.prompts import first_alike, join_outputs, one_prompt, prompt_starts, without_cache
from depthkv.adaptive.router import FixedRouter, Router
from depthkv.adaptive.steps import PromptStep, TokenStep, attention_forward
from depthkv.decoder import Decoder
from depthkv.errors import KVBudgetError, PlanError
from depthkv.export import require_kv
from depthkv.memory import measured_cache_bytes
from depthkv.patches import Patches, by_name, guarded, patch_layers, patch_tail, wants_cache
from depthkv.plan import SharingPlan
from depthkv.prefill import Tail
from depthkv.sharing import check_plan


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
        router.check(decoder.kinds, int(decoder.config.get_text_config().hidden_size))
        budget.now()
        ladder = router.ladder or Ladder(decoder.kinds)
        if ladder.kinds != decoder.kinds:
            raise PlanError(f"expected a ladder for the {decoder.num_layers} layers of the model, got one for others")
        require_kv(decoder, set(router.sources) if isinstance(router, FixedRouter) else range(decoder.num_layers))
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
        self._ladder = ladder
        self._call_total: Limit | None = None
        """Of the present `generate()`."""
        self._granted: tuple[int | None, int | None] | None = None
        """Limits under which `generate()` was told that there is room for the next token."""
        self._latest: Callable[[], Cache | None] = lambda: None
        guarded(self, self._apply)

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
        patch_layers(self, context, everyone, everyone, attention_forward)
        if isinstance(self.router, FixedRouter):  # what a sequence gives up only lengthens the tail
            self._tail = patch_tail(self, context, SharingPlan(self.router.sources))
        self._replace(decoder.module, "forward", self._wrap_decoder)
        if callable(getattr(decoder.model, "generate", None)):
            self._replace(decoder.model, "generate", self._wrap_generate)

    def _wrap_decoder(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(self._decoder.module.forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(original, by_name(signature, args, kwargs))

        return forward

    def _run(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        decoder = self._decoder
        if decoder.module.training and torch.is_grad_enabled():
            raise PlanError(
                "expected a model in evaluation mode or torch.no_grad(), since adaptive sharing is for inference, "
                "got one in training"
            )
        with torch.no_grad():
            return self._run_without_gradient(original, arguments)

    def _run_without_gradient(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        decoder = self._decoder
        inputs = arguments.get("input_ids")
        batch, tokens = (arguments["inputs_embeds"] if inputs is None else inputs).shape[:2]
        cache = arguments.get("past_key_values")
        if cache is None and wants_cache(arguments, decoder.config):
            cache = arguments["past_key_values"] = DynamicCache(config=decoder.config)
        layers = None if cache is None else grouped_layers(cache, decoder.num_layers)
        given_up: list[tuple[int, int]] = []
        if layers is None or not layers[0].sources:
            self._latest = lambda: None
            try:
                output = self._read_prompts(original, arguments, cache, layers, batch, tokens)
            except BaseException:  # what is half decided must not be gone on with
                for layer in layers or []:
                    layer.reset()
                raise
        else:
            if len(layers[0].sources) != batch:
                raise PlanError(f"expected {len(layers[0].sources)} sequences, as in the cache, got {batch}")
            given_up = self._make_room(layers, tokens)
            with self._context.bound(self._token_step(layers)):  # type: ignore[arg-type]
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

    @property
    def _dtype(self) -> torch.dtype:
        """Of keys and values, as far as the weights tell."""
        return next(p.dtype for p in self._decoder.model.parameters() if p.is_floating_point())

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
        total, sequence = self._limits() if layers is not None else (None, None)
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
                outputs.append(without_cache(original(**prompt)))
            maps.append(tuple(step.prompt.sources))
            for number, kept in enumerate(own or []):
                if kept.keys is not None and kept.values is not None:
                    parts[number].append((kept.keys, kept.values))
            del step, own, row_cache, prompt  # `parts` alone holds the pairs, so that `fill` frees layer by layer
            if left is not None:
                left -= map_bytes(maps[-1], self._decoder.kinds, self._dtype, tokens)
        output = join_outputs(outputs, starts, tokens, cache)
        self.last_maps = tuple(maps)
        for entry in layers or []:
            entry.sources = [sources[entry.layer] for sources in maps]
            if parts[entry.layer]:
                entry.fill(parts[entry.layer], tokens)
        return output

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
            known = SharingPlan(known).kv_source_layers
            check_plan(SharingPlan(known), kinds)
            while room is not None and size(known) > room and (below := ladder.smaller(known)) is not None:
                known = below
            step.fix(known)
        return step

    # Later tokens

    def _token_step(self, layers: list[GroupedLayer]) -> TokenStep:
        """How layers find the pairs that they read."""
        return TokenStep(layers)

    def _make_room(self, layers: list[GroupedLayer], tokens: int) -> list[tuple[int, int]]:
        """Give up leaders, as far as the next tokens need it; returns the sequence and layer of each."""
        before = sources_of(layers)
        limits, self._granted = self._granted or self._limits(), None
        maps = shed(layers, self._ladder, *limits, tokens)
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
        return self._has_room(cache, num_tokens, self._limits())

    def _has_room(self, cache: Cache, num_tokens: int, limits: tuple[int | None, int | None]) -> bool:
        try:
            shed(grouped_layers(cache, self._decoder.num_layers), self._ladder, *limits, num_tokens)
        except KVBudgetError:
            return False
        return True

    def _limits(self) -> tuple[int | None, int | None]:
        budget = self.budget
        return (budget if self._call_total is None else replace(budget, total=self._call_total)).now()

    # generate()

    @contextmanager
    def limited(self, kv_budget: Limit | None) -> Iterator[None]:
        """Another budget of the whole batch meanwhile; None changes nothing."""
        before = self._call_total
        try:
            self._call_total = before if kv_budget is None else kv_budget
            self._limits()
            yield
        finally:
            self._call_total = before

    def _wrap_generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(original).parameters)
        at = names.index("stopping_criteria") if "stopping_criteria" in names else len(names)

        def generate(*args: Any, kv_budget: Limit | None = None, **kwargs: Any) -> Any:
            settings = kwargs.get("generation_config") or getattr(self._decoder.model, "generation_config", None)

            def option(name: str) -> Any:
                return kwargs[name] if kwargs.get(name) is not None else getattr(settings, name, None)

            for name in _REFUSED:
                if option(name):
                    raise PlanError(
                        f"expected prompts that are read at once and then one token at a time under a router or a KV "
                        f"budget, got {name}"
                    )
            self.ended_for_room, self._granted, self._latest = False, None, lambda: None
            prompt = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
            new = option("max_new_tokens")
            longest = option("max_length") if new is None or prompt is None else prompt.shape[1] + new
            last = _OutOfRoom(self, longest, option("eos_token_id"))
            if len(args) > at:
                args = (*args[:at], [*(args[at] or []), last], *args[at + 1 :])
            else:
                kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or []), last]
            with self.limited(kv_budget):
                try:
                    return original(*args, **kwargs)
                finally:
                    self._granted = None

        return generate


_REFUSED = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")
"""Options of `generate()` that feed guesses with the prompt, or only a part of it: a decision would be made on that."""


class _OutOfRoom(StoppingCriteria):
    """Ends generation like `max_length` where the budget has no room for one more token, whatever is given up."""

    def __init__(self, handle: AdaptiveModel, longest: int | None, ends: int | list[int] | None) -> None:
        self._handle, self._longest = handle, longest
        self._ends = torch.tensor([ends] if isinstance(ends, int) else ends or [], dtype=torch.long)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        handle = self._handle
        cache = handle._latest()
        limits = handle._limits()
        done = cache is not None and not handle._has_room(cache, 1, limits)
        # the answer holds for the next step, whatever becomes of the budget meanwhile
        handle._granted = None if done else limits
        if done:
            complete = self._longest is not None and input_ids.shape[1] >= self._longest
            complete |= all(bool(torch.isin(row, self._ends.to(row.device)).any()) for row in input_ids[:, -1:])
            handle.ended_for_room |= not complete
        return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _fresh(layer: GroupedLayer) -> GroupedLayer:
    own = layer.own
    return GroupedLayer(layer.layer, type(own)(own.sliding_window) if layer.window is not None else type(own)())

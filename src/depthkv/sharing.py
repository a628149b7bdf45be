"""`share(model, plan)` and `route(model, sampler)`: put a plan, or a fresh map per step, on a transformers model.

Both set `forward` on module *instances* and nothing else: no weight, config or class is touched, so removal is exact.
From here the next hop is `attention.LayerCache.update`, where a follower reads its source.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

from torch import nn
from transformers import Cache

from depthkv import attention
from depthkv.architectures import LayerKind
from depthkv.attention import Noise, Step
from depthkv.cache import fit_cache
from depthkv.checkpointing import is_checkpointed, refuse_reentrant_checkpointing, run_step
from depthkv.decoder import Decoder, find_decoder
from depthkv.errors import PlanError
from depthkv.export import require_kv
from depthkv.patches import Patches, adapter_switch, by_name, guarded, patch_layers, patch_tail
from depthkv.plan import SharingPlan
from depthkv.routing import RoutingMap, Sampler

if TYPE_CHECKING:
    from depthkv.adaptive.budget import Limit
    from depthkv.adaptive.model import AdaptiveModel
    from depthkv.adaptive.router import Router
    from depthkv.compress.model import CompressedModel
    from depthkv.compress.recipe import CacheRecipe

__all__ = ["Routing", "SharedModel", "route", "share"]


class SharedModel(Patches):
    """Handle that `share` returns."""

    def __init__(self, decoder: Decoder, plan: SharingPlan, switch: Callable[[bool], None] | None = None) -> None:
        check_plan(plan, decoder.kinds)
        require_kv(decoder, plan.leaders)
        super().__init__(decoder, None if plan.is_full else switch)
        self.plan = plan
        """The plan in force."""
        self._own_switch = switch
        guarded(self, self._apply)

    def _apply(self) -> None:
        plan, decoder, context = self.plan, self._decoder, self._context
        if callable(getattr(decoder.model, "generate", None)):
            self._replace(decoder.model, "generate", self._wrap_generate)
        refuse_reentrant_checkpointing(decoder)
        patch_layers(self, context, self._involved(), set(plan.followers), self._attend())
        tail = patch_tail(self, context, plan)
        signature = inspect.signature(decoder.module.forward)

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                arguments = signature.bind(*args, **kwargs).arguments
                cache = arguments.get("past_key_values")
                if cache is None and (made := self._cache_for(arguments)):
                    args, kwargs = (), by_name(signature, args, kwargs) | made
                    cache = kwargs["past_key_values"]
                if cache is not None:
                    self._fit(cache)
                step = Step(plan.kv_source_layers, keep_pairs=is_checkpointed(decoder))
                step.num_last_positions = self._last_positions(tail.positions_needed(), cache, arguments)
                output = run_step(context, step, decoder, original, args, kwargs)
                left = getattr(output, "past_key_values", None)
                if left is not None:
                    self._fit(left)
                return output

            return forward

        self._replace(decoder.module, "forward", wrap)
        for module in decoder.model.modules():
            # generate() would allocate followers' static layers ahead of the first forward; None makes it wait
            if hasattr(module, "_get_static_cache_init_shape"):
                self._replace(module, "_get_static_cache_init_shape", _wait_for_first_forward)

    # What a recipe does otherwise

    def _involved(self) -> set[int]:
        """Layers whose attention is patched."""
        plan = self.plan
        return {layer for follower in plan.followers for layer in (follower, plan.kv_source_layers[follower])}

    def _attend(self) -> Callable[..., Callable[..., Any]]:
        """What wraps the forward of an attention module."""
        return attention.attention_forward

    def _fit(self, cache: Cache) -> None:
        """Make a cache one of the plan."""
        fit_cache(cache, self.plan)

    def _cache_for(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """For a forward that was given no cache: other arguments, the cache among them; none leaves it to the model."""
        return {}

    def _last_positions(self, needed: int | None, cache: Cache | None, arguments: dict[str, Any]) -> int | None:
        """For how many last positions layers above the last leader run, where the head needs so many."""
        return needed

    def _refuse_budget(self) -> None:
        """Raise where a budget cannot be added to what is in force."""

    def _wrap_generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(*args: Any, kv_budget: Limit | None = None, **kwargs: Any) -> Any:
            if kv_budget is None:
                return original(*args, **kwargs)
            from depthkv.adaptive.budget import KVBudget
            from depthkv.adaptive.model import AdaptiveModel

            if not self._context.in_force:
                raise PlanError("expected a model that is shared, got kv_budget after remove()")
            self._refuse_budget()
            # the plan is only where the call begins
            budget = KVBudget(total=kv_budget)
            with self.suspended(), AdaptiveModel.under(self._decoder, self.plan, budget, self._own_switch):
                return self._decoder.model.generate(*args, **kwargs)  # type: ignore[operator]

        return generate


class Routing(Patches):
    """Handle that `route` returns: a fresh map for every forward of the model."""

    done = "routed"

    def __init__(
        self,
        model: nn.Module,
        sampler: Sampler,
        step: int,
        skip_unread: bool,
        only_in_training: bool,
        noise: Noise | None = None,
    ) -> None:
        decoder = find_decoder(model)
        require_kv(decoder, range(decoder.num_layers))
        super().__init__(decoder, adapter_switch(model))
        self.only_in_training = only_in_training
        self.sampler = sampler
        self.step = step
        """Number of the next forward; set it to resume a run."""
        self.last_plan = RoutingMap(tuple(range(decoder.num_layers)))
        """The map that the last forward used."""
        self.last_maps = [self.last_plan]
        """The same for each sequence of the batch, where the sampler draws one for each; otherwise one map."""
        self.skip_unread = skip_unread
        self.noise = noise
        guarded(self, self._apply)

    def _apply(self) -> None:
        decoder, context = self._decoder, self._context
        refuse_reentrant_checkpointing(decoder)
        everyone = set(range(decoder.num_layers))
        patch_layers(self, context, everyone, everyone)
        signature = inspect.signature(decoder.module.forward)

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if self.only_in_training and not decoder.module.training:
                    return self._run_unrouted(original, args, kwargs)
                arguments = signature.bind(*args, **kwargs).arguments
                if arguments.get("past_key_values") is not None:
                    raise PlanError(
                        "expected a forward without a KV cache, since routing draws a new map each time, got "
                        "past_key_values; generate under share(model, plan) instead"
                    )
                kwargs["use_cache"] = False
                step = Step(
                    *self._draw(arguments),
                    skip_unread=self.skip_unread,
                    keep_pairs=is_checkpointed(decoder),
                    noise=self.noise,
                )
                return run_step(context, step, decoder, original, args, kwargs)

            return forward

        self._replace(decoder.module, "forward", wrap)

    def _draw(self, arguments: dict[str, Any]) -> list[tuple[int, ...]]:
        """The next forward's map, or maps."""
        kinds = self._decoder.kinds
        draw_batch = getattr(self.sampler, "draw_batch", None)
        if draw_batch is None:
            maps = [_whole_numbers(self.sampler, self.sampler.draw(self.step, kinds))]
        else:
            inputs = arguments.get("input_ids")
            inputs = arguments["inputs_embeds"] if inputs is None else inputs
            maps = [_whole_numbers(self.sampler, sources) for sources in draw_batch(self.step, kinds, len(inputs))]
        for sources in maps:
            _check_routing_map(sources, kinds)
        self.last_maps = [RoutingMap(sources) for sources in maps]
        self.last_plan = self.last_maps[0]
        self.step += 1
        return maps

    def _run_unrouted(self, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        decoder = self._decoder
        everyone_itself = Step(tuple(range(decoder.num_layers)), keep_pairs=is_checkpointed(decoder))
        if self._switch is None:
            return run_step(self._context, everyone_itself, decoder, original, args, kwargs)
        self._switch(False)
        try:
            return run_step(self._context, everyone_itself, decoder, original, args, kwargs)
        finally:
            self._switch(True)


@overload
def share(model: nn.Module, plan: SharingPlan) -> SharedModel: ...


@overload
def share(model: nn.Module, plan: CacheRecipe) -> CompressedModel: ...


@overload
def share(
    model: nn.Module,
    plan: Router,
    *,
    kv_budget: Limit | None = None,
    sequence_kv_budget: Limit | None = None,
) -> AdaptiveModel: ...


@overload
def share(
    model: nn.Module,
    plan: SharingPlan | CacheRecipe | Router,
    *,
    kv_budget: Limit | None = None,
    sequence_kv_budget: Limit | None = None,
) -> SharedModel | AdaptiveModel: ...


def share(
    model: nn.Module,
    plan: SharingPlan | CacheRecipe | Router,
    *,
    kv_budget: Limit | None = None,
    sequence_kv_budget: Limit | None = None,
) -> SharedModel | AdaptiveModel:
    """Make followers read their leaders' keys and values: forward, backward, `generate()`, with and without cache.

    Followers compute no K or V and allocate no cache. Under a plan, layers above the last leader run for those last
    positions only whose logits were asked for (`logits_to_keep`, as `generate()` does in prefill). Exact: the logits
    are those of the same plan with everything computed.

    A recipe is a plan whose leaders keep their caches in few bits, or few tokens of them (docs/how-to/compose.md). What
    a single forward computes is that of its plan: a recipe acts on what later forwards read from the cache.

    A router chooses the plan of each sequence while its prompt is read. With a budget, leaders are given up while the
    cache grows: what they kept is freed, their readers go on with another leader. Both are for inference, with
    transformers' dynamic caches; see docs/how-to/adaptive.md. Inside the block `model.generate(..., kv_budget="64MiB")`
    takes a budget for one call.

    Args:
        model: a decoder-only model of transformers (bare, with a head, wrapped by PEFT, or split by accelerate).
        plan: as many layers as the model has; only layers of one kind may share. Or a recipe
            around one, or a router.
        kv_budget: most bytes of the cache of a batch: a number, text such as "64MiB", or a function that is asked
            before every step.
        sequence_kv_budget: the same for each sequence.

    Returns:
        A handle; `handle.remove()` or the end of the `with` block restores the model exactly.

    Raises:
        PlanError: the plan does not fit the model, or the model is shared already.
        UnsupportedModelError: a family that cannot share, or reentrant gradient checkpointing.
        KVBudgetError: later, from a forward, where the budget is too small for the fewest leaders.
    """
    # the two know of each other
    from depthkv.adaptive.budget import KVBudget
    from depthkv.adaptive.model import AdaptiveModel
    from depthkv.adaptive.router import Router
    from depthkv.compress.model import CompressedModel
    from depthkv.compress.recipe import CacheRecipe

    if not isinstance(plan, (SharingPlan, CacheRecipe, Router)):
        raise PlanError(f"expected a SharingPlan, a CacheRecipe or a Router, got {type(plan).__name__}")
    decoder, switch = find_decoder(model), adapter_switch(model)
    budget = KVBudget(total=kv_budget, sequence=sequence_kv_budget)
    if isinstance(plan, CacheRecipe):
        if budget.total is not None or budget.sequence is not None:
            raise PlanError(
                "expected a plan or a router with a KV budget, got a recipe, which says itself what is kept"
            )
        return CompressedModel(decoder, plan, switch)
    if isinstance(plan, Router):
        return AdaptiveModel(decoder, plan, budget, switch)
    if budget.total is None and budget.sequence is None:
        return SharedModel(decoder, plan, switch)
    return AdaptiveModel.under(decoder, plan, budget, switch)


def route(
    model: nn.Module,
    sampler: Sampler,
    *,
    step: int = 0,
    skip_unread: bool = True,
    only_in_training: bool = False,
    noise: Noise | None = None,
) -> Routing:
    """Stochastic KV routing for training: every forward of the model draws a fresh map (arXiv:2604.22782, section 3).

    Works under autograd, autocast, gradient accumulation and non-reentrant gradient checkpointing. The map is drawn
    in evaluation mode, too, unless `only_in_training`; measure with `share(model, plan)` after leaving the block or
    inside `routing.suspended()`.

    Args:
        model: as for `share`.
        sampler: anything with `draw(step, kinds)`, for example `RandomCrossLayer(cross_layer_prob=0.6, seed=0)`.
        step: number of the first forward, to resume a run.
        skip_unread: do not compute K and V that no layer reads in a step. Their weights then get no gradient in that
            step; DistributedDataParallel wants False.
        only_in_training: in evaluation mode the model is as it was, with its own KV and caches, and no step is counted.
        noise: from a layer and the keys and values that it computed to what it and others read of them, for example
            `depthkv.compress.recipe_noise(recipe, kinds)`. The same in must give the same out.

    Raises:
        PlanError: the model is shared or routed already, or the sampler drew an invalid map.
        UnsupportedModelError: as for `share`.
    """
    if not callable(getattr(sampler, "draw", None)):
        raise PlanError(f"expected a sampler with a method draw(step, kinds), got {type(sampler).__name__}")
    return Routing(model, sampler, step, skip_unread, only_in_training, noise)


def check_plan(plan: SharingPlan, kinds: tuple[LayerKind, ...]) -> None:
    """Raise `PlanError` unless `plan` fits layers of these kinds."""
    if plan.num_layers != len(kinds):
        raise PlanError(f"expected a plan for {len(kinds)} layers, got one for {plan.num_layers}")
    _check_kinds(plan.kv_source_layers, kinds)


def _whole_numbers(sampler: Sampler, sources: Any) -> tuple[int, ...]:
    """What a sampler drew, which may be a list, a tuple, or an array or tensor of integers."""
    try:
        return tuple(operator.index(source) for source in sources)
    except TypeError as problem:
        name = type(sampler).__name__
        raise PlanError(f"expected {name} to draw a whole number for each layer, got {sources!r:.80}") from problem


def _check_routing_map(sources: tuple[int, ...], kinds: tuple[LayerKind, ...]) -> None:
    """Raise `PlanError` unless every layer reads itself or an earlier layer of its kind."""
    if len(sources) != len(kinds):
        raise PlanError(f"expected the sampler to draw {len(kinds)} sources, got {len(sources)}")
    for layer, source in enumerate(sources):
        if not 0 <= source <= layer:
            raise PlanError(f"expected layer {layer} to read itself or an earlier layer, got layer {source}")
    _check_kinds(sources, kinds)


def _check_kinds(sources: tuple[int, ...], kinds: tuple[LayerKind, ...]) -> None:
    for layer, source in enumerate(sources):
        if kinds[layer] != kinds[source]:
            raise PlanError(
                f"expected layer {layer} ({kinds[layer]}) to read a layer of its own kind, got layer {source} "
                f"({kinds[source]})"
                + (": their rotary bases differ" if str(kinds[layer]) == str(kinds[source]) else "")
            )


def _wait_for_first_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: None

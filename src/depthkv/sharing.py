"""`share(model, plan)` and `route(model, sampler)`: put a plan, or a fresh map per step, on a transformers model.

Both set `forward` on module *instances* and nothing else: no weight, config or class is touched, so removal is exact.
From here the next hop is `attention.LayerCache.update`, where a follower reads its source.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from torch import nn

from depthkv import attention, prefill
from depthkv.architectures import LayerKind, text_config
from depthkv.attention import Context, Step
from depthkv.cache import fit_cache
from depthkv.checkpointing import is_checkpointed, refuse_reentrant_checkpointing, run_step
from depthkv.decoder import Decoder, find_decoder
from depthkv.errors import PlanError
from depthkv.plan import SharingPlan
from depthkv.routing import RoutingMap, Sampler

if TYPE_CHECKING:
    from depthkv.adaptive.budget import Limit
    from depthkv.adaptive.model import AdaptiveModel
    from depthkv.adaptive.router import Router

_ACTIVE = "_depthkv_patches"
"""Attribute of a shared or routed decoder that holds its `Patches`."""

ADAPTER_SWITCH = "_depthkv_adapter_switch"
"""Attribute of a model whose adapter belongs to sharing: called with True when sharing begins and False at its end."""

_Self = TypeVar("_Self", bound="Patches")


class Patches:
    """Instance-level replacements of methods that can be taken back exactly; usable as a context manager."""

    def __init__(self, decoder: Decoder, switch: Callable[[bool], None] | None = None) -> None:
        self._decoder = decoder
        self._saved: list[tuple[nn.Module, str, bool, Any]] = []
        self._switch = switch
        """Turns an adapter on or off that belongs to sharing (`depthkv.adapt.adapters`)."""
        self._context = Context()
        self._is_suspended = False
        self._activate()

    def _activate(self) -> None:
        decoder = self._decoder
        active = getattr(decoder.module, _ACTIVE, None)
        if active is not None:
            what = "routed" if isinstance(active, Routing) else "shared"
            raise PlanError(f"expected a model that is neither shared nor routed, got one that is {what} already")
        if self._switch is not None:
            self._switch(True)
        setattr(decoder.module, _ACTIVE, self)
        self._context.in_force = True

    def _replace(self, module: nn.Module, name: str, wrap: Callable[[Any], Any]) -> None:
        # accelerate keeps its hooks in an instance's `forward`, too: whatever is there is called and put back
        had = name in module.__dict__
        original = getattr(module, name)
        self._saved.append((module, name, had, original))
        # generate() asks for the forward's signature to know what it may pass
        setattr(module, name, update_wrapper(wrap(original), original))

    def _apply(self) -> None:
        """Put the replacements in place, after `_activate`."""
        raise NotImplementedError

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model exactly as it was before, so that it can be shared in another way and measured in between.

        Does nothing where it is suspended or removed already.
        """
        if not self._context.in_force:
            yield
            return
        self.remove()
        self._is_suspended = True
        try:
            yield
        finally:
            if self._is_suspended:  # not removed meanwhile
                self._is_suspended = False
                self._activate()
                _guarded(self, self._apply)

    def remove(self) -> None:
        """Restore the model exactly; calling it again does nothing, and ends a suspension for good."""
        self._is_suspended = False
        while self._saved:
            module, name, had, original = self._saved.pop()
            if had:
                setattr(module, name, original)
            else:
                delattr(module, name)
        if self._context.in_force:
            self._context.in_force = False
            delattr(self._decoder.module, _ACTIVE)
            if self._switch is not None:
                self._switch(False)

    def __reduce_ex__(self, protocol: object) -> Any:
        # a copy of the model would keep calling the original's layers
        raise PlanError(
            "expected a model that is not shared or routed to copy or pickle, got one that is; remove() first"
        )

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class SharedModel(Patches):
    """Handle that `share` returns."""

    def __init__(self, decoder: Decoder, plan: SharingPlan, switch: Callable[[bool], None] | None = None) -> None:
        check_plan(plan, decoder.kinds)
        super().__init__(decoder, None if plan.is_full else switch)
        self.plan = plan
        """The plan in force."""
        self._own_switch = switch
        _guarded(self, self._apply)

    def _apply(self) -> None:
        plan, decoder, context = self.plan, self._decoder, self._context
        if callable(getattr(decoder.model, "generate", None)):
            self._replace(decoder.model, "generate", self._wrap_generate)
        refuse_reentrant_checkpointing(decoder)
        involved = {layer for follower in plan.followers for layer in (follower, plan.kv_source_layers[follower])}
        _patch_layers(self, context, involved, set(plan.followers))
        tail = _patch_tail(self, context, plan)
        signature = inspect.signature(decoder.module.forward)

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                bound = signature.bind(*args, **kwargs).arguments
                cache = bound.get("past_key_values")
                if cache is not None:
                    fit_cache(cache, plan)
                step = Step(plan.kv_source_layers, keep_pairs=is_checkpointed(decoder))
                step.num_last_positions = tail.positions_needed()
                output = run_step(context, step, decoder, original, args, kwargs)
                made = getattr(output, "past_key_values", None)
                if made is not None:
                    fit_cache(made, plan)
                return output

            return forward

        self._replace(decoder.module, "forward", wrap)
        for module in decoder.model.modules():
            # generate() would allocate followers' static layers ahead of the first forward; None makes it wait
            if hasattr(module, "_get_static_cache_init_shape"):
                self._replace(module, "_get_static_cache_init_shape", _wait_for_first_forward)

    def _wrap_generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def generate(*args: Any, kv_budget: Limit | None = None, **kwargs: Any) -> Any:
            if kv_budget is None:
                return original(*args, **kwargs)
            from depthkv.adaptive.budget import KVBudget
            from depthkv.adaptive.model import AdaptiveModel

            if not self._context.in_force:
                raise PlanError("expected a model that is shared, got kv_budget after remove()")
            # the plan is only where the call begins
            budget = KVBudget(total=kv_budget)
            with self.suspended(), AdaptiveModel.under(self._decoder, self.plan, budget, self._own_switch):
                return self._decoder.model.generate(*args, **kwargs)  # type: ignore[operator]

        return generate


class Routing(Patches):
    """Handle that `route` returns: a fresh map for every forward of the model."""

    def __init__(
        self, model: nn.Module, sampler: Sampler, step: int, skip_unread: bool, only_in_training: bool
    ) -> None:
        decoder = find_decoder(model)
        super().__init__(decoder, _adapter_switch(model))
        self.only_in_training = only_in_training
        self.sampler = sampler
        self.step = step
        """Number of the next forward; set it to resume a run."""
        self.last_plan = RoutingMap(tuple(range(decoder.num_layers)))
        """The map that the last forward used."""
        self.last_maps = [self.last_plan]
        """The same for each sequence of the batch, where the sampler draws one for each; otherwise one map."""
        self.skip_unread = skip_unread
        _guarded(self, self._apply)

    def _apply(self) -> None:
        decoder, context = self._decoder, self._context
        refuse_reentrant_checkpointing(decoder)
        everyone = set(range(decoder.num_layers))
        _patch_layers(self, context, everyone, everyone)
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
                step = Step(*self._draw(arguments), skip_unread=self.skip_unread, keep_pairs=is_checkpointed(decoder))
                return run_step(context, step, decoder, original, args, kwargs)

            return forward

        self._replace(decoder.module, "forward", wrap)

    def _draw(self, arguments: dict[str, Any]) -> list[tuple[int, ...]]:
        """The next forward's map, or maps."""
        kinds = self._decoder.kinds
        draw_batch = getattr(self.sampler, "draw_batch", None)
        if draw_batch is None:
            maps = [tuple(self.sampler.draw(self.step, kinds))]
        else:
            inputs = arguments.get("input_ids")
            inputs = arguments["inputs_embeds"] if inputs is None else inputs
            maps = [tuple(sources) for sources in draw_batch(self.step, kinds, len(inputs))]
        for sources in maps:
            check_routing_map(sources, kinds)
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
    plan: SharingPlan | Router,
    *,
    kv_budget: Limit | None = None,
    sequence_kv_budget: Limit | None = None,
) -> SharedModel | AdaptiveModel: ...


def share(
    model: nn.Module,
    plan: SharingPlan | Router,
    *,
    kv_budget: Limit | None = None,
    sequence_kv_budget: Limit | None = None,
) -> SharedModel | AdaptiveModel:
    """Make followers read their leaders' keys and values: forward, backward, `generate()`, with and without cache.

    Followers compute no K or V and allocate no cache. Under a plan, layers above the last leader run for those last
    positions only whose logits were asked for (`logits_to_keep`, as `generate()` does in prefill). Exact: the logits
    are those of the same plan with everything computed.

    A router chooses the plan of each sequence while its prompt is read. With a budget, leaders are given up while the
    cache grows: what they kept is freed, their readers go on with another leader. Both are for inference, with
    transformers' dynamic caches; see docs/how-to/adaptive.md. Inside the block `model.generate(..., kv_budget="64MiB")`
    takes a budget for one call.

    Args:
        model: a decoder-only model of transformers (bare, with a head, wrapped by PEFT, or split by accelerate).
        plan: as many layers as the model has; only layers of one kind may share. Or a router.
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

    if not isinstance(plan, (SharingPlan, Router)):
        raise PlanError(f"expected a SharingPlan or a Router, got {type(plan).__name__}")
    decoder, switch = find_decoder(model), _adapter_switch(model)
    budget = KVBudget(total=kv_budget, sequence=sequence_kv_budget)
    if isinstance(plan, Router):
        return AdaptiveModel(decoder, plan, budget, switch)
    if budget.total is None and budget.sequence is None:
        return SharedModel(decoder, plan, switch)
    return AdaptiveModel.under(decoder, plan, budget, switch)


def route(
    model: nn.Module, sampler: Sampler, *, step: int = 0, skip_unread: bool = True, only_in_training: bool = False
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

    Raises:
        PlanError: the model is shared or routed already, or the sampler drew an invalid map.
        UnsupportedModelError: as for `share`.
    """
    if not callable(getattr(sampler, "draw", None)):
        raise PlanError(f"expected a sampler with a method draw(step, kinds), got {type(sampler).__name__}")
    return Routing(model, sampler, step, skip_unread, only_in_training)


def check_plan(plan: SharingPlan, kinds: tuple[LayerKind, ...]) -> None:
    """Raise `PlanError` unless `plan` fits layers of these kinds."""
    if plan.num_layers != len(kinds):
        raise PlanError(f"expected a plan for {len(kinds)} layers, got one for {plan.num_layers}")
    _check_kinds(plan.kv_source_layers, kinds)


def check_routing_map(sources: tuple[int, ...], kinds: tuple[LayerKind, ...]) -> None:
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


def _adapter_switch(model: nn.Module) -> Callable[[bool], None] | None:
    """The switch of the model itself or of one inside it, below a wrapper."""
    for module in model.modules():
        if ADAPTER_SWITCH in module.__dict__:
            switch: Callable[[bool], None] = module.__dict__[ADAPTER_SWITCH]
            return switch
    return None


def _guarded(patches: Patches, apply: Callable[[], None]) -> None:
    try:
        apply()
    except BaseException:
        patches.remove()
        raise


def _patch_tail(patches: Patches, context: Context, plan: SharingPlan) -> prefill.Tail:
    """Patch the layers above the last leader, where the model's head can say which positions it needs."""
    decoder = patches._decoder
    tail = prefill.Tail(context, decoder, plan)
    head = decoder.head_with_logits_to_keep() if tail.layers else None
    if head is not None:
        patches._replace(head, "forward", tail.wrap_head)
        for layer in tail.layers:
            patches._replace(decoder.layers[layer], "forward", partial(tail.wrap_layer, layer))
    return tail


def _patch_layers(
    patches: Patches,
    context: Context,
    attending: set[int],
    skipping: set[int],
    attend: Callable[..., Callable[..., Any]] = attention.attention_forward,
) -> None:
    """Patch the attention of layers in `attending`, and the K and V projections of those in `skipping`."""
    decoder = patches._decoder
    family = decoder.family
    for layer in sorted(attending):
        module = decoder.attention(layer)
        patches._replace(module, "forward", partial(attend, context, layer, family.cache_argument))
        if layer not in skipping:
            continue
        kind = decoder.kinds[layer]
        if family.fused is not None:
            fused = getattr(module, family.fused)
            heads = text_config(decoder.config).num_attention_heads
            layout = attention.FusedLayout(projection=fused, family=family, num_heads=heads, head_dim=kind.head_dim)
            patches._replace(fused, "forward", partial(attention.fused_forward, context, layer, layout))
        else:
            width = kind.kv_heads * kind.head_dim
            for name in (family.k_proj, family.v_proj):
                projection = getattr(module, name)
                patches._replace(projection, "forward", partial(attention.projection_forward, context, layer, width))
        norm = getattr(module, family.k_norm, None) if family.k_norm else None
        if isinstance(norm, nn.Module):
            patches._replace(norm, "forward", partial(attention.norm_forward, context, layer))

"""Methods replaced on module *instances*, and put back exactly: no weight, config or class is touched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from types import TracebackType
from typing import Any, TypeVar

from torch import nn

from depthkv import attention, prefill
from depthkv.architectures import text_config
from depthkv.attention import Context
from depthkv.decoder import Decoder
from depthkv.errors import PlanError
from depthkv.plan import SharingPlan

ACTIVE = "_depthkv_patches"
"""Attribute of a shared or routed decoder that holds its `Patches`."""

ADAPTER_SWITCH = "_depthkv_adapter_switch"
"""Attribute of a model whose adapter belongs to sharing: called with True when sharing begins and False at its end."""

_Self = TypeVar("_Self", bound="Patches")


class Patches:
    """Instance-level replacements of methods that can be taken back exactly; usable as a context manager."""

    done = "shared"
    """What was done to the model, for errors."""

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
        active = getattr(decoder.module, ACTIVE, None)
        if active is not None:
            done = active.done
            raise PlanError(f"expected a model that is neither shared nor routed, got one that is {done} already")
        if self._switch is not None:
            self._switch(True)
        setattr(decoder.module, ACTIVE, self)
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
                guarded(self, self._apply)

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
            delattr(self._decoder.module, ACTIVE)
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


def by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, all by their names."""
    named = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


def wants_cache(arguments: dict[str, Any], config: Any) -> bool:
    """Whether a forward of the decoder with these arguments fills a cache, asked for or by its config."""
    asked = arguments.get("use_cache")
    return bool(getattr(text_config(config), "use_cache", True) if asked is None else asked)


def adapter_switch(model: nn.Module) -> Callable[[bool], None] | None:
    """The switch of the model itself or of one inside it, below a wrapper."""
    for module in model.modules():
        if ADAPTER_SWITCH in module.__dict__:
            switch: Callable[[bool], None] = module.__dict__[ADAPTER_SWITCH]
            return switch
    return None


def guarded(patches: Patches, apply: Callable[[], None]) -> None:
    try:
        apply()
    except BaseException:
        patches.remove()
        raise


def patch_tail(patches: Patches, context: Context, plan: SharingPlan) -> prefill.Tail:
    """Patch the layers above the last leader, where the model's head can say which positions it needs."""
    decoder = patches._decoder
    tail = prefill.Tail(context, decoder, plan)
    head = decoder.head_with_logits_to_keep() if tail.layers else None
    if head is not None:
        patches._replace(head, "forward", tail.wrap_head)
        for layer in tail.layers:
            patches._replace(decoder.layers[layer], "forward", partial(tail.wrap_layer, layer))
    return tail


def patch_layers(
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

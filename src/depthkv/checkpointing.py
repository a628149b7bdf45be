"""Gradient checkpointing: a layer that is recomputed in backward must find the map and the pairs of its own forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from depthkv.attention import Context, Step
from depthkv.decoder import Decoder
from depthkv.errors import PlanError, UnsupportedModelError


def refuse_reentrant_checkpointing(decoder: Decoder) -> None:
    """Reentrant checkpointing detaches each layer's inputs: gradients through another layer's K and V would be lost."""
    for layer in decoder.layers:
        if getattr(layer, "gradient_checkpointing", False):
            function = getattr(layer, "_gradient_checkpointing_func", None)
            keywords = getattr(_unwrapped(function), "keywords", {})
            if keywords.get("use_reentrant", True):
                raise UnsupportedModelError(
                    "expected non-reentrant gradient checkpointing, got use_reentrant=True, with which gradients "
                    "through shared keys and values are silently wrong; call gradient_checkpointing_enable("
                    'gradient_checkpointing_kwargs={"use_reentrant": False})'
                )


def is_checkpointed(decoder: Decoder) -> bool:
    """Whether a forward now would be recomputed in backward."""
    if not torch.is_grad_enabled():
        return False
    return decoder.has_checkpoint_wrapper or any(
        getattr(layer, "gradient_checkpointing", False) and layer.training for layer in decoder.layers
    )


def run_step(
    context: Context, step: Step, decoder: Decoder, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    """Run the decoder's forward `original` in `step`, and bind `step` in its recomputation, too."""
    context.latest = None
    if not step.keep_pairs:
        with context.bound(step):
            return original(*args, **kwargs)
    refuse_reentrant_checkpointing(decoder)
    # transformers' checkpointing layers recompute through their own function: bind this step in it, so that several
    # forwards before one backward each find their own pairs again. Other checkpoint wrappers find the latest step.
    saved: list[tuple[Any, Any]] = []
    layers: list[Any] = decoder.layers
    for layer in layers:
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if function is not None and getattr(layer, "gradient_checkpointing", False):
            saved.append((layer, function))
            layer._gradient_checkpointing_func = _bound_checkpoint(context, step, function)
    try:
        with context.bound(step):
            output = original(*args, **kwargs)
    finally:
        for layer, function in saved:
            layer._gradient_checkpointing_func = function
    context.latest = step
    return output


def _bound_checkpoint(context: Context, step: Step, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def with_step(*inputs: Any, **options: Any) -> Any:
            if not context.in_force:
                raise PlanError(
                    "expected backward through checkpointed layers while the model is shared or routed as in the "
                    "forward, got it after remove() or in a suspension: layers would be recomputed with other KV"
                )
            with context.bound(step):
                return function(*inputs, **options)

        return checkpoint(with_step, *args, **kwargs)

    run._depthkv_original = checkpoint  # type: ignore[attr-defined]
    return run


def _unwrapped(function: Any) -> Any:
    return getattr(function, "_depthkv_original", function)

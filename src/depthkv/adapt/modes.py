"""States of a model that last as long as its training: each is entered, and undone on exit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from depthkv.decoder import Decoder


@contextmanager
def training_mode(model: nn.Module, trained: dict[str, nn.Parameter]) -> Iterator[None]:
    """Training mode, with gradients for the trained weights only; both as before on exit."""
    was_training = model.training
    frozen = {id(parameter) for parameter in trained.values()}
    switched = [p for p in model.parameters() if p.requires_grad and id(p) not in frozen]
    for parameter in switched:
        parameter.requires_grad_(False)
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
        for parameter in switched:
            parameter.requires_grad_(True)


@contextmanager
def checkpointed(model: Any, enabled: bool) -> Iterator[None]:
    """Gradient checkpointing of the kind that sharing allows."""
    if not enabled:
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@contextmanager
def compiled(decoder: Decoder, enabled: bool) -> Iterator[None]:
    """`torch.compile` of what routing leaves alone in each layer: norms and MLP.

    A whole layer would be compiled again for every map. All layers share the compiled code of a piece, since their
    weights are inputs of it.
    """
    layers = enumerate(decoder.layers if enabled else ())
    pieces = [child for i, layer in layers for child in layer.children() if child is not decoder.attention(i)]
    for piece in pieces:
        piece.compile()
    try:
        yield
    finally:
        for piece in pieces:
            piece._compiled_call_impl = None  # torch has no public way back

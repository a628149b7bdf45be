"""Finds the decoder inside a model, and decides whether its layers can share."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from depthkv.architectures import FAMILIES, Family, LayerKind, layer_kinds, text_config
from depthkv.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The stack of layers of a model, with what sharing needs to know about it."""

    model: nn.Module
    """The model that the user gave."""
    module: nn.Module
    """The module that holds the layers, without a head."""
    family: Family
    config: Any
    kinds: tuple[LayerKind, ...]
    has_checkpoint_wrapper: bool
    """Layers are wrapped by `torch.distributed`'s activation checkpointing."""

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, unwrapped."""
        return [
            getattr(layer, "_checkpoint_wrapped_module", layer) for layer in getattr(self.module, self.family.layers)
        ]

    @property
    def num_layers(self) -> int:
        return len(self.kinds)

    def attention(self, layer: int) -> nn.Module:
        """The self-attention module of a layer."""
        module = getattr(self.layers[layer], self.family.attention)
        assert isinstance(module, nn.Module)
        return module

    def head_with_logits_to_keep(self) -> nn.Module | None:
        """The module around the decoder whose forward can be asked for the last positions' logits only."""
        for module in self.model.modules():
            if module is not self.module and "logits_to_keep" in inspect.signature(module.forward).parameters:
                if any(inner is self.module for inner in module.modules()):
                    return module
        return None


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder of a transformers model, also below PEFT's, accelerate's or `torch.compile`'s wrappers.

    Raises:
        UnsupportedModelError: not a transformers model, or a family that cannot share.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a transformers model, got {type(model).__name__}")
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(f"expected a transformers model with a config, got {type(model).__name__}")
    kinds = layer_kinds(config)
    inner = text_config(config)
    family = FAMILIES.get(inner.model_type)
    inspected = family is None
    family = family or Family()
    decoder = _locate(model, inner, family, kinds)
    _check_modules(decoder)
    if inspected:
        prove(decoder)
    return decoder


def _locate(model: nn.Module, config: Any, family: Family, kinds: tuple[LayerKind, ...]) -> Decoder:
    for module in model.modules():
        layers = getattr(module, family.layers, None)
        if not isinstance(layers, nn.ModuleList) or len(layers) != len(kinds):
            continue
        plain = [getattr(layer, "_checkpoint_wrapped_module", layer) for layer in layers]
        if all(isinstance(getattr(layer, family.attention, None), nn.Module) for layer in plain):
            return Decoder(
                model=model,
                module=module,
                family=family,
                config=config,
                kinds=kinds,
                has_checkpoint_wrapper=any(a is not b for a, b in zip(layers, plain, strict=True)),
            )
    raise UnsupportedModelError(
        f"expected {len(kinds)} decoder layers with self-attention, got a {config.model_type} model "
        "whose layers depthkv does not know (see docs/architectures.md)"
    )


def _check_modules(decoder: Decoder) -> None:
    family = decoder.family
    names = [family.fused] if family.fused else [family.k_proj, family.v_proj]
    for layer in range(decoder.num_layers):
        module = decoder.attention(layer)
        missing = [name for name in names if not isinstance(getattr(module, name, None), nn.Module)]
        accepts = inspect.signature(type(module).forward).parameters
        if missing or family.cache_argument not in accepts:
            raise UnsupportedModelError(
                f"expected {' and '.join(names)} and a cache in layer {layer}'s attention, got {type(module).__name__} "
                f"of a {decoder.config.model_type} model (see docs/architectures.md)"
            )
        if getattr(module, "layer_idx", layer) != layer:
            raise UnsupportedModelError(f"expected layer_idx {layer} in layer {layer}, got {module.layer_idx}")


@torch.no_grad()
def prove(decoder: Decoder) -> None:
    """For a family outside the table: run a few tokens with sharing and compare with the reference.

    Raises:
        UnsupportedModelError: the outputs differ, or either run fails.
    """
    from depthkv.plan import SharingPlan
    from depthkv.reference import ReferenceCache
    from depthkv.sharing import SharedModel

    plan = SharingPlan.every(2, decoder.num_layers, decoder.kinds)
    what = f"a {decoder.config.model_type} model, a family that depthkv has no facts about,"
    embedding = decoder.module.get_input_embeddings()  # type: ignore[operator]
    tokens = torch.arange(1, 7, device=embedding.weight.device)[None] % embedding.num_embeddings
    training = decoder.module.training
    decoder.module.eval()
    try:
        cache = ReferenceCache(plan.kv_source_layers)
        expected = decoder.module(input_ids=tokens, past_key_values=cache, use_cache=True)[0]
        if len(cache.pairs) != decoder.num_layers:
            raise UnsupportedModelError(f"expected every layer to use the cache, got {what} where some do not")
        with SharedModel(decoder, plan):
            got = decoder.module(input_ids=tokens, use_cache=False)[0]
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"expected layers that can share, got {what} in which a trial failed: {error}"
        ) from error
    finally:
        decoder.module.train(training)
    scale = expected.float().abs().max().clamp(min=1e-6)
    tolerance = 1e-4 if expected.dtype == torch.float32 else 3e-2
    if not ((got.float() - expected.float()).abs().max() / scale <= tolerance):
        raise UnsupportedModelError(f"expected sharing to equal the reference, got {what} where it does not")

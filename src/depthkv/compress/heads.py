"""Fewer KV heads: groups of heads merged into one, for a trade of depth against heads. The model is then adapted."""

from __future__ import annotations

import copy
import inspect
import re

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from depthkv.architectures import FAMILIES, Family, layer_kinds, text_config
from depthkv.decoder import Decoder, find_decoder
from depthkv.errors import DepthKVError, UnsupportedModelError

__all__ = ["check_kv_heads", "merge_kv_heads"]


def merge_kv_heads(model: PreTrainedModel, kv_heads: int) -> PreTrainedModel:
    """A new model with `kv_heads` KV heads in each layer, each the mean of a group of neighbouring heads.

    The mean of the projections' weights and biases is the start that arXiv:2305.13245, section 2, found best.
    Multi-head attention becomes grouped-query or, with one head, multi-query attention; a model with groups gets fewer.
    Query heads go on to read the head that theirs was merged into. Norms of the keys that all heads share stay; norms
    with weights for each head are averaged, too. Where the heads of a group are equal, the new model computes the same;
    otherwise it has to be trained, such as by `depthkv.adapt.adapt`.

    Args:
        model: a causal language model of transformers, without adapter and not quantised; it is not changed.
        kv_heads: a divisor of the model's KV heads.

    Returns:
        A model of the same class on one device, the first weight's, with weights of the same dtypes and nothing in
        common with `model`.

    Raises:
        UnsupportedModelError: a family without `num_key_value_heads` (GPT-2, GPT-NeoX) or that is not tested, layers
            that cannot share or have different numbers of heads, an adapter, quantised or offloaded weights.
        DepthKVError: a number that is no divisor.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"expected a model of transformers without an adapter, got {type(model).__name__}")
    present = check_kv_heads(model.config, kv_heads)
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError("expected weights that are not quantised to merge KV heads, got quantised ones")
    decoder = find_decoder(model)
    config = copy.deepcopy(model.config)
    text_config(config).num_key_value_heads = kv_heads
    if any(kind.kv_heads != kv_heads for kind in layer_kinds(config)):
        raise UnsupportedModelError(
            f"expected num_key_value_heads to set the KV heads of all layers, got {decoder.config.model_type}"
        )
    with torch.device("meta"):  # neither the time nor the memory of random weights
        merged: PreTrainedModel = type(model)._from_config(config, dtype=model.dtype)
    try:
        weights = _merged_weights(decoder, present, kv_heads)
        merged.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # missing, unknown or of another shape
        raise UnsupportedModelError(
            "expected only projections and norms of K and V to depend on the number of KV heads, got "
            f"{type(model).__name__}: {' '.join(str(error).split())}"
        ) from error
    merged.tie_weights()
    _copy_rest(model, merged)
    merged.generation_config = copy.deepcopy(model.generation_config)
    return merged.train(model.training)


def check_kv_heads(config: PreTrainedConfig, kv_heads: int) -> int:
    """Whether a model can be given `kv_heads` KV heads, by its config alone; returns how many it has now.

    Raises:
        UnsupportedModelError, DepthKVError: as `merge_kv_heads`.
    """
    kinds = layer_kinds(config)
    inner = text_config(config)
    if inner.model_type not in FAMILIES:  # heads could be read in another order than by groups of neighbours
        raise UnsupportedModelError(
            f"expected a family with tested facts, got {inner.model_type} (see docs/architectures.md)"
        )
    if "num_key_value_heads" not in inspect.signature(type(inner)).parameters:
        raise UnsupportedModelError(
            f"expected a model whose config has num_key_value_heads, got {inner.model_type}, which cannot have fewer "
            "KV heads"
        )
    present = kinds[0].kv_heads
    for layer, kind in enumerate(kinds):
        if kind.kv_heads != present:
            raise UnsupportedModelError(
                f"expected {present} KV heads in every layer, as in layer 0, got {kind.kv_heads} in layer {layer}"
            )
    whole = isinstance(kv_heads, int) and not isinstance(kv_heads, bool)
    if not whole or kv_heads < 1 or present % kv_heads:
        divisors = ", ".join(str(n) for n in range(1, present + 1) if present % n == 0)
        raise DepthKVError(
            f"expected a number of KV heads that divides the model's {present} ({divisors}), got {kv_heads!r}"
        )
    return present


def _merged_weights(decoder: Decoder, present: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """The state dict of the new model; every tensor is new."""
    family, config = decoder.family, decoder.config
    weights = dict(decoder.model.state_dict())
    names = {module: name for name, module in decoder.model.named_modules()}
    for layer, kind in enumerate(decoder.kinds):
        attention = f"{names[decoder.attention(layer)]}."
        own = {name.removeprefix(attention): weights.pop(name) for name in list(weights) if name.startswith(attention)}
        queries = config.num_attention_heads * kind.head_dim
        merged = _merged_attention(own, family, queries, present, kind.head_dim, kv_heads)
        weights |= {attention + name: tensor for name, tensor in merged.items()}
    for name, tensor in weights.items():
        if tensor.is_meta:
            raise UnsupportedModelError(f"expected weights in memory to merge KV heads, got {name} offloaded")
    # where weights are spread over several devices, they come together
    device = next(decoder.model.parameters()).device
    return {name: tensor.detach().to(device, copy=True) for name, tensor in weights.items()}


def _merged_attention(
    own: dict[str, torch.Tensor], family: Family, queries: int, present: int, head_dim: int, kv_heads: int
) -> dict[str, torch.Tensor]:
    """Tensors of one attention module, by their names within it. `queries`: rows of Q in a fused projection."""

    def mean(tensor: torch.Tensor) -> torch.Tensor:
        """`[present * rows, ...]` -> `[kv_heads * rows, ...]`"""
        groups = tensor.reshape(kv_heads, present // kv_heads, -1, *tensor.shape[1:])
        precise = groups.to(torch.promote_types(tensor.dtype, torch.float32))
        return precise.mean(1).flatten(0, 1).to(tensor.dtype)

    merged: dict[str, torch.Tensor] = {}
    per_head: dict[str, list[torch.Tensor]] = {}
    for name, tensor in own.items():
        part = name.partition(".")[0]
        if part == family.fused:  # rows of Q, then K, then V; other orders belong to families that were refused
            q, k, v = torch.split(tensor, [queries, present * head_dim, present * head_dim])
            merged[name] = torch.cat([q, mean(k), mean(v)])
        elif part in (family.k_proj, family.v_proj):
            merged[name] = mean(tensor)
        elif part == family.k_norm and (found := re.fullmatch(r"(\w+\.norms)\.\d+\.(\w+)", name)):  # StableLM
            per_head.setdefault(f"{found[1]}.{{}}.{found[2]}", []).append(tensor)
        elif part == family.k_norm and tensor.numel() == present * head_dim:  # OLMo 2 and 3, Cohere
            merged[name] = mean(tensor)
        else:
            merged[name] = tensor
    for name, tensors in per_head.items():
        merged |= {name.format(head): weight for head, weight in enumerate(mean(torch.stack(tensors)))}
    return merged


def _copy_rest(source: nn.Module, target: nn.Module) -> None:
    """What a state dict lacks: buffers and other tensors, such as rotary frequencies, and which weights train.

    Raises:
        UnsupportedModelError: a tensor that `source` has not got in memory.
    """
    old_modules = dict(source.named_modules())
    device = next(target.parameters()).device
    for name, module in target.named_modules():
        old = old_modules.get(name, nn.Module())
        for tensors in (module._buffers, vars(module)):
            for key, tensor in list(tensors.items()):
                if not isinstance(tensor, torch.Tensor) or not tensor.is_meta:
                    continue
                value = getattr(old, key, None)
                if not isinstance(value, torch.Tensor) or value.is_meta or value.shape != tensor.shape:
                    raise UnsupportedModelError(
                        f"expected tensors in memory that do not depend on KV heads, got {name}.{key}"
                    )
                tensors[key] = value.detach().to(device, copy=True)
        for key, parameter in module._parameters.items():
            before = getattr(old, key, None)
            if parameter is not None and isinstance(before, nn.Parameter):
                parameter.requires_grad_(before.requires_grad)

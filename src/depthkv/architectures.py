"""Facts per model family, in one table, and what they say about which layers may share.

A family is a `model_type` of transformers. A new one is one row in `FAMILIES` and one tiny config in the tests.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthkv.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["LayerKind", "layer_kinds"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a decoder keeps the parts that sharing touches, and what its MLP holds in memory.

    Names are attributes of transformers' modules.
    """

    layers: str = "layers"
    """The decoder's list of layers."""
    attention: str = "self_attn"
    """A layer's self-attention module."""
    k_proj: str = "k_proj"
    v_proj: str = "v_proj"
    k_norm: str | None = None
    """Norm on the keys that a follower can skip."""
    fused: str | None = None
    """One projection for Q, K and V instead of `k_proj` and `v_proj`."""
    fused_layout: str = "rows"
    """How `fused` orders its output: "rows" = all Q, all K, all V; "heads" = Q, K, V of head 0, then of head 1, ..."""
    cache_argument: str = "past_key_values"
    """Name of the cache in the attention's `forward`."""
    mlp_hidden: int = 4
    """Tensors of hidden size that are alive while the MLP runs: embeddings, input and residual of the layer, norm."""
    mlp_inner: int = 3
    """Tensors of intermediate size that are alive in the MLP at most. Llama's: activation, up, their product."""


_LLAMA = Family()
_K_NORM = Family(k_norm="k_norm")
_K_NORM_AFTER = Family(k_norm="k_norm", mlp_hidden=3)
"""Norms come after attention and MLP, not before."""

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": Family(mlp_hidden=6),
    "qwen3": _K_NORM,
    "qwen3_moe": _K_NORM,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _K_NORM,
    "phi": Family(k_norm="k_layernorm", mlp_inner=4),
    "phi3": Family(fused="qkv_proj", mlp_inner=4),
    "olmo": _LLAMA,
    "olmo2": _K_NORM_AFTER,
    "olmo3": _K_NORM_AFTER,
    "gpt_neox": Family(
        attention="attention",
        fused="query_key_value",
        fused_layout="heads",
        cache_argument="layer_past",
        mlp_inner=2,
    ),
    "gpt2": Family(layers="h", attention="attn", fused="c_attn", mlp_hidden=6, mlp_inner=4),
    "starcoder2": Family(mlp_inner=2),
    "stablelm": Family(k_norm="k_layernorm", mlp_hidden=6),
    "cohere": _K_NORM,
    "cohere2": _LLAMA,
    "granite": _LLAMA,
    "granitemoe": _LLAMA,
    "smollm3": _LLAMA,
    "glm": Family(mlp_inner=4),
    "glm4": Family(mlp_inner=4),
    "exaone4": _K_NORM_AFTER,
    "gpt_oss": _LLAMA,
    "helium": _LLAMA,
    "seed_oss": _LLAMA,
    "arcee": _LLAMA,
}
"""Families whose sharing is tested against `depthkv.reference`, by `config.model_type`."""


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What two layers must have in common before one can read the other's keys and values."""

    attention: str
    """transformers' name: "full_attention", "sliding_attention" or "chunked_attention"."""
    window: int | None
    """Tokens that a sliding or chunked layer sees; None for full attention."""
    rope: str
    """The rotary embedding in JSON, "none" where the layer has no positions."""
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        window = "" if self.window is None else f" of {self.window} tokens"
        rope = ", no rotary embedding" if self.rope == "none" else ""
        return f"{self.attention.replace('_', ' ')}{window}{rope}, {self.kv_heads} KV heads of {self.head_dim}"


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The language model's part of a (possibly multimodal) config."""
    return config.get_text_config(decoder=True)


def max_positions(config: PreTrainedConfig) -> int | None:
    """Tokens that the model has positions for, or None where the config does not say."""
    most = getattr(text_config(config), "max_position_embeddings", None)
    return most if isinstance(most, int) else None


def positions_of_one_rope(config: PreTrainedConfig) -> int | None:
    """Positions beyond which the rotary embedding of all changes with the longest sequence of a batch; None if none.

    Phi-3's "longrope" takes other factors for long texts, so a sequence would read keys rotated by the former.
    """
    config = text_config(config)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    most = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return most if isinstance(most, int) else None


_NEEDED = ("num_hidden_layers", "num_attention_heads", "hidden_size")
_SIZES = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 10_000) | dict.fromkeys(
    ("hidden_size", "head_dim", "sliding_window", "attention_chunk_size", "max_position_embeddings"), 2**40
)
"""Sizes in a config, and above what a file is damaged: lists as long as there are layers would fill the memory."""


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse models whose layers cannot share, by their config alone.

    Raises:
        UnsupportedModelError: encoder-decoder, cross attention, latent (MLA) or linear attention, built-in sharing.
    """
    config = text_config(config)
    name = config.model_type

    def refuse(what: str) -> None:
        raise UnsupportedModelError(f"expected a decoder with softmax attention in every layer, got {name} with {what}")

    if getattr(config, "is_encoder_decoder", False):
        refuse("an encoder")
    if getattr(config, "add_cross_attention", False) or getattr(config, "cross_attention_layers", None):
        refuse("cross attention")
    if getattr(config, "kv_lora_rank", None):
        refuse("multi-head latent attention (MLA), which caches no keys and values")
    if getattr(config, "num_kv_shared_layers", 0) or (
        getattr(config, "kv_source_layers", None) and hasattr(type(config), "kv_source_layers")
    ):
        refuse("layers that share KV already")
    for attribute, most in _SIZES.items():
        size = getattr(config, attribute, None)
        if size is None and attribute not in _NEEDED:
            continue
        if size is None:
            refuse(f"no {attribute} in its config")
        least = 0 if attribute in ("sliding_window", "attention_chunk_size") else 1  # 0: Qwen2-MoE without windows
        if isinstance(size, bool) or not isinstance(size, int) or not least <= size <= most:
            refuse(f"{attribute} {size!r:.50}, which is no whole number from {least} to {most:,}")
    if not isinstance(getattr(config, "rope_parameters", None) or {}, dict):
        refuse("rope_parameters that are no object")
    for attribute in ("layer_types", "no_rope_layers"):
        values = getattr(config, attribute, None)
        if values and (not isinstance(values, list | tuple) or len(values) != config.num_hidden_layers):
            refuse(f"{attribute} that are no list with an entry for each of its {config.num_hidden_layers} layers")
    allowed = {"full_attention", "sliding_attention", "chunked_attention"}
    for layer, layer_type in enumerate(getattr(config, "layer_types", None) or []):
        if layer_type not in allowed:
            refuse(f"{layer_type} in layer {layer}")
    for attribute in ("ssm_cfg", "state_size", "mamba_d_state", "linear_num_key_heads", "attn_layer_period"):
        if getattr(config, attribute, None) is not None:
            refuse(f"state-space or linear attention layers ({attribute} in its config)")


def layer_kinds(config: PreTrainedConfig) -> tuple[LayerKind, ...]:
    """One `LayerKind` per layer; a layer may read only sources of an equal kind. Needs no weights.

    Raises:
        UnsupportedModelError: encoder-decoder, cross attention, latent (MLA) or linear attention, built-in sharing.
    """
    check_supported(config)
    config = text_config(config)
    num_layers: int = config.num_hidden_layers
    layer_configs = getattr(config, "per_layer_config", None)
    if not isinstance(layer_configs, (list, tuple)) or len(layer_configs) != num_layers:
        layer_configs = [config] * num_layers
    layer_types = getattr(config, "layer_types", None) or [_layer_type(c) for c in layer_configs]
    return tuple(_kind(c, layer_types[i], i) for i, c in enumerate(layer_configs))


def _layer_type(config: Any) -> str:
    # the same rule as transformers' caches follow for configs without layer_types
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "chunked_attention"
    return "full_attention"


def _kind(config: Any, layer_type: str, layer: int) -> LayerKind:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}.get(layer_type)
    rope = getattr(config, "rope_parameters", None) or {}
    if isinstance(rope.get(layer_type), dict):  # Gemma 3 and others: a base for each type of layer
        rope = rope[layer_type]
    size = getattr(config, window, None) if window else None
    if size == 0:
        raise UnsupportedModelError(f"expected {window} of at least 1 where layer {layer} has a window, got 0")
    no_rope = getattr(config, "no_rope_layers", None)
    has_rope = not no_rope or bool(no_rope[layer])
    return LayerKind(
        attention=layer_type,
        window=size,
        rope=json.dumps(rope, sort_keys=True, default=str) if has_rope else "none",
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
    )

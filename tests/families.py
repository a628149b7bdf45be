"""A tiny random model of every family in the table; a new family is one more entry here."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

NUM_LAYERS = 6

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_HEAD_DIM = {"head_dim": 8}
_SLIDING = {"sliding_window": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": _SLIDING,
    "ministral": {**_HEAD_DIM, "sliding_window": 8},
    "mixtral": _MOE,
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 16},
    "qwen3": _HEAD_DIM,
    "qwen3_moe": {**_MOE, **_HEAD_DIM},
    "gemma": _HEAD_DIM,
    "gemma2": {**_HEAD_DIM, **_SLIDING},
    "gemma3_text": {**_HEAD_DIM, **_SLIDING, "sliding_window_pattern": 3},
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "phi3": {},
    "olmo": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo3": _SLIDING,
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 256, "n_inner": 48},
    "starcoder2": _SLIDING,
    "stablelm": {"qk_layernorm": True},
    "cohere": {"use_qk_norm": True},
    "cohere2": {**_HEAD_DIM, "sliding_window": 8, "sliding_window_pattern": 3},
    "granite": {},
    "granitemoe": _MOE,
    "smollm3": {"no_rope_layer_interval": 3},
    "glm": _HEAD_DIM,
    "glm4": _HEAD_DIM,
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": 3},
    "gpt_oss": {**_MOE, **_HEAD_DIM, **_SLIDING},
    "helium": _HEAD_DIM,
    "seed_oss": _HEAD_DIM,
    "arcee": {},
}


def tiny_config(family: str, **overrides: Any) -> Any:
    """The family's config at toy size."""
    settings = {**_COMMON, **CONFIGS[family], **overrides}
    if family == "gpt2":
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            settings.pop(name, None)
        settings.pop("num_key_value_heads")
    if family in ("gpt_neox", "phi"):
        settings["num_key_value_heads"] = 4
    return AutoConfig.for_model(family, **settings)


def tiny_model(family: str, attention: str = "sdpa", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A randomly initialised model in evaluation mode; weights are large enough for layers to differ visibly."""
    torch.manual_seed(seed)
    config = tiny_config(family, **overrides)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    return model

"""Configs of exported checkpoints under model types of their own, for transformers in vLLM's processes.

They are classes of a module, since vLLM pickles them to its other processes.
"""

from __future__ import annotations

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config


class DepthKVLlamaConfig(LlamaConfig):
    """Of an exported llama."""

    model_type = "depthkv_llama"


class DepthKVMistralConfig(MistralConfig):
    """Of an exported mistral."""

    model_type = "depthkv_mistral"


class DepthKVQwen2Config(Qwen2Config):
    """Of an exported qwen2."""

    model_type = "depthkv_qwen2"


class DepthKVQwen3Config(Qwen3Config):
    """Of an exported qwen3."""

    model_type = "depthkv_qwen3"


CONFIGS: tuple[type[PreTrainedConfig], ...] = (
    DepthKVLlamaConfig,
    DepthKVMistralConfig,
    DepthKVQwen2Config,
    DepthKVQwen3Config,
)

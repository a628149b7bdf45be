"""vLLM serves exported checkpoints: followers get no cache blocks and compute no keys and values.

vLLM finds `register` by the entry point group `vllm.general_plugins` and calls it in each of its processes. Nothing
here imports vLLM before that, and of vLLM only what a model needs is imported then: the classes in `models` when one
of them is loaded.
"""

from __future__ import annotations

import re
import warnings

TESTED = ("0.32",)
"""Versions of vLLM, major and minor, that tests/with_vllm passes with."""

MODELS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""By model type: transformers' architecture, which vLLM has under the same name."""


def register() -> None:
    """Tell vLLM and transformers of the model types and architectures of exports. May be called again."""
    import vllm
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from depthkv.export import ARCHITECTURE_PREFIX
    from depthkv.vllm_plugin.configs import CONFIGS

    if found := untested(vllm.__version__):
        warnings.warn(found, stacklevel=2)
    for config in CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
    known = ModelRegistry.get_supported_archs()
    for architecture in MODELS.values():
        name = ARCHITECTURE_PREFIX + architecture
        if name not in known:
            ModelRegistry.register_model(name, f"depthkv.vllm_plugin.models:{name}")


def untested(version: str) -> str | None:
    """A warning, unless depthkv's plugin was tested with this version of vLLM."""
    release = re.match(r"\d+\.\d+", version)
    if release is not None and release[0] in TESTED:
        return None
    return (
        f"expected vLLM {' or '.join(TESTED)}, which depthkv's plugin was tested with, got {version}: compare what an "
        "exported checkpoint writes there with depthkv generate before you serve it"
    )

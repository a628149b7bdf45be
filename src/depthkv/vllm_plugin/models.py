"""vLLM's models with the plan of an exported checkpoint: nothing but what followers do otherwise.

vLLM itself lets one attention layer read the cache of an earlier one (`kv_sharing_target_layer_name`): such a layer has
no KV spec, so the memory goes to more blocks. Here that name is filled in from the plan, and the fused projection of a
follower is one of Q alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.utils import KVSharingFastPrefillMetadata

from depthkv.plan import SharingPlan
from depthkv.vllm_plugin.checks import (
    check_fast_prefill,
    check_stages,
    num_trailing_followers,
    plan_of,
    refuse_backend,
)

_OWN_KV = re.compile(r"\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)\.")


class QueryProjection(ColumnParallelLinear):
    """In the place of a follower's `qkv_proj`: computes Q, and gives zeros for K and V, which nothing reads."""

    def __init__(self, replaced: QKVParallelLinear) -> None:
        super().__init__(
            input_size=replaced.hidden_size,
            output_size=replaced.total_num_heads * replaced.head_size,
            bias=replaced.bias is not None,
            skip_bias_add=replaced.skip_bias_add,
            params_dtype=replaced.params_dtype,
            quant_config=replaced.quant_config,
            prefix=replaced.prefix,
            return_bias=replaced.return_bias,
        )
        self.num_unread = 2 * replaced.num_kv_heads * replaced.head_size
        """Width of K and V on this rank."""

    def forward(self, input_: torch.Tensor) -> Any:
        query, *bias = super().forward(input_)
        return nn.functional.pad(query, (0, self.num_unread)), *bias


class SharedKV:
    """Goes before one of vLLM's causal language models in the bases of a class."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        plan = plan_of(vllm_config.model_config.hf_config)
        size = vllm_config.parallel_config.pipeline_parallel_size
        check_stages(plan, [get_pp_indices(plan.num_layers, rank, size) for rank in range(size)])
        with reading_sources(plan):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.followers = frozenset(plan.followers)
        assert isinstance(self, nn.Module)
        for name, module in list(self.named_modules()):
            if isinstance(module, QKVParallelLinear) and extract_layer_index(name) in self.followers:
                attention = self.get_submodule(name.rpartition(".")[0])
                if vllm_config.lora_config is None:
                    self.set_submodule(name, QueryProjection(module))
                else:  # vLLM wraps projections for LoRA by their exact type; K and V are then products with zeros
                    for parameter in module.parameters():
                        parameter.data.zero_()
                if hasattr(attention, "k_norm"):
                    attention.k_norm = nn.Identity()
        tail = num_trailing_followers(plan)
        if vllm_config.cache_config.kv_sharing_fast_prefill and tail:
            check_fast_prefill(eager=vllm_config.model_config.enforce_eager, stages=size)
            _stop_early(list(self.get_submodule("model.layers").children())[-tail:])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Without the K and V that an export with --keep-kv holds for followers."""
        loaded: set[str] = super().load_weights(  # type: ignore[misc]
            (name, weight)
            for name, weight in weights
            if not ((found := _OWN_KV.search(name)) and int(found[1]) in self.followers)
        )
        return loaded


@contextmanager
def reading_sources(plan: SharingPlan) -> Iterator[None]:
    """Attention layers that are made meanwhile read the cache of their source."""
    original = Attention.__init__

    def init(self: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
        layer = extract_layer_index(prefix)
        source = plan.kv_source_layers[layer]
        if source == layer:
            original(self, *args, prefix=prefix, **kwargs)
            return
        kwargs["kv_sharing_target_layer_name"] = prefix.replace(f".{layer}.", f".{source}.", 1)
        try:
            original(self, *args, prefix=prefix, **kwargs)
        except NotImplementedError as error:  # how FlexAttention and the backends of MLA refuse it
            name = self.attn_backend.get_name() if hasattr(self, "attn_backend") else type(self).__name__
            raise refuse_backend(name, layer) from error

    Attention.__init__ = init
    try:
        yield
    finally:
        Attention.__init__ = original


def _stop_early(layers: Sequence[Any]) -> None:
    """Run these last layers, all of them followers, for those positions only whose logits are needed.

    Where vLLM is told so (`--kv-sharing-fast-prefill`), it prepares the attention of such layers for these positions.
    """
    name = layers[-1].self_attn.attn.layer_name

    def needed() -> torch.Tensor | None:
        metadata = get_forward_context().attn_metadata
        own = metadata.get(name) if isinstance(metadata, dict) else None
        if not isinstance(own, KVSharingFastPrefillMetadata) or own.num_logits_indices is None:
            return None
        kept: torch.Tensor = own.logits_indices_padded[: own.num_logits_indices]
        return kept

    def wrapped(original: Callable[..., Any], is_first: bool, is_last: bool) -> Callable[..., Any]:
        def forward(positions: torch.Tensor, *states: torch.Tensor, **kwargs: Any) -> Any:
            kept = needed()
            if kept is None:
                return original(positions, *states, **kwargs)
            if is_first:
                states = tuple(state[kept] for state in states)
            states = original(positions[kept], *states, **kwargs)
            if is_last:
                whole = tuple(state.new_zeros(len(positions), *state.shape[1:]) for state in states)
                for state, part in zip(whole, states, strict=True):
                    state[kept] = part
                states = whole
            return states

        return forward

    for i, layer in enumerate(layers):
        layer.forward = wrapped(layer.forward, i == 0, i == len(layers) - 1)


class DepthKVLlamaForCausalLM(SharedKV, LlamaForCausalLM):
    """An exported llama."""


class DepthKVMistralForCausalLM(SharedKV, MistralForCausalLM):
    """An exported mistral."""


class DepthKVQwen2ForCausalLM(SharedKV, Qwen2ForCausalLM):
    """An exported qwen2."""


class DepthKVQwen3ForCausalLM(SharedKV, Qwen3ForCausalLM):
    """An exported qwen3."""

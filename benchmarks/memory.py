"""Bytes by formula and as measured: weights, cache and activations of a prefill, for six families and two plans each.

The models have random weights and a moderate size. Weights are the storages of all parameters. The cache is what
`generate()` holds one token after the prompt, when windowed layers hold their window and no view of the prompt.
Activations are the peak beside weights and cache: on a CPU of every tensor that an operation returned and that is still
alive, on a GPU of the allocator, which also counts what an operation needs inside.

    python benchmarks/memory.py --out docs/raw/memory.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from depthkv import SharingPlan, share
from depthkv.architectures import layer_kinds
from depthkv.machine import environment
from depthkv.memory import cache_bytes, format_bytes, measured_cache_bytes, prefill_activation_bytes, weight_bytes

SIZES: dict[str, Any] = {
    "vocab_size": 16000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 512},
    "qwen3": {"head_dim": 128},
    "gemma3_text": {"head_dim": 64, "sliding_window": 512, "sliding_window_pattern": 6},
    "phi3": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 512, "n_layer": 12, "n_head": 8, "n_positions": 8192},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
}
DEFAULT = ("llama", "mistral", "qwen3", "gemma3_text", "gpt2", "mixtral")
RETENTIONS = (1.0, 0.25)


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """What a model, its cache and its prefill take."""

    weights: int
    cache: int
    activations: int
    """The peak of the prefill beside weights and cache."""


class LiveStorages(TorchDispatchMode):
    """Bytes of the storages that operations made while the mode is on, each counted once, until they are freed.

    What a kernel needs inside does not show. On a CPU that was nothing: the peaks were, to the byte, those of the
    allocator in torch's profiler.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        """`known` was there before and does not count."""
        super().__init__()
        self._live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.current = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and (storage := value.untyped_storage())._cdata not in self._live:
                self._live[storage._cdata] = storage.nbytes()
                self.current += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.current)
        return result

    def _free(self, key: int) -> None:
        self.current -= self._live.pop(key)


def random_model(family: str, dtype: torch.dtype, device: str = "cpu", **changes: Any) -> PreTrainedModel:
    """A model of the family with random weights, all in `dtype`."""
    sizes = {**SIZES, **FAMILIES[family], **changes}
    if family == "gpt2":  # has names of its own, which must not be given twice
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            sizes.pop(name)
        del sizes["num_key_value_heads"], sizes["intermediate_size"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval().to(device)


def measure(model: PreTrainedModel, plan: SharingPlan, context: int, batch: int = 1) -> Bytes:
    """What `generate()` really takes for random prompts of `context` tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (batch, context), generator=generator).to(model.device)
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    known = [*model.parameters(), *model.buffers(), ids]
    weights = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())
    # the second token's step makes windowed layers hold their window; it needs less than the prefill
    options |= {"max_new_tokens": 2}
    with share(model, plan):
        model.generate(ids[:, :8], **options)  # what is made once stays out of the measurement
        if model.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            cache = model.generate(ids, **options).past_key_values
            peak = torch.cuda.max_memory_allocated() - before
        else:
            with LiveStorages(known) as live:
                cache = model.generate(ids, **options).past_key_values
            peak = live.peak
    kept = cache_bytes(model.config, model.dtype, context, batch, plan)
    return Bytes(weights=weights, cache=measured_cache_bytes(cache), activations=peak - kept)


def predict(model: PreTrainedModel, plan: SharingPlan, context: int, batch: int = 1) -> Bytes:
    """The same by formula, from the config."""
    config, dtype = model.config, model.dtype
    return Bytes(
        weights=weight_bytes(config, dtype) or 0,
        cache=cache_bytes(config, dtype, context + 1, batch, plan),  # the prompt and the token that was written
        activations=prefill_activation_bytes(config, dtype, context, batch, plan),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=list(DEFAULT), choices=list(FAMILIES))
    parser.add_argument("--context", type=int, default=2048, help="tokens of each prompt")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, help="add the figures to this file")
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    parts = ("weights", "cache", "activations")
    print(f"{'family':12} {'kept':>5}" + "".join(f" {part:>12} {'measured':>11} {'error':>8}" for part in parts))
    for family in args.families:
        model = random_model(family, getattr(torch, args.dtype), args.device)
        kinds = layer_kinds(model.config)
        for retention in RETENTIONS:
            plan = SharingPlan.for_retention(retention, kinds)
            formula = predict(model, plan, args.context, args.batch_size)
            measured = measure(model, plan, args.context, args.batch_size)
            row: dict[str, Any] = {"family": family, "retention": plan.retention, "leaders": list(plan.leaders)}
            line = f"{family:12} {plan.retention:5.2f}"
            for part in parts:
                expected, found = getattr(formula, part), getattr(measured, part)
                row[part] = {"formula": expected, "measured": found, "error": expected / found - 1}
                line += f" {format_bytes(expected):>12} {format_bytes(found):>11} {expected / found - 1:>+8.2%}"
            both = formula.weights + formula.cache, measured.weights + measured.cache
            row["weights_and_cache_error"] = both[0] / both[1] - 1
            rows.append(row)
            print(line, flush=True)
    result = {
        "run": "memory",
        "command": "python " + " ".join(sys.argv),
        "environment": environment(torch.device(args.device)),
        "dtype": args.dtype,
        "context": args.context,
        "batch_size": args.batch_size,
        "sizes": SIZES,
        "rows": rows,
    }
    text = json.dumps(result)
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""Speed of a shared cache in few bits beside the same in the model's dtype and the full cache, all in turns in one run.

    python benchmarks/recipes_speed.py --threads 2 --prompt-tokens 2048 --out docs/raw/recipes-speed.jsonl

Beside what was measured stands, by formula, what a decoding step reads: of the cache as it is packed, once for each
layer that reads it (what a kernel that unpacks in registers would read), and what depthkv moves today, which unpacks
each leader once, writes the result, and lets every layer read that.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from tables import table

from depthkv import SharingPlan, load
from depthkv.architectures import layer_kinds
from depthkv.bench import BenchConfig, How, Sample, bench_arms
from depthkv.compress import CacheRecipe
from depthkv.machine import environment
from depthkv.memory import format_bytes, kv_bytes_per_layer

FIELDS = ("ttft_s", "itl_s", "decode_tokens_per_s", "cache_bytes", "peak_above_start_bytes")


def arms_of(plan: SharingPlan, widths: list[int], tokens: int | None, rule: str) -> dict[str, How | None]:
    """By name, in the order of the table; the shared cache is what others are compared with."""
    arms: dict[str, How | None] = {"full": None, "shared": plan}
    for bits in widths:
        arms[f"shared, {bits} bits"] = CacheRecipe(plan=plan, key_bits=bits, value_bits=bits)
    if tokens is not None:
        arms[f"shared, {tokens} tokens"] = CacheRecipe(plan=plan, tokens=tokens, rule=rule)
    return arms


def moved_bytes(how: How | None, config: Any, dtype: torch.dtype, tokens: int) -> tuple[int, int]:
    """Cache bytes that a step after `tokens` tokens of one sequence reads if each reader unpacks for itself, and that
    it moves if each leader is unpacked once, written, and read by its readers."""
    kinds = layer_kinds(config)
    recipe = how if isinstance(how, CacheRecipe) else None
    plan = SharingPlan.full(len(kinds)) if how is None else recipe.plan if recipe else how
    assert isinstance(plan, SharingPlan)
    fused = unpacked = 0
    for layer, source in enumerate(plan.kv_source_layers):
        kind = kinds[layer]
        kept = tokens if kind.window is None else min(tokens, kind.window)
        plain = kept * kv_bytes_per_layer(kind, dtype)
        if recipe is None or kind.window is not None:
            fused, unpacked = fused + plain, unpacked + plain
            continue
        plain = recipe.kept_tokens(tokens) * kv_bytes_per_layer(kind, dtype)
        packed = recipe.layer_bytes(kind, recipe.bits[source], dtype, tokens)
        fused += packed
        # the leader reads what is packed and writes it out; then it and its followers read that
        unpacked += plain + (packed + plain if source == layer else 0)
    return fused, unpacked


def ratio(samples: dict[str, tuple[Sample, ...]], arm: str, field: str) -> float:
    """Median over the repeats of the arm's figure by the shared cache's; they ran one after the other."""
    pairs = zip(samples[arm], samples["shared"], strict=True)
    return statistics.median(getattr(own, field) / getattr(shared, field) for own, shared in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; all cores by default")
    parser.add_argument("--keep-every", type=int, default=2, help="every n-th layer keeps a cache")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 8, 2])
    parser.add_argument("--tokens", type=int, help="one more arm: at most so many tokens, in the model's dtype")
    parser.add_argument("--rule", default="window")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append a JSON line for each prompt length to this file")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model, _, _ = load(arguments.model, dtype=arguments.dtype, device=arguments.device, progress=print)
    plan = SharingPlan.every(arguments.keep_every, len(layer_kinds(model.config)))
    arms = arms_of(plan, arguments.bits, arguments.tokens, arguments.rule)
    for prompt_tokens in arguments.prompt_tokens:
        config = BenchConfig(
            prompt_tokens=prompt_tokens,
            new_tokens=arguments.new_tokens,
            repeats=arguments.repeats,
            batch_size=arguments.batch_size,
        )
        samples, _ = bench_arms(model, arms, config)
        halfway = prompt_tokens + (arguments.new_tokens - 2) // 2
        found: dict[str, dict[str, Any]] = {}
        for arm, how in arms.items():
            runs = samples[arm]
            if not runs or not samples["shared"]:
                found[arm] = {"out_of_memory": not runs}
                continue
            fused, unpacked = moved_bytes(how, model.config, model.dtype, halfway)
            values = {field: [getattr(sample, field) for sample in runs] for field in FIELDS}
            found[arm] = {name: statistics.median(v) for name, v in values.items() if None not in v}
            found[arm] |= {f"{name}_all": v for name, v in values.items()}
            found[arm] |= {f"{name}_by_shared": ratio(samples, arm, name) for name in FIELDS[:4]}
            found[arm] |= {
                "recipe": how.figures() if isinstance(how, CacheRecipe) else None,
                "step_reads_packed_bytes": arguments.batch_size * fused,
                "step_moves_unpacked_bytes": arguments.batch_size * unpacked,
            }
        rows = [
            [
                arm,
                f"{figures['ttft_s'] * 1000:.0f} ms",
                f"{figures['itl_s'] * 1000:.1f} ms",
                f"{figures['decode_tokens_per_s']:.1f}",
                f"{figures['decode_tokens_per_s_by_shared']:.2f}x",
                format_bytes(figures["cache_bytes"]),
                format_bytes(figures["step_reads_packed_bytes"]),
                format_bytes(figures["step_moves_unpacked_bytes"]),
            ]
            for arm, figures in found.items()
            if "ttft_s" in figures
        ]
        headings = ["cache", "first token", "between tokens", "tokens/s", "of shared", "held"]
        print(f"\n{arguments.model}, {arguments.dtype}, {prompt_tokens} + {arguments.new_tokens} tokens")
        print(table([*headings, "a step reads, packed", "a step moves, unpacked"], rows))
        line = {
            "model": arguments.model,
            "environment": environment(torch.device(arguments.device)),
            "dtype": arguments.dtype,
            "threads": torch.get_num_threads(),
            "plan": list(plan.kv_source_layers),
            "prompt_tokens": prompt_tokens,
            "new_tokens": arguments.new_tokens,
            "batch_size": arguments.batch_size,
            "repeats": arguments.repeats,
            "arms": found,
        }
        print(json.dumps(line))
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

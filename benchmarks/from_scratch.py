"""Training from scratch at equal cache size: a deep model whose layers share KV, or a shallower one.

The comparison of arXiv:2604.22782, figure 5. All arms of a size train on the same blocks in the same order for as many
tokens; a shallower model takes less compute for them. Prints one JSON line per size, arm and seed, and a table of the
test loss by size of the cache.

    python benchmarks/from_scratch.py --sizes small --seeds 0 1 2 --out scratch.jsonl

Several processes can share the work, each with some of the sizes, arms or seeds, and append to one file; afterwards
`--table scratch.jsonl` prints the table of all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from depthkv import RandomCrossLayer, SharingPlan
from depthkv.adapt import AdaptConfig, adapt
from depthkv.adapt.pretrain import equal_cache_layers, from_config, train_tokenizer
from depthkv.architectures import layer_kinds
from depthkv.data import resolve_data, split_documents, token_blocks
from depthkv.evaluate import retention_curve, spread_blocks
from depthkv.samplers import FullCache, LeaderSubset

CACHES = {"1": 1.0, "1/2": 1 / 2, "1/4": 1 / 4}
"""Sizes of the cache, as parts of the deep model's full one."""

HEAD_DIM = 32
SIZES: dict[str, dict[str, int]] = {
    "small": dict(
        num_hidden_layers=8, hidden_size=192, intermediate_size=512, num_attention_heads=6, num_key_value_heads=2
    ),
    "medium": dict(
        num_hidden_layers=12, hidden_size=320, intermediate_size=864, num_attention_heads=10, num_key_value_heads=2
    ),
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the table."""

    sampler: Callable[[int, float], Any]
    """From a seed and a `cross_layer_prob`."""
    cache: str | None = None
    """Of `CACHES`: as shallow as to cache so much without sharing. None is the deep model, measured with each."""


ARMS: dict[str, Arm] = {
    "deep-r-cla": Arm(sampler=lambda seed, prob: RandomCrossLayer(cross_layer_prob=prob, seed=seed)),
    "deep-leader-subset": Arm(
        sampler=lambda seed, prob: LeaderSubset(retentions=tuple(CACHES.values()), even_prob=0.5, seed=seed)
    ),
    "deep-base": Arm(sampler=lambda seed, prob: FullCache()),
    "shallow-1/2": Arm(sampler=lambda seed, prob: FullCache(), cache="1/2"),
    "shallow-1/4": Arm(sampler=lambda seed, prob: FullCache(), cache="1/4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="builtin:anarchism")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the weights, the order and the routing")
    parser.add_argument("--tokens", type=int, default=12_000_000, help="training tokens of every arm")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--prob", type=float, default=0.5, help="cross_layer_prob of deep-r-cla")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16, help="blocks in one step")
    parser.add_argument("--blocks", type=int, default=64, help="of validation and of test")
    parser.add_argument("--out", type=Path, help="append the lines to this file, too")
    parser.add_argument("--table", nargs="+", type=Path, metavar="JSONL", help="only print the table of these files")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(line) for path in args.table for line in path.read_text().splitlines()))
        return

    documents, held_out = split_documents(resolve_data(args.data))
    validation, test = split_documents(held_out, held_out_fraction=0.5, seed=1)
    tokenizer = train_tokenizer(documents, args.vocab_size)
    train = token_blocks(documents, tokenizer, args.block_size)
    held = {
        name: spread_blocks(token_blocks(part, tokenizer, args.block_size), args.blocks)
        for name, part in (("validation", validation), ("test", test))
    }
    rows = []
    for size in args.sizes:
        for seed in args.seeds:
            for arm in args.arms:
                row = run_arm(size, arm, seed, train, held, tokenizer, args)
                line = json.dumps(row)
                print(line, flush=True)
                if args.out is not None:
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(line + "\n")
                rows.append(row)
    print(table(rows))


def run_arm(
    size: str,
    name: str,
    seed: int,
    train: torch.Tensor,
    held: dict[str, torch.Tensor],
    tokenizer: Any,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Train and measure one model."""
    arm, deep = ARMS[name], SIZES[size]["num_hidden_layers"]
    num_layers = deep if arm.cache is None else equal_cache_layers(deep, CACHES[arm.cache])
    model: Any = new_model(size, num_layers, seed, tokenizer, args.block_size)
    model.to(args.device)
    kinds = layer_kinds(model.config)
    if arm.cache is None:
        plans = {cache: SharingPlan.for_retention(retention, kinds) for cache, retention in CACHES.items()}
    else:
        plans = {arm.cache: SharingPlan.full(num_layers)}
    config = AdaptConfig(
        max_tokens=args.tokens,
        learning_rate=args.learning_rate,
        seed=seed,
        batch_size=args.batch_size,
        block_size=args.block_size,
        decay="cosine",
        final_lr_fraction=0.05,
        weight_decay=args.weight_decay,
        trainable="all",
    )
    started = time.perf_counter()
    result = adapt(model, train, config, sampler=arm.sampler(seed, args.prob), progress=False)
    seconds = time.perf_counter() - started
    device = torch.device(args.device)
    bf16 = config.uses_bf16(device)
    with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        curves = {
            part: retention_curve(model, blocks, list(plans.values()), kv_dtype=torch.bfloat16)
            for part, blocks in held.items()
        }
    last = result.losses[-50:]
    return {
        "size": size,
        "arm": name,
        "seed": seed,
        "layers": num_layers,
        "parameters": result.num_trained,
        "tokens": result.tokens,
        "epochs": round(result.tokens / train.numel(), 2),
        "seconds": round(seconds, 1),
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "tokens_per_step": config.tokens_per_step,
        "prob": args.prob if name == "deep-r-cla" else None,
        "precision": "bf16" if bf16 else "fp32",
        "vocab_size": len(tokenizer),
        "train_loss": round(statistics.fmean(last), 4),
        "kv_bytes_per_token": {cache: r.kv_bytes_per_token for cache, r in zip(plans, curves["test"], strict=True)},
        **{part: {c: round(r.loss, 4) for c, r in zip(plans, rows, strict=True)} for part, rows in curves.items()},
    }


def new_model(size: str, num_layers: int, seed: int, tokenizer: Any, block_size: int, **changes: int) -> Any:
    """A random llama: the size's first `num_layers` layers, for the tokenizer's vocabulary; `changes` of the config."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **SIZES[size],
        "head_dim": HEAD_DIM,
        "max_position_embeddings": block_size,
        "tie_word_embeddings": True,
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        **changes,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        return from_config(path, num_layers=num_layers, seed=seed)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Test loss by size of the cache: mean over the seeds, and the standard deviation where there are several."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["size"], row["arm"], row["tokens"]), []).append(row)
    header = "".join(f"{'cache ' + cache:>16}" for cache in CACHES)
    lines = [f"{'size':8} {'arm':20} {'layers':>6} {'params':>8} {'tokens':>8} {'seeds':>5} {header}"]
    rank = {name: place for place, name in enumerate([*SIZES, *ARMS])}
    for size, arm, tokens in sorted(groups, key=lambda key: (rank[key[0]], key[2], rank[key[1]])):
        members = groups[size, arm, tokens]
        cells = ""
        for cache in CACHES:
            losses = [row["test"][cache] for row in members if cache in row["test"]]
            spread = f" ±{statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
            cells += f"{f'{statistics.fmean(losses):.4f}{spread}' if losses else '-':>16}"
        sizes = f"{members[0]['parameters'] / 1e6:>7.1f}M {tokens / 1e6:>7.1f}M"
        lines.append(f"{size:8} {arm:20} {members[0]['layers']:>6} {sizes} {len(members):>5} {cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

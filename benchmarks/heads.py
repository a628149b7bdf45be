"""Depth against heads: the loss of models with fewer KV heads and fewer caching layers, by KV bytes per token.

`adapt`: a model with its KV heads, and with groups of them merged (`depthkv.compress.heads`). Both are adapted by the
same recipe for as long, and measured before and afterwards, at the same sizes of the cache as far as layers allow.

    python benchmarks/heads.py adapt --kv-heads 1 --minutes 20 --out docs/raw/heads.jsonl

`scratch`: multi-head, grouped-query and multi-query models trained from scratch with routing on as many tokens, then
the multi-head one with its heads merged, and trained on for a tenth of them (arXiv:2305.13245, section 2).

    python benchmarks/heads.py scratch --heads 6 3 2 1 --out docs/raw/heads.jsonl

Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import from_scratch
import torch

from depthkv import SharingPlan, load
from depthkv.adapt import AdaptConfig, AdaptResult, adapt
from depthkv.adapt.adapters import LoraSettings
from depthkv.adapt.pretrain import train_tokenizer
from depthkv.adapt.stages import ADAPTER_LEARNING_RATE, Stages, StagesResult, train_in_stages
from depthkv.architectures import layer_kinds
from depthkv.compress.heads import merge_kv_heads
from depthkv.data import resolve_data, split_documents, token_blocks
from depthkv.evaluate import retention_curve, spread_blocks
from depthkv.machine import environment

Plans = list[SharingPlan]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="run", required=True)
    adapted = modes.add_parser("adapt", help="merge the KV heads of a model and adapt it")
    adapted.add_argument("--model", default="builtin:smollm2-135m")
    adapted.add_argument("--kv-heads", nargs="+", type=int, default=[1], help="of the merged models")
    budget = adapted.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="of training of every arm [default: 15]")
    budget.add_argument("--tokens", type=int, help="of training of every arm, instead of --minutes")
    adapted.add_argument("--recipe", choices=["layers", "adapter"], default="layers")
    adapted.add_argument("--blocks", type=int, default=32, help="held-out blocks")
    adapted.add_argument("--batch-size", type=int, default=AdaptConfig(max_tokens=1).batch_size)
    scratch = modes.add_parser("scratch", help="multi-head, grouped-query and multi-query models from scratch")
    scratch.add_argument("--size", choices=list(from_scratch.SIZES), default="small")
    scratch.add_argument("--heads", nargs="+", type=int, default=[6, 3, 2, 1], help="KV heads, those to merge first")
    scratch.add_argument("--tokens", type=int, default=3_000_000, help="training tokens of every arm")
    scratch.add_argument("--more", type=float, default=0.1, help="part of the tokens after merging")
    scratch.add_argument("--learning-rate", type=float, default=3e-3)
    scratch.add_argument("--more-learning-rate", type=float, default=1e-3)
    scratch.add_argument("--vocab-size", type=int, default=4096)
    scratch.add_argument("--blocks", type=int, default=64, help="held-out blocks")
    scratch.add_argument("--batch-size", type=int, default=8)
    for mode in (adapted, scratch):
        mode.add_argument("--data", default="builtin:anarchism")
        mode.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        mode.add_argument("--retentions", nargs="+", type=float, default=[1.0, 0.5, 0.25])
        mode.add_argument("--block-size", type=int, default=512)
        mode.add_argument("--seed", type=int, default=0)
        mode.add_argument("--out", type=Path, help="append the JSON line to this file, too")
    args = parser.parse_args(argv)
    row = (run_adapt if args.run == "adapt" else run_scratch)(args)
    common = {name: getattr(args, name) for name in ("run", "data", "block_size", "batch_size", "blocks", "seed")}
    given = sys.argv[1:] if argv is None else argv
    row = common | row
    row |= {"command": shlex.join(["python", "benchmarks/heads.py", *given])}
    row |= {"environment": environment(torch.device(args.device))}
    print(table(row))
    line = json.dumps(row)
    print(line, flush=True)
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def run_adapt(args: argparse.Namespace) -> dict[str, Any]:
    """One arm for the model as it is, and one for each number of merged heads."""
    documents, held_out = split_documents(resolve_data(args.data))
    arms = []
    for kv_heads in (None, *args.kv_heads):
        model, tokenizer, _ = load(args.model, dtype="float32", device=args.device)
        kinds = layer_kinds(model.config)
        present = kinds[0].kv_heads
        retentions = list(args.retentions)
        if kv_heads is not None:
            model = merge_kv_heads(model, kv_heads)
            kinds = layer_kinds(model.config)
        else:  # the sizes of the merged ones, too
            retentions += [r * few / present for few in args.kv_heads for r in args.retentions]
        plans = plans_of(retentions, kinds)
        train = token_blocks(documents, tokenizer, args.block_size)
        held = spread_blocks(token_blocks(held_out, tokenizer, args.block_size), args.blocks)
        minutes = args.minutes if args.minutes is not None or args.tokens is not None else 15.0
        is_adapter = args.recipe == "adapter"
        config = AdaptConfig(
            max_minutes=minutes,
            max_tokens=args.tokens,
            seed=args.seed,
            batch_size=args.batch_size,
            block_size=args.block_size,
            **({"learning_rate": ADAPTER_LEARNING_RATE} if is_adapter else {}),
        )
        stages = Stages(finetune=0.7, lora=LoraSettings(rank=16, alpha=32.0)) if is_adapter else Stages()
        before = curve(model, held, plans, config)
        result = train_in_stages(model, train, config, stages, tell=log, progress=False)
        after = curve(result.model, held, plans, config)
        found = layer_kinds(model.config)[0].kv_heads
        label = named(found) if kv_heads is None else f"{named(present)} merged into {found}"
        arms.append({"arm": label, "kv_heads": found, "merged_from": present if kv_heads is not None else None})
        arms[-1] |= {"num_layers": len(kinds), "rows": joined(before, after), **trained(result)}
        log(f"{label}: {result.tokens:,} tokens in {result.seconds:.0f} s")
    return {"model": args.model, "recipe": args.recipe, "arms": arms}


def run_scratch(args: argparse.Namespace) -> dict[str, Any]:
    """One arm for each number of heads from scratch, then one for each number that the first is merged into."""
    documents, held_out = split_documents(resolve_data(args.data))
    tokenizer = train_tokenizer(documents, args.vocab_size)
    train = token_blocks(documents, tokenizer, args.block_size)
    held = spread_blocks(token_blocks(held_out, tokenizer, args.block_size), args.blocks)
    num_layers = from_scratch.SIZES[args.size]["num_hidden_layers"]
    sampler = from_scratch.ARMS["deep-leader-subset"].sampler(args.seed, 0.0)
    shared: dict[str, Any] = dict(seed=args.seed, batch_size=args.batch_size, block_size=args.block_size)
    shared |= dict(decay="cosine", final_lr_fraction=0.05, weight_decay=0.1, trainable="all")
    arms, first = [], None

    def train_arm(label: str, model: Any, config: AdaptConfig, merged_from: int | None) -> None:
        kinds = layer_kinds(model.config)
        plans = plans_of(args.retentions, kinds)
        before = curve(model, held, plans, config)
        result = adapt(model, train, config, sampler=sampler, progress=False)
        after = curve(model, held, plans, config)
        arms.append({"arm": label, "kv_heads": kinds[0].kv_heads, "merged_from": merged_from})
        arms[-1] |= {"num_layers": num_layers, "rows": joined(before, after), **trained(result)}
        log(f"{label}: {result.tokens:,} tokens in {result.seconds:.0f} s, loss {after[0]['loss']:.3f}")

    for kv_heads in args.heads:
        model = from_scratch.new_model(
            args.size, num_layers, args.seed, tokenizer, args.block_size, num_key_value_heads=kv_heads
        )
        config = AdaptConfig(max_tokens=args.tokens, learning_rate=args.learning_rate, **shared)
        model.to(args.device)
        train_arm(f"{named(kv_heads)} from scratch", model, config, None)
        first = model if first is None else first
    more = round(args.more * args.tokens)
    if more > 0:
        config = AdaptConfig(max_tokens=more, learning_rate=args.more_learning_rate, **shared)
        for kv_heads in args.heads:  # the first merges nothing: what the further tokens alone are worth
            how = "trained on" if kv_heads == args.heads[0] else f"merged into {kv_heads}, trained on"
            merged = merge_kv_heads(first, kv_heads)
            train_arm(f"{named(args.heads[0])}, {how}", merged, config, args.heads[0])
    return {"size": args.size, "vocab_size": len(tokenizer), "arms": arms}


def named(kv_heads: int) -> str:
    return f"{kv_heads} KV head{'s' * (kv_heads != 1)}"


def plans_of(retentions: Sequence[float], kinds: Any) -> Plans:
    """Evenly spaced, each once, the largest first."""
    plans = dict.fromkeys(SharingPlan.for_retention(retention, kinds) for retention in retentions)
    return sorted(plans, key=lambda plan: -plan.retention)


def curve(model: Any, blocks: torch.Tensor, plans: Plans, config: AdaptConfig) -> list[dict[str, Any]]:
    """Held-out loss under each plan; bytes are those of a bf16 cache."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16) if config.uses_bf16(device) else nullcontext():
        return [row.to_dict() for row in retention_curve(model, blocks, plans, kv_dtype=torch.bfloat16)]


def joined(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "retention": new["retention"],
            "leaders": len(new["leaders"]),
            "kv_bytes_per_token": new["kv_bytes_per_token"],
            "start": round(old["loss"], 4),
            "loss": round(new["loss"], 4),
        }
        for old, new in zip(before, after, strict=True)
    ]


def trained(result: AdaptResult | StagesResult) -> dict[str, Any]:
    routed = result.routed if isinstance(result, StagesResult) else result
    found = {"tokens": result.tokens, "seconds": round(result.seconds, 1), "parameters": routed.num_trained}
    return found | {"train_loss": round(statistics.fmean(routed.losses[-50:]), 4)}


def table(row: dict[str, Any]) -> str:
    """All arms, by the size of their cache."""
    lines = [f"{'arm':36} {'layers':>8} {'bytes/token':>11} {'loss at start':>13} {'trained':>8} {'tokens':>10}"]
    cells = [(found, arm) for arm in row["arms"] for found in arm["rows"]]
    for found, arm in sorted(cells, key=lambda cell: -cell[0]["kv_bytes_per_token"]):
        kept = f"{found['leaders']} of {arm['num_layers']}"
        sizes = f"{kept:>8} {found['kv_bytes_per_token']:>11,}"
        lines.append(f"{arm['arm']:36} {sizes} {found['start']:>13.3f} {found['loss']:>8.3f} {arm['tokens']:>10,}")
    return "\n".join(lines)


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

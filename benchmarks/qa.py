"""Answering questions about a context after fine-tuning: F1, exact match and ROUGE-L by size of the cache.

The protocol of arXiv:2604.22782, tables 1 and 2, on one data set in SQuAD's JSON format. Articles are split into
training and held-out ones; all methods see the same examples in the same order. Prints a table and one JSON line per
method and seed.

    python benchmarks/qa.py --data squad.json --methods base r-cla leader-subset --out qa.jsonl

Some copies of SQuAD carry a canary that asks to keep them out of training corpora: nothing that is trained here is
saved.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from depthkv import RandomCrossLayer, SharingPlan, load, route
from depthkv.adapt.config import has_fast_bf16
from depthkv.adapt.loss import next_token_loss
from depthkv.architectures import layer_kinds
from depthkv.evaluate.qa import evaluate_qa
from depthkv.qa import Question, collate, encode, read_squad, split_articles
from depthkv.samplers import CrossLayerAttention, LeaderSubset, RandomGroupAttention

METHODS: dict[str, Callable[[int, float], Any]] = {
    "untrained": lambda seed, prob: None,
    "base": lambda seed, prob: None,
    "r-cla": lambda seed, prob: RandomCrossLayer(cross_layer_prob=prob, seed=seed),
    "cla@2": lambda seed, prob: CrossLayerAttention(group_size=2),
    "cla@4": lambda seed, prob: CrossLayerAttention(group_size=4),
    "rd-cla@2": lambda seed, prob: RandomGroupAttention(group_size=2, cross_layer_prob=prob, seed=seed),
    "rd-cla@4": lambda seed, prob: RandomGroupAttention(group_size=4, cross_layer_prob=prob, seed=seed),
    "leader-subset": lambda seed, prob: LeaderSubset(retentions=(1.0, 0.5, 0.25), even_prob=0.5, seed=seed),
}
"""A sampler from a seed and a `cross_layer_prob`; None is no routing."""

EVERY = (1, 2, 4)
"""Keep every k-th layer."""

POOL = 50
"""Batches whose examples are sorted by length together, so that little is padded and the order stays random."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="questions in SQuAD's JSON format")
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="+", default=["base", "r-cla"], choices=list(METHODS))
    parser.add_argument("--seeds", "--seed", nargs="+", type=int, default=[0], help="of the order and the routing")
    parser.add_argument("--train-examples", type=int, default=100_000, help="at most so many")
    parser.add_argument("--eval-examples", type=int, default=1000, help="at most so many of the held-out articles")
    parser.add_argument("--held-out", type=float, default=0.25, help="share of the articles")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--steps", type=int, help="instead of --epochs")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the steps; then linear to 0")
    parser.add_argument("--batch-size", type=int, default=16, help="examples in one step")
    parser.add_argument("--eval-batch-size", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=512, help="of an example")
    parser.add_argument("--prob", type=float, default=0.6, help="cross_layer_prob of r-cla and rd-cla")
    parser.add_argument("--out", type=Path, help="append the lines to this file, too")
    args = parser.parse_args()

    train, held_out = split_articles(read_squad(args.data), args.held_out)
    # the same questions for every seed: only the training differs
    train, held_out = sample(train, args.train_examples), sample(held_out, args.eval_examples)
    rows = []
    for seed in args.seeds:
        for method in args.methods:
            row = run_method(method, seed, train, held_out, args)
            rows.append(row)
            if args.out is not None:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            print(f"{method}, seed {seed}: {row['seconds']} s", file=sys.stderr, flush=True)
    print(table(rows))
    for row in rows:
        print(json.dumps(row))


def sample(questions: Sequence[Question], wanted: int) -> list[Question]:
    """Drawn at random: neighbours in the file ask about the same paragraph."""
    return random.Random(0).sample(questions, min(wanted, len(questions)))


def run_method(
    method: str, seed: int, train: Sequence[Question], held_out: Sequence[Question], args: argparse.Namespace
) -> dict[str, Any]:
    """Fine-tune and measure one model."""
    device = torch.device(args.device)
    bf16 = has_fast_bf16(device)
    model, tokenizer, _ = load(args.model, dtype="float32", device=args.device)
    examples = encode(train, tokenizer, max_tokens=args.max_tokens, seed=seed)
    per_epoch = -(-len(examples) // args.batch_size)
    steps = args.steps if args.steps is not None else max(1, round(args.epochs * per_epoch))
    if method == "untrained":
        steps = 0
    started = time.perf_counter()
    losses = fine_tune(model, tokenizer, examples, METHODS[method](seed, args.prob), steps, seed, bf16, args)
    train_seconds = time.perf_counter() - started
    if bf16:
        model.to(torch.bfloat16)  # as it would be served; nothing trains any more
    kinds = layer_kinds(model.config)
    plans = [SharingPlan.every(k, len(kinds), kinds) for k in EVERY]
    scores = evaluate_qa(model, tokenizer, held_out, plans, batch_size=args.eval_batch_size, max_tokens=args.max_tokens)
    return {
        "method": method,
        "seed": seed,
        "model": args.model,
        "data": args.data.name,
        "train_questions": len(train),
        "eval_questions": len(held_out),
        "steps": steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "prob": args.prob if method.startswith("r") else None,
        "precision": "bf16" if bf16 else "fp32",
        "train_loss": round(statistics.fmean(losses[-50:]), 4) if losses else None,
        "train_seconds": round(train_seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "scores": [
            {"every": k, **{name: _rounded(value) for name, value in row.to_dict().items()}}
            for k, row in zip(EVERY, scores, strict=True)
        ],
    }


def fine_tune(
    model: Any,
    tokenizer: Any,
    examples: Sequence[dict[str, torch.Tensor]],
    sampler: Any,
    steps: int,
    seed: int,
    bf16: bool,
    args: argparse.Namespace,
) -> list[float]:
    """Plain AdamW on fp32 weights; the loss of each step."""
    if steps == 0:
        return []
    device = torch.device(args.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=args.weight_decay,
        fused=device.type == "cuda",
    )
    warmup = max(1, round(args.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    torch.manual_seed(seed)
    losses = []
    batches = endless_batches([len(example["input_ids"]) for example in examples], args.batch_size, seed)
    model.train()
    # the loss looks at the model's head once, which would cost routing a step
    with next_token_loss(model, torch.bfloat16 if bf16 else torch.float32) as loss_function:
        with route(model, sampler) if sampler is not None else nullcontext():
            for step in range(steps):
                batch = collate([examples[i] for i in next(batches)], pad)
                batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
                with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                    loss = loss_function(batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
                if (step + 1) % 100 == 0:
                    mean = torch.stack(losses[-100:]).mean().item()
                    print(f"step {step + 1} of {steps}: loss {mean:.3f}", file=sys.stderr, flush=True)
    model.eval()
    return [float(loss) for loss in losses]


def endless_batches(lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Indices of examples of similar length, in a new random order in each epoch."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(lengths)), len(lengths))
        batches = []
        for start in range(0, len(order), POOL * batch_size):
            pool = sorted(order[start : start + POOL * batch_size], key=lambda i: lengths[i])
            batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        rng.shuffle(batches)
        yield from batches


def table(rows: Sequence[dict[str, Any]]) -> str:
    """F1 / exact match / ROUGE-L by method and kept layers, means over the seeds."""
    lines = [f"{'method':16} {'seeds':>5} " + "".join(f"{f'every {k} (F1 / EM / RL)':>26}" for k in EVERY)]
    for method in dict.fromkeys(row["method"] for row in rows):
        members = [row for row in rows if row["method"] == method]
        cells = ""
        for place in range(len(EVERY)):
            means = [
                statistics.fmean(row["scores"][place][name] for row in members)
                for name in ("f1", "exact_match", "rouge_l")
            ]
            cells += f"{' / '.join(f'{mean:.1f}' for mean in means):>26}"
        lines.append(f"{method:16} {len(members):>5} {cells}")
    return "\n".join(lines)


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()

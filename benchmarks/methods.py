"""Ways to train a model for sharing, at the same budget of tokens: held-out loss at several retentions.

Prints one JSON line per method and seed. Recipes are to be chosen by `validation` and reported by `test`: documents of
the held-out tenth, half of them each.

    python benchmarks/methods.py --methods base r-cla leader-subset --seeds 0 1 2 --out methods.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from depthkv import RandomCrossLayer, SharingPlan, load
from depthkv.adapt import AdaptConfig, AdaptResult, StepInfo, adapt
from depthkv.adapt.adapters import LoraSettings, add_adapter, save_adapter
from depthkv.adapt.local import LocalConfig, fit_followers
from depthkv.adapt.objectives import AttentionMatching, Distillation
from depthkv.adapt.teacher import FrozenTeacher, SelfTeacher
from depthkv.architectures import LayerKind, layer_kinds
from depthkv.checkpoint import save
from depthkv.data import resolve_data, split_documents, token_blocks
from depthkv.evaluate import retention_curve, spread_blocks
from depthkv.samplers import (
    CrossLayerAttention,
    FullCache,
    LeaderSubset,
    Mixture,
    PerSequence,
    RandomGroupAttention,
    ScheduledCrossLayer,
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table."""

    sampler: Callable[[int, float], Any]
    """From a seed and a `cross_layer_prob`."""
    objective: Callable[[Any], Any] | None = None
    """From the model as it is before training."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Changes of `AdaptConfig`'s defaults."""
    lora: LoraSettings | None = None
    base_fraction: float = 0.0
    """Part of the tokens for ordinary fine-tuning of all layers, before what the rest says."""
    local_fraction: float = 0.0
    """Part of the tokens for the layer-local stage, before the routed one."""
    prob: float = 0.45


def r_cla(seed: int, prob: float) -> Any:
    return RandomCrossLayer(cross_layer_prob=prob, seed=seed)


def subset(seed: int, prob: float) -> Any:
    return LeaderSubset(seed=seed)


def mixed(seed: int, prob: float) -> Any:
    parts = (r_cla(seed, prob), LeaderSubset(retentions=(0.5, 0.33, 0.25), seed=seed))
    return Mixture(samplers=parts, weights=(1, 1), seed=seed)


def served(seed: int, prob: float) -> Any:
    """Exactly the plans that are served, every k-th layer, each as often as another."""
    parts = tuple(CrossLayerAttention(group_size=k) for k in (1, 2, 3, 4))
    return Mixture(samplers=parts, weights=(1,) * 4, seed=seed)


def served_and_subset(seed: int, prob: float) -> Any:
    return Mixture(samplers=(served(seed, prob), LeaderSubset(seed=seed)), weights=(1, 1), seed=seed + 1)


EVEN = (1.0, 0.5, 1 / 3, 0.25)


def even(seed: int, prob: float) -> Any:
    """Half of the time evenly spaced leaders, half of the time any."""
    return LeaderSubset(retentions=EVEN, even_prob=0.5, seed=seed)


def even_below_1(seed: int, prob: float) -> Any:
    return LeaderSubset(retentions=EVEN[1:], even_prob=0.5, seed=seed)


def distilled(weight: float, temperature: float = 1.0) -> Callable[[Any], Any]:
    return lambda model: Distillation(teacher=FrozenTeacher(model), weight=weight, temperature=temperature)


LORA = LoraSettings(rank=16, alpha=32)
METHODS: dict[str, Method] = {
    "base": Method(sampler=lambda seed, prob: FullCache()),
    **{
        f"cla@{size}": Method(sampler=lambda seed, prob, size=size: CrossLayerAttention(group_size=size))
        for size in (2, 4)
    },
    **{
        f"rd-cla@{size}": Method(
            sampler=lambda seed, prob, size=size: RandomGroupAttention(group_size=size, cross_layer_prob=0.5, seed=seed)
        )
        for size in (2, 4)
    },
    "r-cla": Method(sampler=r_cla),
    # data.md's first trial, the recipe that others are compared with
    "r-cla, plain recipe": Method(
        sampler=r_cla,
        prob=0.6,
        recipe=dict(
            learning_rate=3e-4, batch_size=4, trainable="all", decay="cosine", final_lr_fraction=0.05, grad_clip=1.0
        ),
    ),
    "leader-subset": Method(sampler=subset),
    "r-cla + leader-subset": Method(sampler=mixed),
    "r-cla, rising prob": Method(
        sampler=lambda seed, prob: ScheduledCrossLayer(start=0.3, end=0.6, num_steps=600, seed=seed)
    ),
    "r-cla, per sequence": Method(
        sampler=lambda seed, prob: PerSequence(sampler=r_cla(seed, prob)), recipe=dict(batch_size=2, learning_rate=1e-3)
    ),
    "r-cla + distillation .5": Method(sampler=r_cla, objective=distilled(0.5)),
    "r-cla + distillation .9": Method(sampler=r_cla, objective=distilled(0.9)),
    "leader-subset + distillation .5": Method(sampler=subset, objective=distilled(0.5)),
    "r-cla + attention matching": Method(
        sampler=r_cla, objective=lambda model: AttentionMatching(teacher=FrozenTeacher(model), weight=1.0)
    ),
    "r-cla, query and output": Method(sampler=r_cla, recipe=dict(trainable="query-output", learning_rate=1.5e-3)),
    "lora": Method(sampler=r_cla, lora=LORA, recipe=dict(learning_rate=3e-3)),
    "lora, rank 64": Method(sampler=r_cla, lora=LoraSettings(rank=64, alpha=128), recipe=dict(learning_rate=2e-3)),
    "lora, lr 6e-3": Method(sampler=r_cla, lora=LORA, recipe=dict(learning_rate=6e-3)),
    "dora": Method(sampler=r_cla, lora=LoraSettings(rank=16, alpha=32, use_dora=True), recipe=dict(learning_rate=3e-3)),
    "lora + distillation .5": Method(
        sampler=r_cla,
        lora=LORA,
        recipe=dict(learning_rate=3e-3),
        objective=lambda model: Distillation(teacher=SelfTeacher(), weight=0.5),
    ),
    "lora, r-cla + leader-subset": Method(sampler=mixed, lora=LORA, recipe=dict(learning_rate=3e-3)),
    "lora, served plans": Method(sampler=served, lora=LORA, recipe=dict(learning_rate=3e-3)),
    "served plans": Method(sampler=served),
    "served plans + leader-subset": Method(sampler=served_and_subset),
    "served plans + distillation .5": Method(sampler=served, objective=distilled(0.5)),
    "even leader-subset": Method(sampler=even),
    "lora, even leader-subset": Method(sampler=even_below_1, lora=LORA, recipe=dict(learning_rate=3e-3)),
    **{
        f"base {share:.1f}, then lora".replace("0.", "."): Method(
            sampler=even_below_1, lora=LORA, recipe=dict(learning_rate=3e-3), base_fraction=share
        )
        for share in (0.3, 0.5, 0.6, 0.7)
    },
    "base .6, then lora, rank 32, lr 4e-3": Method(
        sampler=even_below_1,
        lora=LoraSettings(rank=32, alpha=64),
        recipe=dict(learning_rate=4e-3),
        base_fraction=0.6,
    ),
    "base .5, then lora + distillation .5": Method(
        sampler=even_below_1,
        lora=LORA,
        recipe=dict(learning_rate=3e-3),
        base_fraction=0.5,
        objective=lambda model: Distillation(teacher=SelfTeacher(), weight=0.5),
    ),
    "base .3, then even leader-subset + distillation .5": Method(
        sampler=even, base_fraction=0.3, objective=distilled(0.5)
    ),
    "local stage + r-cla": Method(sampler=r_cla, local_fraction=0.2),
}


def train_method(
    model: Any,
    blocks: torch.Tensor,
    method: Method,
    settings: dict[str, Any],
    prob: float | None = None,
    *,
    base_learning_rate: float,
    on_step: Callable[[StepInfo], None] | None = None,
) -> tuple[Any, AdaptResult, AdaptConfig, int]:
    """Train by a method within `settings`, of `AdaptConfig`, whose budget is in tokens.

    Returns:
        (model, perhaps with an adapter, result and recipe of the last stage, tokens of the stages before it)
    """
    config, spent, tokens = AdaptConfig(**settings), 0, settings["max_tokens"]
    sampler = method.sampler(config.seed, prob or method.prob)
    given: dict[str, Any] = {"progress": False, "on_step": on_step}
    if method.base_fraction:
        first = replace(config, max_tokens=round(method.base_fraction * tokens), learning_rate=base_learning_rate)
        spent = adapt(model, blocks, first, sampler=FullCache(), **given).tokens
    if method.local_fraction:
        steps = round(method.local_fraction * tokens / (2 * config.block_size))
        bf16 = config.uses_bf16(next(model.parameters()).device)
        spent = fit_followers(model, blocks, sampler, LocalConfig(steps=steps), bf16=bf16).tokens
    config = replace(config, max_tokens=tokens - spent)
    if method.lora is not None:
        model = add_adapter(model, method.lora)
    objective = method.objective(model) if method.objective is not None else None
    return model, adapt(model, blocks, config, sampler=sampler, objective=objective, **given), config, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--data", default="builtin:anarchism")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=int, default=307_200)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=32, help="of validation and of test")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="changes of every recipe")
    parser.add_argument("--prob", type=float, help="cross_layer_prob of every method")
    parser.add_argument("--base-learning-rate", type=float, default=AdaptConfig(max_tokens=1).learning_rate)
    parser.add_argument("--out", type=Path, help="append the lines to this file, too")
    parser.add_argument("--save", type=Path, help="save the last model to this folder")
    args = parser.parse_args()
    changes = {name: json.loads(value) for name, _, value in (text.partition("=") for text in args.set)}

    base, tokenizer, _ = load(args.model, dtype="float32", device=args.device)
    documents, held_out = split_documents(resolve_data(args.data))
    validation, test = split_documents(held_out, held_out_fraction=0.5, seed=1)
    train = token_blocks(documents, tokenizer, args.block_size)
    held = {
        name: spread_blocks(token_blocks(part, tokenizer, args.block_size), args.blocks)
        for name, part in (("validation", validation), ("test", test))
    }
    kinds = layer_kinds(base.config)
    plans = measured_plans(kinds)

    def curves(model: Any, bf16: bool) -> dict[str, dict[str, float]]:
        with torch.autocast("cuda" if "cuda" in args.device else "cpu", torch.bfloat16) if bf16 else nullcontext():
            measured = {name: retention_curve(model, blocks, list(plans.values())) for name, blocks in held.items()}
        return {n: dict(zip(plans, (round(r.loss, 4) for r in rows), strict=True)) for n, rows in measured.items()}

    def write(row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if args.out is not None:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    bf16 = AdaptConfig(max_tokens=1).uses_bf16(torch.device(args.device))
    write({"method": "untrained", "tokens": 0, **curves(base, bf16)})
    for seed in args.seeds:
        for name in args.methods:
            method = METHODS[name]
            torch.manual_seed(seed)
            model: Any = copy.deepcopy(base)
            settings = {"max_tokens": args.tokens, "seed": seed, "block_size": args.block_size, **method.recipe}
            started = time.perf_counter()
            model, result, config, spent = train_method(
                model, train, method, {**settings, **changes}, args.prob, base_learning_rate=args.base_learning_rate
            )
            write(
                {
                    "method": name,
                    "seed": seed,
                    "tokens": result.tokens + spent,
                    "seconds": round(time.perf_counter() - started, 1),
                    "num_trained": result.num_trained,
                    "learning_rate": config.learning_rate,
                    "batch_size": config.batch_size,
                    "prob": args.prob or method.prob,
                    "train_loss": train_loss(result),
                    **curves(model, bf16),
                }
            )
            if args.save is not None:
                save_method(args.save, model, tokenizer, plans["every 2"], args.model, method)


def measured_plans(kinds: Sequence[LayerKind]) -> dict[str, SharingPlan]:
    """Every layer, every 2nd to 4th, and the front half."""
    plans = {f"every {k}": SharingPlan.every(k, len(kinds), kinds) for k in (1, 2, 3, 4)}
    return plans | {"front half": SharingPlan.from_leaders(range(len(kinds) // 2), len(kinds), kinds)}


def train_loss(result: AdaptResult) -> float:
    """Mean of the last 50 steps."""
    return round(sum(result.losses[-50:]) / len(result.losses[-50:]), 4)


def save_method(folder: Path, model: Any, tokenizer: Any, plan: SharingPlan, base: str, method: Method) -> None:
    """Save a trained model in bf16; where the base's own weights were trained, too, they go beside the adapter."""
    model = model.to(torch.bfloat16)
    if method.lora is None:
        save(folder, model, tokenizer, plan)
    else:
        base = "base" if method.base_fraction else base
        save_adapter(folder, model, base=base, tokenizer=tokenizer, plan=plan)


if __name__ == "__main__":
    main()

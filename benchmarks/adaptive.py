"""Is a plan chosen for each input better than one plan for all, at the same mean bytes?

For one model: losses of 16 plans of one size, and of a ladder of sizes, on mixed inputs (`mixed_text.py`); the static
plan that is best on the calibration inputs; the oracle that takes the best plan for each test input; and routers that
were made on the calibration inputs and choose from the prompt alone. Loss and digit accuracy are of the second half of
each input, which the router does not see before its decision is made. One JSON line per model and retention is appended
to --out. Losses are kept in --keep, so that a run that was stopped goes on.

    python benchmarks/adaptive.py MODEL --label NAME --leaders 15 --calibration cal.json --keep kept.json \\
        --out docs/raw/adaptive.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mixed_text import Inputs, mixed_inputs
from torch.nn.functional import cross_entropy

from depthkv import SharingPlan, load, share
from depthkv.adaptive.learned import train_router
from depthkv.adaptive.portfolio import fit_portfolio, portfolio_features
from depthkv.adaptive.router import Router
from depthkv.adaptive.similarity import similarity_router
from depthkv.architectures import layer_kinds
from depthkv.calibrate.store import Calibration
from depthkv.evaluate.intervals import score
from depthkv.machine import environment
from depthkv.memory import measured_cache_bytes
from depthkv.planner import Budget, Problem, nested_plans
from depthkv.planner.model import CostModel, Measured

Result = tuple[float, float]
"""Loss of the second half in nats per token, and the share of its digits that are the likeliest token."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--label", required=True)
    parser.add_argument("--calibration", type=Path, required=True, help="of `depthkv plan` or benchmarks/planner.py")
    parser.add_argument("--keep", type=Path, required=True, help="file of the losses of plans")
    parser.add_argument("--leaders", type=int, required=True, help="of the 16 plans")
    parser.add_argument("--ladder", type=int, nargs="+", default=[])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--calibration-inputs", type=int, default=12, help="of each sort")
    parser.add_argument("--test-inputs", type=int, default=12, help="of each sort")
    parser.add_argument("--similarity-inputs", type=int, default=4, help="of each sort, for the threshold")
    parser.add_argument("--router-steps", type=int, default=0, help="of the learned router; 0 leaves it out")
    parser.add_argument("--router-learning-rate", type=float, default=3e-2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    model, tokenizer, _ = load(args.model, dtype=args.dtype, device="cpu")
    model.eval()
    calibration = Calibration.load(args.calibration)
    parts = {
        "calibration": mixed_inputs(tokenizer, tokens=args.tokens, per_sort=args.calibration_inputs, test=False),
        "test": mixed_inputs(tokenizer, tokens=args.tokens, per_sort=args.test_inputs, test=True),
    }
    digits = digit_tokens(tokenizer)
    cost, corrected, known = costs(calibration)
    same_size = diverse_plans(known, args.leaders, len(corrected))
    kinds = layer_kinds(model.config)
    problem = Problem(kinds=kinds, budget=Budget.of_retention(1.0, model.config, model.dtype))
    kept = measure_plans(model, same_size, parts, digits, args)

    def results(plan: SharingPlan, part: str) -> list[Result]:
        return kept[part][json.dumps(list(plan.kv_source_layers))]

    test = parts["test"]
    rows: dict[str, Any] = {}

    def note(label: str, found: list[Result], leaders: list[int], **more: Any) -> None:
        rows[label] = {**summary(found, leaders, test, len(kinds)), "losses": [loss for loss, _ in found], **more}
        print(f"{label:34} {rows[label]['loss']['value']:.3f} {rows[label]['mean_leaders']:.2f}", flush=True)

    def mean_loss(plan: SharingPlan) -> float:
        return statistics.fmean(loss for loss, _ in results(plan, "calibration"))

    static = min(same_size, key=mean_loss)
    nested = {len(plan.leaders): plan for plan in nested_plans(problem, corrected, static)}
    ladder = [nested[size] for size in args.ladder]
    kept = measure_plans(model, [*same_size, *ladder], parts, digits, args)
    number = len(test.sorts)
    note("prose plan", results(same_size[0], "test"), [args.leaders] * number)
    note("static", results(static, "test"), [args.leaders] * number, kv_source_layers=list(static.kv_source_layers))
    best = [min(range(16), key=lambda i: results(same_size[i], "test")[n][0]) for n in range(number)]
    note("oracle", [results(same_size[i], "test")[n] for n, i in enumerate(best)], [args.leaders] * number, chosen=best)
    for plan in ladder:
        note(f"ladder {len(plan.leaders)}", results(plan, "test"), [len(plan.leaders)] * number)

    prompts = {part: [row[: args.tokens // 2] for row in parts[part].tokens] for part in parts}
    retention = args.leaders / len(kinds)
    routers: dict[str, tuple[Router, float]] = {}
    for name, plans in (("portfolio", same_size), ("portfolio, any size", [*same_size, *ladder])):
        started = time.perf_counter()
        features = portfolio_features(model, plans, prompts["calibration"])
        losses = torch.tensor([[r[0] for r in results(plan, "calibration")] for plan in plans]).T
        router = fit_portfolio(plans, losses, features, retention, kinds)
        routers[name] = (router, time.perf_counter() - started)
    every = max(1, args.calibration_inputs // args.similarity_inputs)
    for name, weights in (("similarity, plain", None), ("similarity", cost)):
        started = time.perf_counter()
        router = similarity_router(model, prompts["calibration"][::every], retention, cost=weights)
        routers[name] = (router, time.perf_counter() - started)
    if args.router_steps:
        started = time.perf_counter()
        learned = train_router(
            model,
            parts["calibration"].tokens,
            retention,
            static,
            prompt_tokens=args.tokens // 2,
            steps=args.router_steps,
            learning_rate=args.router_learning_rate,
            seed=args.seed,
        )
        routers["learned"] = (learned, time.perf_counter() - started)
    for name, (router, seconds) in routers.items():
        found, leaders, maps, held = run_router(model, router, test, digits, args.tokens // 2)
        note(name, found, leaders, seconds_to_make=round(seconds, 1), maps=maps, mean_cache_bytes=held)
    line = {
        "label": args.label,
        "model": args.model,
        "leaders": args.leaders,
        "num_layers": len(kinds),
        "tokens": args.tokens,
        "sorts": test.sorts,
        "inputs": {part: len(inputs.sorts) for part, inputs in parts.items()},
        "rows": rows,
        "plans": [list(plan.kv_source_layers) for plan in same_size],
        "dtype": args.dtype,
        "environment": environment(torch.device("cpu")),
        "command": "python " + " ".join(sys.argv),
    }
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def digit_tokens(tokenizer: Any) -> torch.Tensor:
    """Whether each token of the vocabulary is a number, `[vocabulary]`."""
    texts = [tokenizer.decode([token]).strip() for token in range(len(tokenizer))]
    return torch.tensor([text.isdigit() for text in texts])


def costs(calibration: Calibration) -> tuple[torch.Tensor, torch.Tensor, list[Measured]]:
    """Costs of pairs measured alone and corrected by measured plans, `[layers, layers]`, and these plans."""
    size = calibration.num_layers
    cost = torch.full((size, size), torch.inf)
    for layer, row in calibration.cost_losses.items():
        for source, losses in row.items():
            cost[layer][source] = statistics.fmean(losses) - statistics.fmean(calibration.full_losses[: len(losses)])
    cost.fill_diagonal_(0.0)
    full = calibration.full_loss
    known = [
        Measured(plan=SharingPlan(sources), increase=statistics.fmean(losses) - full)
        for sources, losses in calibration.plan_losses.items()
        if len(set(sources)) < size
    ]
    return cost, CostModel(cost, known).cost(), known


def diverse_plans(known: list[Measured], leaders: int, num_layers: int) -> list[SharingPlan]:
    """16 plans of one size: the best on the planner's text that differ in three leaders, and an evenly spaced one."""
    same = sorted((m for m in known if len(m.plan.leaders) == leaders), key=lambda m: m.increase)
    found = [SharingPlan.from_leaders([i * num_layers // leaders for i in range(leaders)], num_layers)]
    for differ in (3, 2, 1, 0):
        for entry in same:
            if len(found) == 16:
                break
            apart = [len(set(entry.plan.leaders) ^ set(plan.leaders)) >= 2 * differ for plan in found[1:]]
            if all(apart) and entry.plan not in found:
                found.append(entry.plan)
    if len(found) < 16:
        raise SystemExit(f"expected 16 measured plans of {leaders} leaders in the calibration, got {len(found)}")
    return [*found[1:], found[0]]


def measure_plans(
    model: Any, plans: list[SharingPlan], parts: dict[str, Inputs], digits: torch.Tensor, args: argparse.Namespace
) -> dict[str, dict[str, list[Result]]]:
    """Results of each plan on each input, by part and plan; those in --keep are not measured again."""
    kept: dict[str, Any] = {part: {} for part in parts}
    if args.keep.exists():
        kept = json.loads(args.keep.read_text())
    for number, plan in enumerate(plans):
        key = json.dumps(list(plan.kv_source_layers))
        for part, inputs in parts.items():
            if len(kept[part].get(key, [])) == len(inputs.sorts):
                continue
            started = time.perf_counter()
            found: list[Result] = []
            with torch.no_grad(), share(model, plan):
                for batch in inputs.tokens.split(args.batch_size):
                    half = batch.shape[1] // 2
                    logits = model(input_ids=batch, use_cache=False, logits_to_keep=half + 1).logits
                    found += [
                        result(row[:-1], tokens[-half:], digits) for row, tokens in zip(logits, batch, strict=True)
                    ]
            kept[part][key] = found
            seconds = time.perf_counter() - started
            print(f"{number + 1}/{len(plans)} {part} {seconds:.0f} s", file=sys.stderr, flush=True)
        args.keep.write_text(json.dumps(kept))
    return kept


def result(logits: torch.Tensor, targets: torch.Tensor, digits: torch.Tensor) -> Result:
    """Of one input's second half, logits `[tokens, vocabulary]`."""
    loss = float(cross_entropy(logits.float(), targets))
    asked = digits[targets]
    right = (logits.argmax(dim=-1) == targets)[asked]
    return loss, float(right.float().mean()) if len(right) else float("nan")


@torch.no_grad()
def run_router(
    model: Any, router: Router, inputs: Inputs, digits: torch.Tensor, prompt_tokens: int
) -> tuple[list[Result], list[int], list[list[int]], float]:
    """Each input's prompt alone, then the rest through the cache that the router left."""
    found, leaders, maps, held = [], [], [], []
    with share(model, router) as handle:
        for tokens in inputs.tokens:
            first = model(input_ids=tokens[None, :prompt_tokens], use_cache=True, logits_to_keep=1)
            cache = first.past_key_values
            rest = model(input_ids=tokens[None, prompt_tokens:], past_key_values=cache, use_cache=True)
            logits = torch.cat([first.logits[0], rest.logits[0, :-1]])
            found.append(result(logits, tokens[prompt_tokens:], digits))
            maps.append(list(handle.last_maps[0]))
            leaders.append(len(set(maps[-1])))
            held.append(measured_cache_bytes(cache))
    return found, leaders, maps, statistics.fmean(held)


def summary(found: list[Result], leaders: list[int], inputs: Inputs, num_layers: int) -> dict[str, Any]:
    """Means over the inputs and by sort."""
    sorts = list(dict.fromkeys(inputs.sorts))
    by_sort = {}
    for sort in sorts:
        chosen = [i for i, name in enumerate(inputs.sorts) if name == sort]
        right = [found[i][1] for i in chosen if found[i][1] == found[i][1]]
        by_sort[sort] = {
            "loss": statistics.fmean(found[i][0] for i in chosen),
            "digits": statistics.fmean(right) if right else None,
            "mean_leaders": statistics.fmean(leaders[i] for i in chosen),
        }
    return {
        "loss": score([loss for loss, _ in found], inputs.documents).to_dict(),
        "mean_leaders": statistics.fmean(leaders),
        "retention": statistics.fmean(leaders) / num_layers,
        "by_sort": by_sort,
    }


if __name__ == "__main__":
    main()

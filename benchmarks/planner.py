"""The planner's plans against evenly spaced ones of equal bytes, on text that neither model nor planner has seen.

For one model: calibrate on training documents, plan for several retentions, and measure every plan on held-out
documents. One JSON line per retention and kind of sources is appended to --out, and a table printed.

    python benchmarks/planner.py DIR --label "essay adapter" --out docs/raw/planner.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from depthkv import SharingPlan, load, share
from depthkv.architectures import layer_kinds
from depthkv.calibrate import Calibrator
from depthkv.data import named_blocks, resolve_data, split_documents
from depthkv.evaluate.intervals import score
from depthkv.evaluate.perplexity import perplexity, spread
from depthkv.machine import environment
from depthkv.planner import Budget, Problem, exact_plan, make_plan
from depthkv.planner.rules import evenly_spaced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--label", required=True)
    parser.add_argument("--data", default="builtin:anarchism")
    parser.add_argument("--retentions", type=float, nargs="+", default=[0.66, 0.5, 0.33, 0.25])
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=64, help="training blocks, compared")
    parser.add_argument("--cost-blocks", type=int, default=16, help="of these, on which losses are measured")
    parser.add_argument("--held-out-blocks", type=int, default=64)
    parser.add_argument(
        "--validation", action="store_true", help="calibrate on half of the held-out documents, compare on the others"
    )
    parser.add_argument("--evaluations", type=int, default=80)
    parser.add_argument("--sources", nargs="+", default=["nearest", "any"], choices=["nearest", "any"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--calibration", type=Path, help="file to keep the measurements in")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    model, tokenizer, _ = load(args.model, dtype=args.dtype, device=args.device)
    kinds = layer_kinds(model.config)
    train, held = split_documents(resolve_data(args.data))
    if args.validation:  # a model that knows the training text by heart says nothing on it
        train, held = split_documents(held, held_out_fraction=0.5, seed=1)
    blocks, documents = named_blocks(train, tokenizer, args.block_size)
    chosen = spread(len(blocks), args.blocks)
    calibrator = Calibrator(
        model,
        blocks[chosen],
        [documents[i] for i in chosen],
        cost_blocks=args.cost_blocks,
        batch_size=args.batch_size,
        path=args.calibration,
    )
    for measure in (calibrator.measure_similarity, calibrator.measure_outputs, calibrator.measure_costs):
        started = time.perf_counter()
        measure()
        print(f"{args.label}: {measure.__name__} {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    held_blocks, held_documents = named_blocks(held, tokenizer, args.block_size)
    chosen = spread(len(held_blocks), args.held_out_blocks)
    held_blocks, held_documents = held_blocks[chosen], [held_documents[i] for i in chosen]
    kept: dict[SharingPlan, tuple[float, ...]] = {}

    def held_losses(plan: SharingPlan) -> tuple[float, ...]:
        if plan not in kept:
            if plan.is_full:  # the adapter stays on, as it is under the plans
                with calibrator.with_own_kv():
                    found = perplexity(model, held_blocks, batch_size=args.batch_size)
            else:
                with share(model, plan):
                    found = perplexity(model, held_blocks, batch_size=args.batch_size)
            kept[plan] = found.block_losses
        return kept[plan]

    full = SharingPlan.full(len(kinds))
    rows = []
    for retention in args.retentions:
        for any_source in [name == "any" for name in args.sources]:
            started = time.perf_counter()
            budget = Budget.of_retention(retention, model.config, model.dtype)
            problem = Problem(kinds=kinds, budget=budget, any_source=any_source)
            planned = make_plan(calibrator, problem, evaluations=args.evaluations)
            seconds = time.perf_counter() - started
            rules = {"planner": planned.plan, "sum of costs": exact_plan(problem, planned.cost)}
            rules |= {f"evenly spaced, {i}": plan for i, plan in enumerate(evenly_spaced(problem))}
            rules |= {label: plan for label, plan in planned.rivals if label not in rules}
            measured = {}
            for label, plan in rules.items():
                losses = held_losses(plan)
                against = score(losses, held_documents, held_losses(rules["evenly spaced, 0"]))
                measured[label] = {
                    "kv_source_layers": list(plan.kv_source_layers),
                    "leaders": len(plan.leaders),
                    "predicted": float(problem.predicted(plan, planned.cost)),
                    "corrected": planned.found.model.predicted(plan),
                    "calibration": calibrator.plan_loss(plan),
                    "held_out": score(losses, held_documents, held_losses(full)).to_dict(),
                    "against_even": against.to_dict(),
                }
            row: dict[str, Any] = {
                "label": args.label,
                "model": args.model,
                "data": args.data,
                "calibrated_on": "validation" if args.validation else "training",
                "retention": retention,
                "any_source": any_source,
                "evaluations": len(planned.found.measured),
                "search_seconds": round(seconds, 1),
                "full_calibration": calibrator.calibration.full_loss,
                "full_held_out": score(held_losses(full), held_documents).to_dict(),
                "rules": measured,
                "certainty": planned.certainty,
                "seconds": calibrator.calibration.seconds,
                "tokens": {"costs": calibrator.cost_blocks.numel(), "similarity": blocks[: args.blocks].numel()},
                "dtype": args.dtype,
                "environment": environment(next(model.parameters()).device),
                "command": "python " + " ".join(sys.argv),
            }
            rows.append(row)
            print(table(row), flush=True)
            if args.out is not None:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


def table(row: dict[str, Any]) -> str:
    """Losses over the full cache, and how much less that is than the evenly spaced plan's."""
    full, full_held = row["full_calibration"], row["full_held_out"]["value"]
    even = (row["rules"]["evenly spaced, 0"]["held_out"]["value"] - full_held) or float("nan")
    lines = [
        f"{row['label']}, {row['retention']:.0%}, {'any source' if row['any_source'] else 'nearest'}: full {full:.3f} "
        f"(calibration) {full_held:.3f} (held out), {row['evaluations']} plans in {row['search_seconds']} s"
    ]
    for label, rule in row["rules"].items():
        held = rule["held_out"]["value"] - full_held
        lines.append(
            f"  {label:34} {rule['leaders']:>3} sum {rule['predicted']:+7.3f} model {rule['corrected']:+7.3f} "
            f"calibration {rule['calibration'] - full:+7.3f} held out {held:+7.3f}, {1 - held / even:+6.1%} less"
        )
    lines.append(f"  {SharingPlan(row['rules']['planner']['kv_source_layers']).diagram()}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""depthkv beside what one would use instead: every suite of `depthkv evaluate`, at equal bytes of cache.

Arms: the full cache; the untrained model with every k-th layer's cache; the training-free methods of `peers.py`; models
that were adapted, each beside its own full cache. Writes one file for each model in the form of `depthkv evaluate
--json`, with the bytes that each arm's cache really holds, so that `depthkv report` makes a page of it.

    python benchmarks/compare.py --data builtin:anarchism builtin:brown --questions squad.json --out compare \
        --adapted adapter=builtin:smollm2-135m-depthkv
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peers import equal_bytes_arms, measured_bytes

from depthkv import SharingPlan, load
from depthkv.architectures import layer_kinds
from depthkv.data import resolve_data, split_documents, token_blocks
from depthkv.evaluate import spread_blocks
from depthkv.evaluate.arms import Arm, plan_arms
from depthkv.evaluate.run import SUITES, EvaluateConfig, Evaluation
from depthkv.machine import environment
from depthkv.qa import read_squad, split_articles

RETENTIONS = (1.0, 0.5, 0.33, 0.25)
FRACTIONS = (0.5, 0.25)
"""Of the full cache's bytes, for the peers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:smollm2-135m")
    parser.add_argument("--adapted", nargs="*", default=[], metavar="NAME=MODEL", help="models trained to share")
    parser.add_argument("--only", nargs="*", help="groups to run: untrained, peers, or names of --adapted")
    parser.add_argument("--match", default="", help="only peers whose label holds this, in a file of their own")
    parser.add_argument("--data", nargs="+", default=["builtin:anarchism", "builtin:brown"])
    parser.add_argument("--questions", type=Path, help="in SQuAD's JSON format; the suite qa is left out without")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=SUITES)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=64, help="of each kind of text")
    parser.add_argument("--num-questions", type=int, default=120)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    parser.add_argument("--items", type=int, default=15, help="of each retrieval task and length")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    args = parser.parse_args()

    suites = tuple(suite for suite in args.suites if suite != "qa" or args.questions is not None)
    texts = {}
    calibration_text = []
    for name in args.data:
        training, held_out = split_documents(resolve_data(name))
        texts[Path(name).name if "/" in name else name] = held_out
        calibration_text += training
    questions = []
    if args.questions is not None:
        # some models may have been trained on the other articles
        questions = split_articles(read_squad(args.questions))[1]
    config = EvaluateConfig(
        suites=suites,
        block_size=args.block_size,
        blocks=args.blocks,
        batch_size=args.batch_size,
        prompts=args.prompts,
        questions=args.num_questions,
        lengths=tuple(args.lengths),
        items=args.items,
    )
    models = {"untrained": args.model, "peers": args.model}
    models |= dict(entry.split("=", 1) for entry in args.adapted)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only or models:
        started = time.perf_counter()
        model, tokenizer, own = load(models[name], dtype=args.dtype, device=args.device)
        kinds = layer_kinds(model.config)
        arms = plan_arms([SharingPlan.for_retention(r, kinds) for r in RETENTIONS])
        if name == "peers":
            # the rules that look at the model read training documents, never those that are measured
            sample = spread_blocks(token_blocks(calibration_text, tokenizer, args.block_size), 16)
            found = equal_bytes_arms(model, sample)
            chosen = [arm for fraction in FRACTIONS for arm in found[fraction] if args.match in arm.label]
            arms = [arms[0], *chosen]
        work = Evaluation(tokenizer=tokenizer, texts=texts, config=config, questions=questions)
        figures = measure(model, name, models[name], work, arms, args)
        if own is not None and own.provenance:
            figures["provenance"] = dict(own.provenance)
        figures["seconds"] = round(time.perf_counter() - started, 1)
        suffix = "".join(c if c.isalnum() else "-" for c in args.match) if name == "peers" and args.match else ""
        (args.out / f"{name}{suffix}.json").write_text(json.dumps(plain(figures), indent=1) + "\n", encoding="utf-8")
        print(table(figures["rows"]), flush=True)


def measure(
    model: Any, name: str, source: str, work: Evaluation, arms: Sequence[Arm], args: argparse.Namespace
) -> dict[str, Any]:
    """The figures of one model, in the form of `evaluate --json`."""
    total, done = work.units(len(arms)), 0

    def advance(units: int) -> None:
        nonlocal done
        if (done + units) * 20 // total > done * 20 // total:
            print(f"{name}: {100 * (done + units) // total} %", file=sys.stderr, flush=True)
        done += units

    rows = work.run(model, arms, advance)
    for row, arm in zip(rows, arms, strict=True):
        row["cache_bytes"] = measured_bytes(model, arm, args.block_size)
        row["cache_fraction"] = row["cache_bytes"] / rows[0]["cache_bytes"]
    return {
        "format": "depthkv-evaluation",
        "version": 1,
        "model": f"{name}: {source}",
        "data": list(work.texts),
        "held_out": True,
        "suites": list(work.config.suites),
        "blocks": args.blocks,
        "block_size": args.block_size,
        "dtype": args.dtype,
        "seed": work.config.seed,
        "num_layers": len(layer_kinds(model.config)),
        "environment": environment(next(model.parameters()).device),
        "command": "python " + " ".join(sys.argv),
        "rows": rows,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each arm, with the difference from the full cache where it is known."""
    lines = [f"{'arm':34} {'bytes':>6} {'loss':>7} {'top1':>6} {'F1':>6} {'EM':>6} {'retr.':>6} {'rep.':>6}"]
    for row in rows:
        cells = [
            row.get("loss"),
            row.get("agreement", {}).get("top1", {}).get("value"),
            row.get("qa", {}).get("f1", {}).get("value"),
            row.get("qa", {}).get("exact_match", {}).get("value"),
            row.get("retrieval", {}).get("score", {}).get("value"),
            row.get("generation", {}).get("repetition", {}).get("value"),
        ]
        shown = ["" if cell is None else f"{cell:.3f}" if i == 0 else f"{cell:.1f}" for i, cell in enumerate(cells)]
        lines.append(
            f"{row['label']:34} {row['cache_fraction']:>6.3f} {shown[0]:>7} " + " ".join(f"{s:>6}" for s in shown[1:])
        )
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """Numbers that JSON does not have become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()

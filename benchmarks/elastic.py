"""A cache that gives up layers while it grows, against other ways to stay within the same bytes.

Text is fed in pieces through a cache that may take no more bytes than the full cache of --start tokens would, until it
is --growth times as long:

- elastic: all layers at first, then one leader fewer whenever the next piece would not fit;
- the smaller plan from the start: the map that the elastic cache ends with;
- window: all layers, the first four tokens and the last ones that fit (StreamingLLM);
- 8-bit: all layers, int8 with a scale for each token and head, the first four tokens and the last ones that fit;
- the full cache without a limit, for comparison.

Loss and digit accuracy are of what follows the first --start tokens. Every arm's storage is measured after every piece.
Also: what it takes to give up layers, against reading the text again, which is what an engine does that evicts a
sequence and takes it up later. One JSON line is appended to --out.

    python benchmarks/elastic.py MODEL --label NAME --calibration cal.json --out docs/raw/elastic.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from adaptive import costs, digit_tokens, result
from mixed_text import SORTS, Inputs, mixed_inputs
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from depthkv import SharingPlan, load, share
from depthkv.adaptive import Ladder, StepReport
from depthkv.architectures import layer_kinds
from depthkv.calibrate.store import Calibration
from depthkv.evaluate.intervals import score
from depthkv.machine import environment
from depthkv.memory import cache_bytes, measured_cache_bytes
from depthkv.planner import Budget, Problem, nested_plans
from depthkv.planner.nested import given_up

SINKS = 4


class WindowLayer(DynamicLayer):
    """The first `SINKS` tokens and the last ones, `room` in all; with `int8` a byte for each number and a scale."""

    def __init__(self, room: int, *, int8: bool) -> None:
        super().__init__()
        self.room, self.int8, self.seen = room, int8, 0
        self.kept: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What is kept, read back, and the new tokens."""
        self.is_initialized = True
        pair = (key_states, value_states)
        if self.kept:
            pair = tuple(
                torch.cat([_read(kept, new.dtype), new], dim=2) for kept, new in zip(self.kept, pair, strict=True)
            )
        self.seen += key_states.shape[2]
        self.kept = [self._write(whole) for whole in pair]
        return pair

    def _write(self, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if whole.shape[2] > self.room:
            whole = torch.cat([whole[:, :, :SINKS], whole[:, :, whole.shape[2] - self.room + SINKS :]], dim=2)
        if not self.int8:
            return whole.clone(), None
        scale = whole.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-8) / 127
        return (whole.float() / scale).round().to(torch.int8), scale.to(whole.dtype)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All that is kept comes before the query; the first ones are taken for the tokens next to the window."""
        stored = min(self.seen, self.room)
        return stored + query_length, self.seen - stored


def _read(kept: tuple[torch.Tensor, torch.Tensor | None], dtype: torch.dtype) -> torch.Tensor:
    numbers, scale = kept
    return numbers if scale is None else (numbers.to(torch.float32) * scale.float()).to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--label", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--start", type=int, default=256, help="tokens whose full cache is the budget")
    parser.add_argument("--growth", type=int, default=2)
    parser.add_argument("--inputs", type=int, default=8, help="of each sort")
    parser.add_argument("--sorts", nargs="+", default=list(SORTS))
    parser.add_argument("--piece", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--leaders", type=int, default=15, help="of the plan that the ladder goes by")
    parser.add_argument("--through", type=Path, help="that plan; by default the best measured one of --leaders")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    model, tokenizer, _ = load(args.model, dtype=args.dtype, device="cpu")
    model.eval()
    config, kinds = model.config, layer_kinds(model.config)
    plan = ladder_plan(args, model)
    tokens = args.start * args.growth
    inputs = mixed_inputs(tokenizer, tokens=tokens, per_sort=args.inputs, test=True, sorts=args.sorts)
    digits = digit_tokens(tokenizer)
    budget = cache_bytes(config, model.dtype, args.start)
    head = config.get_text_config()
    numbers = budget // args.start // model.dtype.itemsize  # of a token
    heads = 2 * head.num_key_value_heads * len(kinds)
    int8_tokens = budget // (numbers + heads * model.dtype.itemsize)
    reports: list[StepReport] = []

    def elastic() -> Any:
        handle = share(model, plan, sequence_kv_budget=budget)
        handle.on_step = reports.append  # type: ignore[union-attr]
        return handle

    def windows(room: int, int8: bool) -> Callable[[], Cache]:
        # while a piece is read it is kept, too
        return lambda: Cache(layers=[WindowLayer(room, int8=int8) for _ in kinds])

    def dynamic() -> Cache:
        return DynamicCache(config=config)

    arms: dict[str, tuple[Callable[[], Any], Callable[[], Cache]]] = {
        "full cache, no limit": (nullcontext, dynamic),
        "elastic": (elastic, dynamic),
        "window": (nullcontext, windows(args.start, False)),
        "8-bit, window": (nullcontext, windows(int8_tokens, True)),
    }
    rows: dict[str, Any] = {}

    def run(label: str, context: Any, make_cache: Callable[[], Cache]) -> None:
        started = time.perf_counter()
        with context:
            found, largest = stream(model, inputs, digits, make_cache, args)
        rows[label] = {
            "loss": score([loss for loss, _ in found], inputs.documents).to_dict(),
            "by_sort": by_sort(found, inputs),
            "largest_bytes": largest,
            "seconds": round(time.perf_counter() - started, 1),
        }
        print(f"{label:30} {rows[label]['loss']['value']:.3f} {largest:>12,} of {budget:,} bytes", flush=True)

    for label, (make_context, make_cache) in arms.items():
        if args.arms and label not in args.arms:
            continue
        run(label, make_context(), make_cache)
    last = reports[-1].maps[0]
    rungs = Ladder.of(plan, kinds).plans
    run("smaller plan from the start", share(model, SharingPlan(last)), dynamic)
    line = {
        "label": args.label,
        "model": args.model,
        "start": args.start,
        "growth": args.growth,
        "tokens": tokens,
        "sorts": list(args.sorts),
        "inputs": len(inputs.sorts),
        "budget": budget,
        "through": list(next(p for p in rungs if len(p.leaders) == args.leaders).kv_source_layers),
        "window_tokens": args.start,
        "int8_tokens": int8_tokens,
        "rows": rows,
        "largest_elastic_step": max(report.cache_bytes // len(report.maps) for report in reports),
        "leaders": [[report.num_tokens, len(set(report.maps[0]))] for report in reports[: tokens // args.piece]],
        "times": shedding_times(model, plan, inputs.tokens[0], args),
        "dtype": args.dtype,
        "environment": environment(torch.device("cpu")),
        "command": "python " + " ".join(sys.argv),
    }
    print(line["times"])
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def ladder_plan(args: argparse.Namespace, model: Any) -> SharingPlan:
    """The full plan with the planner's nested plans below it, by way of the best measured one of --leaders."""
    calibration = Calibration.load(args.calibration)
    _, corrected, known = costs(calibration)
    kinds = layer_kinds(model.config)
    problem = Problem(kinds=kinds, budget=Budget.of_retention(1.0, model.config, model.dtype))
    best = min((m for m in known if len(m.plan.leaders) == args.leaders), key=lambda m: m.increase).plan
    best = best if args.through is None else SharingPlan.load(args.through)
    nested = nested_plans(problem, corrected, best)
    provenance = {"order": given_up(nested), "nested": [list(plan.kv_source_layers) for plan in nested[1:]]}
    return SharingPlan(range(len(kinds)), provenance)


@torch.no_grad()
def stream(
    model: Any, inputs: Inputs, digits: torch.Tensor, make_cache: Callable[[], Cache], args: argparse.Namespace
) -> tuple[list[tuple[float, float]], int]:
    """Loss and digit accuracy after the first --start tokens, and the most bytes of a sequence after a piece."""
    found, largest = [], 0
    for batch in inputs.tokens.split(args.batch_size):
        cache = make_cache()
        logits = []
        for piece in batch.split(args.piece, dim=1):
            logits.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
            largest = max(largest, -(-measured_cache_bytes(cache) // len(batch)))
        whole = torch.cat(logits, dim=1)[:, args.start - 1 : -1]
        found += [result(row, tokens[args.start :], digits) for row, tokens in zip(whole, batch, strict=True)]
    return found, largest


def by_sort(found: list[tuple[float, float]], inputs: Inputs) -> dict[str, dict[str, float | None]]:
    """Means."""
    rows = {}
    for sort in dict.fromkeys(inputs.sorts):
        mine = [entry for entry, name in zip(found, inputs.sorts, strict=True) if name == sort]
        right = [share for _, share in mine if share == share]
        rows[sort] = {
            "loss": statistics.fmean(loss for loss, _ in mine),
            "digits": statistics.fmean(right) if right else None,
        }
    return rows


@torch.no_grad()
def shedding_times(model: Any, plan: SharingPlan, tokens: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds to halve the leaders of a sequence of all tokens, and to read it again; medians of seven."""
    ladder = Ladder.of(plan, layer_kinds(model.config))
    half = plan.kv_source_layers
    while len(set(half)) > len(half) // 2:
        half = ladder.smaller(half) or half
    halving, reading = [], []
    with share(model, plan, kv_budget=10**12):
        for _ in range(7):
            started = time.perf_counter()
            cache: Any = model(input_ids=tokens[None], use_cache=True, logits_to_keep=1).past_key_values
            reading.append(time.perf_counter() - started)
            started = time.perf_counter()
            for layer, source in zip(cache.layers, half, strict=True):
                layer.assign([source])
            halving.append(time.perf_counter() - started)
    return {
        "tokens": len(tokens),
        "leaders": [len(set(plan.kv_source_layers)), len(set(half))],
        "shed_s": statistics.median(halving),
        "recompute_s": statistics.median(reading),
    }


if __name__ == "__main__":
    main()

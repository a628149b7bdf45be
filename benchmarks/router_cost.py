"""What deciding costs: a router against the plan that it decides for, in turns in one run.

Time to the first token and time per further token of `generate()`-like greedy steps, for one sequence. Routers have
random weights where what they decide does not matter; each is compared with `share(model, plan)` under the very map
that it chose, once without early stop, which is what deciding costs, and once with it, which a router cannot have. The
last pairs are a batch whose sequences have the same or unlike maps against one plan, and a budget that is never reached
against none. One JSON line is appended to --out.

    python benchmarks/router_cost.py MODEL --label NAME --out docs/raw/router_cost.jsonl
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

from depthkv import SharingPlan, load, share
from depthkv.adaptive.features import NUM_STATISTICS
from depthkv.adaptive.learned import LearnedRouter
from depthkv.adaptive.measure import varied_plans
from depthkv.adaptive.portfolio import PortfolioRouter
from depthkv.adaptive.router import Pair, Prompt, Router
from depthkv.adaptive.similarity import similarity_router
from depthkv.architectures import layer_kinds
from depthkv.data import resolve_data, split_documents, token_blocks
from depthkv.machine import environment


class ByRow(Router):
    """Each sequence another one of some plans, by its first token; or all the first."""

    needs_kv = False

    def __init__(self, plans: list[SharingPlan], first_tokens: list[int]) -> None:
        self.plans, self.first_tokens = plans, first_tokens

    def source(self, layer: int, prompt: Prompt, own: Pair | None) -> int:
        assert prompt.tokens is not None
        plan = self.plans[self.first_tokens.index(int(prompt.tokens[0])) % len(self.plans)]
        return plan.kv_source_layers[layer]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--label", required=True)
    parser.add_argument("--data", default="builtin:anarchism")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4, help="of the last pairs")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--retention", type=float, default=0.5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    model, tokenizer, _ = load(args.model, dtype=args.dtype, device=args.device)
    model.eval()
    kinds = layer_kinds(model.config)
    _, held_out = split_documents(resolve_data(args.data))
    blocks = token_blocks(held_out, tokenizer, args.prompt_tokens)[: args.batch_size]
    width = NUM_STATISTICS + model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(0)
    plans = varied_plans(kinds, args.retention)
    weights = torch.randn(len(plans), 1 + width, generator=generator, dtype=torch.float64)
    zeros, ones = torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)
    heads = torch.randn(len(kinds), width, generator=generator)
    short = [block[:256] for block in blocks]
    routers: dict[str, Router] = {
        "portfolio": PortfolioRouter(plans, weights, zeros, ones, 0.0, kinds),
        "learned": LearnedRouter(heads, torch.zeros(len(kinds)), kinds),
        "similarity": similarity_router(model, short, args.retention),
    }
    one = blocks[:1].to(args.device)
    pairs: dict[str, Any] = {}
    for name, router in routers.items():
        with share(model, router) as handle:
            run(model, one, 1)
            plan = SharingPlan(handle.last_maps[0])
        pairs[name] = compare(model, (plan, {}), (router, {}), one, args)
        pairs[f"{name}, early stop"] = compare(model, (plan, {}), (router, {}), one, args, early_stop=True)
    plan = plans[0]
    pairs["budget, not reached"] = compare(model, (plan, {}), (plan, {"kv_budget": 10**12}), one, args)
    batch = blocks.to(args.device)
    first = [int(row[0]) for row in batch]
    same, unlike = ByRow(plans[:1], first), ByRow(plans[: len(first)], first)
    pairs["batch, the plan against the same map for each"] = compare(model, (plan, {}), (same, {}), batch, args)
    pairs["batch, the plan against unlike maps"] = compare(model, (plan, {}), (unlike, {}), batch, args)
    for name, found in pairs.items():
        print(f"{name:50} TTFT {found['ttft_ratio']:.3f}x  per token {found['token_ratio']:.3f}x", flush=True)
    line = {
        "label": args.label,
        "model": args.model,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "retention": args.retention,
        "pairs": pairs,
        "dtype": args.dtype,
        "environment": environment(torch.device(args.device)),
        "command": "python " + " ".join(sys.argv),
    }
    if args.out is not None:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def compare(
    model: Any, first: Any, second: Any, tokens: torch.Tensor, args: argparse.Namespace, early_stop: bool = False
) -> dict[str, Any]:
    """Medians of the ratios second / first over pairs of runs in turns."""
    times: list[list[tuple[float, float]]] = [[], []]
    for repeat in range(args.repeats + 1):
        order = (0, 1) if repeat % 2 else (1, 0)
        for which in order:
            how, options = (first, second)[which]
            with share(model, how, **options):
                found = run(model, tokens, args.new_tokens, early_stop)
            if repeat:  # the first pair warms up
                times[which].append(found)
    ratios = [[b[i] / a[i] for a, b in zip(*times, strict=True)] for i in (0, 1)]
    return {
        "ttft_s": [statistics.median(t[0] for t in side) for side in times],
        "token_s": [statistics.median(t[1] for t in side) for side in times],
        "ttft_ratio": statistics.median(ratios[0]),
        "token_ratio": statistics.median(ratios[1]),
        "ttft_ratio_range": [min(ratios[0]), max(ratios[0])],
        "token_ratio_range": [min(ratios[1]), max(ratios[1])],
    }


@torch.no_grad()
def run(model: Any, tokens: torch.Tensor, new_tokens: int, early_stop: bool = False) -> tuple[float, float]:
    """Seconds to the first token and for each further one."""
    wait = torch.cuda.synchronize if tokens.is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    # the same position, named in a way that prefill does not stop early for
    last = 1 if early_stop else torch.tensor([tokens.shape[1] - 1], device=tokens.device)
    output = model(input_ids=tokens, use_cache=True, logits_to_keep=last)
    token = output.logits[:, -1:].argmax(dim=-1)
    wait()
    first = time.perf_counter() - started
    cache = output.past_key_values
    started = time.perf_counter()
    for _ in range(new_tokens):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(dim=-1)
    wait()
    return first, (time.perf_counter() - started) / new_tokens


if __name__ == "__main__":
    main()

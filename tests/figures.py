"""Files as `depthkv evaluate --json` and `depthkv bench --json` write them, with figures of a likely size."""

from __future__ import annotations

import random
from typing import Any

LAYERS = 30
TEXTS = ("builtin:anarchism", "builtin:brown")
LENGTHS = (512, 1024, 2048)
PROMPTS = (
    "The assembly met every week in the old hall by the harbour, and whoever wished to speak",
    "Of all the instruments in the laboratory, the one that the students feared most",
)
_WRITTEN = (
    " could do so. It was not always easy: the discussions lasted until late at night, and the decisions were taken by "
    "those who had stayed. Nobody kept the minutes.",
    " was the balance, which had to be set up again before every measurement.\n\nIt stood in a glass case of its own.",
    " the the of the and of the the of the the and the of the the of the and of the the of the the and the of the",
)


def score(
    value: float, spread: float, full: float | None = None, paired: float = 0.3, count: int = 64
) -> dict[str, Any]:
    """What Score.to_dict() gives; `full` is the full cache's value."""
    difference = None if full is None else value - full
    return {
        "value": value,
        "low": value - spread,
        "high": value + 1.1 * spread,
        "difference": difference,
        "difference_low": None if difference is None else difference - paired * spread,
        "difference_high": None if difference is None else difference + paired * spread,
        "count": count,
    }


def evaluation(model: str = "builtin:smollm2-135m-depthkv", harm: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """All suites at four sizes of the cache; `harm` scales what a smaller cache costs."""
    rng = random.Random(seed)
    rows = [_row(k, harm, rng) for k in (1, 2, 3, 4)]
    full = rows[0]
    for row in rows[1:]:
        _compare(row, full)
    return {
        "format": "depthkv-evaluation",
        "version": 1,
        "model": model,
        "data": list(TEXTS),
        "held_out": True,
        "suites": ["perplexity", "agreement", "generation", "qa", "retrieval"],
        "blocks": 32,
        "block_size": 512,
        "dtype": "bfloat16",
        "seed": 0,
        "num_layers": LAYERS,
        "provenance": {"made_by": "depthkv adapt", "base_model": "builtin:smollm2-135m", "tokens": 4005888},
        "environment": {
            "depthkv": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "device": "AMD EPYC",
            "threads": 2,
        },
        "command": f"depthkv evaluate {model} --data {' '.join(TEXTS)} --suite all --questions q.json --json e.json",
        "rows": rows,
    }


def _row(every: int, harm: float, rng: random.Random) -> dict[str, Any]:
    sources = [layer - layer % every for layer in range(LAYERS)]
    leaders = sorted(set(sources))
    cost = harm * (0.0, 0.0, 0.121, 0.29, 0.44)[every]
    kept = max(0.0, 1 - cost)
    loss = 3.4 + cost
    texts = []
    for name, extra in zip(TEXTS, (-0.2, 0.2), strict=True):
        positions = [
            {"first": first, "last": last, "loss": score(loss + extra + late + cost * 0.3 * i, 0.06)}
            for i, (first, last, late) in enumerate([(1, 63, 0.6), (64, 127, 0.1), (128, 255, 0.0), (256, 511, -0.1)])
        ]
        texts.append({"data": name, "documents": 40, "loss": score(loss + extra, 0.07), "positions": positions})
    tasks = [
        {"task": task, "tokens": tokens, "score": score(100 * kept * ease * 512**0.2 / tokens**0.2, 8.0, count=15)}
        for task, ease in (("needle", 0.95), ("multi-needle", 0.8), ("variables", 0.5), ("qa", 0.4))
        for tokens in LENGTHS
    ]
    depths = [
        {
            "tokens": tokens,
            "depth": depth,
            "score": score(100 * kept * (1 - 0.5 * (depth == 0.25) * (tokens > 512)) * rng.uniform(0.8, 1), 9.0),
        }
        for tokens in LENGTHS
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    written = [_WRITTEN[2] if cost > 2 else text for text in _WRITTEN[:2]]
    return {
        "label": "full cache" if every == 1 else f"{len(leaders) / LAYERS:.0%} of layers",
        "retention": len(leaders) / LAYERS,
        "leaders": leaders,
        "kv_source_layers": sources,
        "kv_bytes_per_token": 768 * len(leaders),
        "loss": loss,
        "perplexity": 2.718281828**loss,
        "loss_score": score(loss, 0.05),
        "texts": texts,
        "agreement": {"top1": score(100 * max(0.02, kept**1.5), 0.9), "kl": score(cost * 1.2, 0.02)},
        "generation": {
            "repetition": score(min(98.0, 8 + 25 * cost), 3.0, count=16),
            "length": score(60.0 - cost, 2.0, count=16),
            "ended": score(10.0, 5.0, count=16),
            "same_prefix": score(64 * kept**4, 3.0, count=16),
            "samples": [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, written, strict=True)],
        },
        "qa": {
            "f1": score(41.3 * kept, 4.0, count=120),
            "exact_match": score(28.3 * kept, 4.0, count=120),
            "rouge_l": score(40.8 * kept, 4.0, count=120),
        },
        "retrieval": {"score": score(60 * kept, 5.0, count=180), "tasks": tasks, "depths": depths},
    }


def _compare(row: Any, full: Any) -> None:
    """Fill in the differences of all scores from the full cache's."""
    if isinstance(row, dict) and "difference" in row:
        row["difference"] = row["value"] - full["value"]
        half = 0.3 * (row["high"] - row["low"]) / 2
        row["difference_low"], row["difference_high"] = row["difference"] - half, row["difference"] + half
    elif isinstance(row, dict):
        for key in row:
            _compare(row[key], full[key])
    elif isinstance(row, list) and isinstance(full, list) and len(row) == len(full):
        for own, other in zip(row, full, strict=True):
            _compare(own, other)


def peers(seed: int = 0) -> dict[str, Any]:
    """Several methods at the same bytes, as `benchmarks/compare.py` writes it: their plans say nothing of the cache."""
    found = evaluation("peers: builtin:smollm2-135m", seed=seed)
    full, half, _, quarter = found["rows"]
    full["cache_bytes"], full["cache_fraction"] = 11796480, 1.0
    rows = [full]
    costs = {"KVSharer, threshold given up": 6.1, "MiniCache of 2": 2.9, "quantised to 8 bits": 0.002}
    costs |= {"StreamingLLM window": 0.21, "ShortGPT with 15 layers": 5.2}
    for row, fraction in ((half, 0.5), (quarter, 0.25)):
        for name, cost in costs.items():
            arm = dict(row, label=f"{name}, {fraction:.0%}", cache_fraction=fraction + 0.01 * (cost < 0.1))
            if not name.startswith("KVSharer"):
                arm |= {"retention": 1.0, "kv_bytes_per_token": None, "kv_source_layers": list(range(LAYERS))}
                arm["leaders"] = list(range(LAYERS))
            loss = 3.4 + cost / fraction / 2
            arm |= {"loss": loss, "perplexity": 2.718281828**loss, "loss_score": score(loss, 0.05, 3.4)}
            rows.append(arm)
    return dict(found, rows=rows)


def bench(cells: int = 2) -> dict[str, Any]:
    """Speed and memory at one or several lengths."""
    found = []
    for prompt, batch in ((1024, 1), (4096, 8))[:cells]:
        full = _speeds(0.0011 * prompt, 22.0 * batch, 23040 * prompt * batch, 0.02)
        shared = _speeds(0.0006 * prompt, 23.4 * batch, 11520 * prompt * batch, 0.05)
        names = [name for name in full if not name.endswith(("_min", "_max"))]
        found.append(
            {
                "prompt_tokens": prompt,
                "new_tokens": 64,
                "batch_size": batch,
                "arms": {"full": full, "shared": shared},
                "ratios": {name: shared[name] / full[name] for name in names},
            }
        )
    return {
        "model": "builtin:smollm2-135m",
        **found[0],
        "cells": found,
        "retention": 0.5,
        "leaders": list(range(0, LAYERS, 2)),
        "repeats": 5,
        "seed": 0,
        "device": "x86_64 CPU",
        "threads": 2,
        "torch": "2.13.0",
        "dtype": "bfloat16",
    }


def _speeds(ttft: float, speed: float, cache: int, noise: float) -> dict[str, Any]:
    values = {
        "ttft_s": ttft,
        "decode_tokens_per_s": speed,
        "cache_bytes": cache,
        "peak_bytes": 700_000_000 + 2 * cache,
        "peak_above_start_bytes": 60_000_000 + 2 * cache,
    }
    found: dict[str, Any] = {}
    for name, value in values.items():
        wide = 0.0 if name == "cache_bytes" else noise
        found |= {name: value, f"{name}_min": value * (1 - wide), f"{name}_max": value * (1 + 2 * wide)}
    return found

"""A file as `depthkv plan --json` writes it, with figures of a likely shape."""

from __future__ import annotations

import math
import random
from typing import Any

from depthkv.plan import SharingPlan
from figures import score

MEASURES = (
    "key_cka",
    "key_cosine",
    "key_r2",
    "value_cka",
    "value_cosine",
    "value_r2",
    "kv_distance",
    "output_cosine",
    "output_error",
)
FULL_LOSS = 3.4


def plan_file(
    num_layers: int = 30,
    *,
    retention: float = 0.5,
    kinds: int = 1,
    general: bool = False,
    model: str = "builtin:smollm2-135m",
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of one plan.

    Args:
        num_layers: of the model.
        retention: of the chosen plan.
        kinds: with more than one, each layer shares with every `kinds`-th only.
        general: followers read any earlier leader, not the nearest.
        model: its name.
        seed: of what is drawn.
    """
    rng = random.Random(seed)
    per_layer = 768
    harm = [0.03 + 0.5 * rng.random() ** 3 + 3.0 * (layer < 2) for layer in range(num_layers)]
    cost = _pairs(num_layers, kinds, lambda i, j: harm[i] * (0.06 + 1 - math.exp(-(i - j) / 9)) * rng.uniform(0.5, 1.5))
    for layer in range(num_layers):
        cost[layer][layer] = 0.0
    if num_layers > 5:
        cost[5][5 - kinds] = -0.002
        cost[4][0] = None
    free = num_layers - kinds
    order = sorted(range(kinds, num_layers), key=lambda layer: harm[layer])
    kept = max(kinds, round(retention * num_layers))
    nested = []
    for gone in range(free + 1):
        leaders = sorted(set(range(num_layers)) - set(order[:gone]))
        loss = FULL_LOSS + _rise(gone / num_layers)
        nested.append(
            {
                "leaders": leaders,
                "kv_source_layers": list(
                    SharingPlan.from_leaders(leaders, num_layers, _kinds(num_layers, kinds)).kv_source_layers
                ),
                "kv_bytes_per_token": per_layer * len(leaders),
                "predicted_loss": loss,
                "measured_loss": None if gone % 3 == 1 else loss * 1.01 + 0.02 * (gone > 0),
                "free_predicted_loss": loss - 0.02 * math.sin(math.pi * gone / max(free, 1)) ** 2,
                "chosen": len(leaders) == kept,
            }
        )
    leaders = next(size["leaders"] for size in nested if size["chosen"])
    sources = list(SharingPlan.from_leaders(leaders, num_layers, _kinds(num_layers, kinds)).kv_source_layers)
    if general:
        for layer, source in enumerate(sources):
            if source != layer:
                sources[layer] = rng.choice([x for x in leaders if x < layer and x % kinds == layer % kinds])
    size = per_layer * len(leaders)
    measured = next(size["measured_loss"] or size["predicted_loss"] for size in nested if size["chosen"])
    return {
        "format": "depthkv-plan-figures",
        "version": 1,
        "model": model,
        "data": ["builtin:brown"],
        "command": f"depthkv plan {model} --data builtin:brown --retention {retention} --out plan.json --json p.json",
        "environment": {"depthkv": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "device": "AMD EPYC", "threads": 2},
        "dtype": "float32",
        "num_layers": num_layers,
        "seed": 0,
        "kv_source_layers": sources,
        "leaders": leaders,
        "retention": len(leaders) / num_layers,
        "kv_bytes_per_token": size,
        "full_kv_bytes_per_token": per_layer * num_layers,
        "predicted_loss": measured - 0.05,
        "measured_loss": measured,
        "budget": {"words": "half of the layers", "retention": retention},
        "calibration": {
            "tokens": 16384,
            "cost_tokens": 8192,
            "documents": 24,
            "block_size": 512,
            "similarity_seconds": 14.2,
            "cost_seconds": 311.8,
            "search_evaluations": 2714,
            "search_seconds": 0.8,
        },
        "full_loss": FULL_LOSS,
        "held_out_full": score(3.45, 0.06),
        "held_out_adapter_off": score(3.61, 0.06),
        "similarity": {name: _similarity(name, num_layers, kinds, rng) for name in MEASURES},
        "cost": cost,
        "order": order,
        "nested": nested,
        "comparison": _comparison(num_layers, kinds, sources, per_layer, measured),
        "certainty": {
            "resamples": 200,
            "leader_share": [1.0 if i < kinds else min(1.0, rng.betavariate(5, 1) if i in leaders else
                             rng.betavariate(1, 4)) for i in range(num_layers)],
            "same_plan": 0.37,
            "better_than_even": 0.985,
        },
    }  # fmt: skip


def _rise(gone: float) -> float:
    """Of the loss, when this share of the layers keeps no cache."""
    return 0.9 * gone**1.5 + 7.5 * gone**7


def _kinds(num_layers: int, kinds: int) -> list[int]:
    return [layer % kinds for layer in range(num_layers)]


def _pairs(num_layers: int, kinds: int, value: Any) -> list[list[float | None]]:
    return [
        [round(value(i, j), 5) if j <= i and i % kinds == j % kinds else None for j in range(num_layers)]
        for i in range(num_layers)
    ]


def _similarity(name: str, num_layers: int, kinds: int, rng: random.Random) -> list[list[float | None]]:
    if name in ("kv_distance", "output_error"):
        return _pairs(
            num_layers, kinds, lambda i, j: 40 * (i != j) * (1 - math.exp(-(i - j) / 8)) * rng.uniform(0.9, 1.1)
        )
    reach = {"key_cka": 14.0, "value_cka": 9.0, "output_cosine": 5.0}.get(name, 3.0)
    split = num_layers // 3

    def value(i: int, j: int) -> float:
        near = math.exp(-(i - j) / reach) * (0.6 if j < split <= i else 1.0)
        return near * (1.0 if i == j else rng.uniform(0.85, 1.0)) - 0.05 * (name.endswith("cosine") and i > j)

    return _pairs(num_layers, kinds, value)


def _comparison(
    num_layers: int, kinds: int, sources: list[int], per_layer: int, measured: float
) -> list[dict[str, Any]]:
    own = SharingPlan(sources)
    groups = _kinds(num_layers, kinds)
    count = len(own.leaders)
    even = SharingPlan.from_leaders(
        sorted({*range(kinds), *(i * num_layers // count for i in range(count))}), num_layers, groups
    )
    front = SharingPlan.from_leaders(range(count), num_layers, groups)
    back = SharingPlan.from_leaders([*range(kinds), *range(num_layers - count + kinds, num_layers)], num_layers, groups)
    rows = []
    for label, plan, extra in (
        ("this plan", own, 0.0),
        ("evenly spaced", even, 0.42),
        ("front layers", front, 1.9),
        ("back layers", back, 3.1),
        ("similar keys (CKA)", even, 0.31),
        ("KVSharer: most different keys and values", back, 4.4),
        ("cost of one layer at a time", own, 0.05),
    ):
        loss = measured + 0.06 + extra
        against = {"difference": extra - 0.42, "low": extra - 0.42 - 0.04, "high": extra - 0.42 + 0.05}
        rows.append(
            {
                "label": label,
                "leaders": list(plan.leaders),
                "kv_source_layers": list(plan.kv_source_layers),
                "sum_of_costs": 0.1 * len(plan.followers),
                "kv_bytes_per_token": per_layer * len(plan.leaders),
                "predicted_loss": measured - 0.05 + 0.8 * extra,
                "measured_loss": measured + extra,
                "loss_score": score(loss, 0.07, 3.45),
                "against_even": None if label == "evenly spaced" else against,
            }
        )
    return rows

"""A file as `depthkv generate --json` writes it, with figures of a likely shape."""

from __future__ import annotations

import random
from typing import Any

PROMPTS = (
    "The cache of a layer is",
    "Once upon a time there was a lighthouse keeper who had not seen a ship for years, and he",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Translate into French: the committee adjourned without a decision.",
    "ключи и значения каждого слоя",
)
WORDS = "it was so that of these the keys were kept and none of them read by what came before or after in turn".split()
PER_TOKEN = 768
"""Bytes of a layer."""


def generation_file(
    num_sequences: int = 5,
    num_layers: int = 30,
    num_steps: int = 200,
    *,
    budget: float | None = 0.8,
    router: str | None = "SimilarityRouter",
    model: str = "builtin:smollm2-135m",
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of some prompts.

    Args:
        num_sequences: prompts.
        num_layers: of the model.
        num_steps: forwards; 0 for one plan without a budget, which has none.
        budget: of the cache, as a share of what it would take otherwise; None for none.
        router: what chose the layers; None is one plan for all.
        model: its name.
        seed: of what is drawn.
    """
    rng = random.Random(seed)
    first, written = 24, num_steps or 64
    last = first + written - 1
    kept = []
    for number in range(num_sequences):
        wanted = (
            num_layers // 2
            if router is None
            else rng.randint(num_layers // 3, max(num_layers // 3, 2 * num_layers // 3))
        )
        drawn = random.Random(seed if router is None else 1000 * seed + number)
        kept.append({0, *drawn.sample(range(num_layers), wanted)})
    sequences = [
        {
            "prompt": PROMPTS[i % len(PROMPTS)] + (f" ({i})" if i >= len(PROMPTS) else ""),
            "text": f" {' '.join(rng.choices(WORDS, k=min(written, 400)))}",
            "prompt_tokens": first - 3 * (i % 4),
            "new_tokens": max(1, written - i % 3),
            "kv_source_layers": [max(leader for leader in leaders if leader <= layer) for layer in range(num_layers)],
            "leaders": sorted(leaders),
        }
        for i, leaders in enumerate(kept)
    ]
    retention = sum(map(len, kept)) / num_sequences / num_layers
    room = None if budget is None else int(budget * PER_TOKEN * last * sum(map(len, kept)))
    steps: list[dict[str, Any]] = []
    for tokens in range(first, first + num_steps):
        given_up = []
        while (
            room is not None and steps and max(map(len, kept)) > 1 and PER_TOKEN * tokens * sum(map(len, kept)) > room
        ):
            row = max(range(num_sequences), key=lambda row: len(kept[row]))
            layer = rng.choice(sorted(kept[row] - {0}))
            kept[row].remove(layer)
            given_up.append([row, layer])
        size = PER_TOKEN * tokens * sum(map(len, kept))
        steps.append(
            {"num_tokens": tokens, "cache_bytes": size, "leaders": [len(own) for own in kept], "given_up": given_up}
        )
    return {
        "format": "depthkv-generation",
        "version": 1,
        "model": model,
        "command": f"depthkv generate {model} --prompt ... --adaptive --retention 0.5 --json g.json",
        "environment": {"depthkv": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "device": "AMD EPYC", "threads": 2},
        "dtype": "float32",
        "num_layers": num_layers,
        "router": router,
        "cache_recipe": None,
        "kv_budget": room,
        "ended_by_budget": False,
        "retention": retention,
        "peak_cache_bytes": max([step["cache_bytes"] for step in steps] or [PER_TOKEN * last * sum(map(len, kept))]),
        "cache_bytes": steps[-1]["cache_bytes"] if steps else PER_TOKEN * last * sum(map(len, kept)),
        "full_cache_bytes": PER_TOKEN * last * num_layers * num_sequences,
        **{key: sequences[0][key] for key in ("prompt", "text", "leaders", "prompt_tokens", "new_tokens")},
        "sequences": sequences,
        "steps": steps,
    }

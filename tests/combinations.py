"""Random combinations of family, plan, cache, padding and lengths, each made by its seed alone."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from depthkv import SharingPlan, share
from depthkv.architectures import layer_kinds
from depthkv.compress import CacheRecipe
from depthkv.compress.reference import reference_recipe_logits
from depthkv.reference import reference_forward, reference_greedy
from families import CONFIGS, tiny_model

EAGER_ONLY = ("gemma2", "gpt_oss")  # in transformers 5.23
CACHES = ("none", "dynamic", "static", "quantised", "evicting", "quantised and evicting")
MOST = 1e-4
"""Largest difference of logits."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One case."""

    family: str
    attention: str
    cache: str
    padding: str
    lengths: tuple[int, ...]
    """Tokens of each sequence; the longest is the prompt's."""
    pieces: tuple[int, ...]
    """Tokens of each forward after the first, through a cache."""
    plan_seed: int


def combination(seed: int) -> Combination:
    """The same for the same seed."""
    rng = random.Random(seed)
    family, cache = rng.choice(list(CONFIGS)), rng.choice(CACHES)
    compressed = cache in CACHES[3:]
    # the oracle of recipes knows padding on the left
    padding = rng.choice(("none", "left") if compressed else ("none", "left", "right"))
    attention = rng.choice(("sdpa", "eager"))
    if compressed:  # as the oracle, but eager attention in fp64 makes its mask infinite, and padding no number
        attention = "eager" if padding == "none" else "sdpa"
    attention = "eager" if family in EAGER_ONLY else attention
    if "quantised" in cache and _single(family, padding):  # a number may fall to the next code by rounding alone
        cache = "evicting"
    longest, batch = rng.randint(4, 44), rng.randint(1, 3)
    least = longest if padding == "none" else max(1, longest - 20)
    return Combination(
        family=family,
        attention=attention,
        cache=cache,
        padding=padding,
        lengths=(longest, *(rng.randint(least, longest) for _ in range(batch - 1))),
        pieces=tuple(rng.choice((1, 1, 1, 2, 5)) for _ in range(rng.randint(1, 6))),
        plan_seed=rng.randrange(2**32),
    )


def _single(family: str, padding: str) -> bool:
    """Whether the family computes in fp32 alone: mixtures of experts, and eager attention behind padding."""
    return "num_experts" in CONFIGS[family] or (family in EAGER_ONLY and padding != "none")


def random_plan(model: PreTrainedModel, rng: random.Random) -> SharingPlan:
    """Followers read any earlier leader of their kind."""
    leaders: dict[Any, list[int]] = {}
    sources, share_of_leaders = [], rng.random()
    for layer, kind in enumerate(layer_kinds(model.config)):
        mine = leaders.setdefault(kind, [])
        if not mine or rng.random() < share_of_leaders:
            mine.append(layer)
            sources.append(layer)
        else:
            sources.append(rng.choice(mine))
    return SharingPlan(sources)


def random_recipe(plan: SharingPlan, cache: str, rng: random.Random) -> CacheRecipe:
    """Small enough to pack and to evict within some tokens."""
    small: dict[str, Any] = {"group_size": 8, "sinks": rng.randint(0, 4), "recent": rng.randint(1, 8)}
    if "quantised" in cache:
        for name in ("key_bits", "value_bits"):
            small[name] = tuple(rng.choice((16, 8, "fp8", 4, 2)) for _ in plan.leaders)
    if "evicting" in cache:
        small["rule"] = rng.choice(("window", "key-norm", "attention"))
        small["tokens"] = small["sinks"] + small["recent"] + 8 + rng.randint(0, 8)
    return CacheRecipe(plan=plan, **small)


@functools.cache
@torch.no_grad()
def _model(family: str, attention: str, double: bool) -> PreTrainedModel:
    model = tiny_model(family, attention)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("k_norm", "k_layernorm")):  # else all keys would be as long as each other
            parameter.uniform_(0.5, 1.5)
    return model.double() if double else model


@torch.no_grad()
def difference(seed: int) -> float:
    """Largest difference of a logit from the oracle's; infinite where a greedy token is another one."""
    case = combination(seed)
    rng = random.Random(case.plan_seed)
    compressed = case.cache in CACHES[3:]
    # in fp64 nothing is rounded to another code by chance
    model = _model(case.family, case.attention, compressed and not _single(case.family, case.padding))
    plan = random_plan(model, rng)
    longest, batch = case.lengths[0], len(case.lengths)
    generator = torch.Generator().manual_seed(case.plan_seed)
    ids = torch.randint(3, 97, (batch, longest), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(case.lengths):
        if case.padding == "left":
            mask[row, : longest - length] = 0
        elif case.padding == "right":
            mask[row, length:] = 0
    if compressed:
        pieces = [ids, *(torch.randint(3, 97, (batch, n), generator=generator) for n in case.pieces)]
        return _recipe_difference(model, random_recipe(plan, case.cache, rng), pieces, mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = reference_forward(model, plan.kv_source_layers, ids, attention_mask=mask, position_ids=positions).logits
    with share(model, plan):
        cache = _cache(model, case.cache, longest)
        got = model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=cache is not None
        ).logits
    worst = apart(got[mask.bool()], expected[mask.bool()])
    if case.padding == "right":  # nobody generates after padding
        return worst
    new = len(case.pieces)
    tokens, steps = reference_greedy(model, plan.kv_source_layers, ids, new, attention_mask=mask)
    options = {"none": {"use_cache": False}, "static": {"cache_implementation": "static", "disable_compile": True}}
    with share(model, plan):
        out = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **options.get(case.cache, {}),
        )
    if not torch.equal(out.sequences[:, longest:], tokens):
        return float("inf")
    return max(worst, apart(torch.stack(out.logits, 1), steps))


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference; infinite where one of them is no number."""
    return float((ours - theirs).detach().abs().nan_to_num(nan=float("inf")).max())


def _cache(model: PreTrainedModel, name: str, tokens: int) -> Any:
    if name == "none":
        return None
    return DynamicCache(config=model.config) if name == "dynamic" else StaticCache(model.config, max_cache_len=tokens)


def _recipe_difference(
    model: PreTrainedModel, recipe: CacheRecipe, pieces: list[torch.Tensor], mask: torch.Tensor
) -> float:
    """Piece by piece through one cache."""
    first, worst = mask, 0.0
    expected = reference_recipe_logits(model, recipe, pieces, mask)
    cache = DynamicCache(config=model.config)
    with share(model, recipe):
        for number, piece in enumerate(pieces):
            if number:
                mask = torch.cat([mask, torch.ones_like(piece)], dim=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -piece.shape[1] :]
            got = model(
                piece, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits
            seen = first.bool() if number == 0 else torch.ones_like(piece).bool()
            worst = max(worst, apart(got[seen], expected[number][seen]))
    return worst

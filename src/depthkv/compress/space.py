"""What the joint planner chooses among: plans of a ladder, bits of keys and values, tokens; and what each takes."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from depthkv.architectures import LayerKind, layer_kinds
from depthkv.compress.recipe import Bits, CacheRecipe
from depthkv.errors import PlanError, RecipeError
from depthkv.memory import kv_bytes_per_layer
from depthkv.plan import SharingPlan

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

__all__ = ["Space"]

AXES = ("depth", "bits", "tokens")
"""What bytes can be spent on."""

FRACTIONS = (3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 1 / 16)
"""Of the context: token budgets whose loss is looked at alone. Recipes take as many tokens as fit."""

SINKS = 4

_GROUPS = (32, 16, 8)

_WIDTHS: tuple[Bits, ...] = (16, 8, 4, 2)
"""fp8 is left out: 8 bits in groups lose less, at nearly as few bytes."""

_STEPS: tuple[tuple[Bits, Bits], ...] = ((16, 8), (8, 4), (4, 2))
"""Widths beside each other: leaders of one recipe have two such widths at most."""

Width = Bits | tuple[Bits, ...]
"""Bits of all leaders, or of each."""


class Space:
    """Recipes for one model, context and number of sequences.

    Groups and recent tokens are 32 each, or fewer where little is kept of the measured text, see `group_for`.

    Args:
        config: of the model.
        dtype: of weights and of what is not quantised.
        context: tokens of each sequence that is served.
        plans: a ladder, such as nested plans; the full cache need not be named. Only read with "depth" among the axes.
        axes: among `AXES`.
        measured_tokens: tokens of each text that losses are measured on, at most `context`, which is the default. On
            shorter texts a recipe is measured with as large a share of the tokens, see `on_text`.
        batch: sequences.
        rule: which tokens stay.
        working: count what a step unpacks beside the cache, see `CacheRecipe.working_bytes`.

    Raises:
        RecipeError: an unknown axis, none, or a text longer than the context.
        PlanError: a plan for another number of layers.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        *,
        context: int,
        plans: Sequence[SharingPlan] = (),
        axes: Iterable[str] = AXES,
        measured_tokens: int | None = None,
        batch: int = 1,
        rule: str = "window",
        working: bool = False,
    ) -> None:
        self.config, self.dtype, self.kinds = config, dtype, layer_kinds(config)
        self.context, self.batch, self.rule, self.working = context, batch, rule, working
        given = set(axes)
        for axis in sorted(given - set(AXES)):
            raise RecipeError(f"expected axes among {', '.join(AXES)}, got {axis!r}")
        if not given:
            raise RecipeError("expected at least one axis, got none")
        self.axes = tuple(axis for axis in AXES if axis in given)
        self.measured_tokens = context if measured_tokens is None else measured_tokens
        if not 1 <= self.measured_tokens <= context:
            raise RecipeError(f"expected texts of 1 to {context} tokens, the context, got {self.measured_tokens}")
        for plan in plans:
            if plan.num_layers != len(self.kinds):
                raise PlanError(f"expected plans for {len(self.kinds)} layers, got one for {plan.num_layers}")
        full = SharingPlan.full(len(self.kinds))
        shared = sorted({plan for plan in plans if not plan.is_full}, key=lambda p: (-len(p.leaders), p.leaders))
        self.plans = (full, *(shared if "depth" in self.axes else ()))
        """The full cache first, then with fewer and fewer leaders."""
        self._sizes: dict[tuple[int | None, int, str, LayerKind, tuple[Bits, Bits]], np.ndarray] = {}

    def replaced(self, *, axes: Iterable[str] | None = None, rule: str | None = None) -> Space:
        """The same with other axes or another rule."""
        return Space(
            self.config,
            self.dtype,
            context=self.context,
            plans=self.plans,
            axes=self.axes if axes is None else axes,
            measured_tokens=self.measured_tokens,
            batch=self.batch,
            rule=self.rule if rule is None else rule,
            working=self.working,
        )

    # Recipes

    def group_for(self, tokens: int | None) -> int:
        """Tokens of a group, and recent ones: 32, where at least 128 of the measured text's tokens are kept."""
        measured = self.measured_tokens if tokens is None else tokens * self.measured_tokens / self.context
        return next((group for group in _GROUPS[:-1] if measured >= 4 * group), _GROUPS[-1])

    @property
    def least_tokens(self) -> int:
        """Smallest token budget that can be measured and served."""
        least = SINKS + 2 * _GROUPS[-1]
        return max(least, -(-least * self.context // self.measured_tokens))

    def recipe(
        self, plan: SharingPlan | None = None, key_bits: Width = 16, value_bits: Width = 16, tokens: int | None = None
    ) -> CacheRecipe:
        """One of them; without arguments the full cache."""
        group = self.group_for(tokens)
        return CacheRecipe(
            plan=self.plans[0] if plan is None else plan,
            key_bits=key_bits,
            value_bits=value_bits,
            tokens=tokens,
            group_size=group,
            sinks=SINKS,
            recent=group,
            rule="window" if tokens is None else self.rule,
        )

    def on_text(self, recipe: CacheRecipe) -> CacheRecipe:
        """The recipe whose loss on the measured text stands for this one's at the context."""
        if recipe.tokens is None or self.measured_tokens == self.context:
            return recipe
        tokens = max(SINKS + 2 * recipe.group_size, round(recipe.tokens * self.measured_tokens / self.context))
        return replace(recipe, tokens=tokens)

    def token_budgets(self) -> list[int]:
        """`FRACTIONS` of the context that can be measured, descending."""
        if "tokens" not in self.axes:
            return []
        found = [round(share * self.context) for share in FRACTIONS]
        return [tokens for tokens in found if self.least_tokens <= tokens < self.context]

    def widths(self) -> list[tuple[Bits, Bits]]:
        """Bits of keys and values that are the same for all leaders."""
        return [(keys, values) for keys in _WIDTHS for values in _WIDTHS] if "bits" in self.axes else [(16, 16)]

    def mixed_widths(self, plan: SharingPlan, sensitivity: dict[int, float]) -> list[tuple[Width, Width]]:
        """Bits between those of `widths`: leaders that lose least for the bytes saved have fewer of them.

        Args:
            plan: whose leaders.
            sensitivity: what each leader counts; nothing is mixed where one of them is missing.
        """
        leaders = plan.leaders
        if "bits" not in self.axes or not set(leaders) <= set(sensitivity) or len(leaders) < 2:
            return []
        sizes = [kv_bytes_per_layer(self.kinds[leader], self.dtype) for leader in leaders]
        order = sorted(range(len(leaders)), key=lambda i: (sensitivity[leaders[i]] / sizes[i], i))
        steps = [((a, a), (b, b)) for a, b in _STEPS]
        steps += [((a, a), (a, b)) for a, b in _STEPS] + [((a, a), (b, a)) for a, b in _STEPS]
        steps += [((a, b), (b, b)) for a, b in _STEPS] + [((b, a), (b, b)) for a, b in _STEPS]
        found: list[tuple[Width, Width]] = []
        for high, low in steps:
            for number in range(1, len(leaders)):
                few = set(order[:number])
                pairs = [low if i in few else high for i in range(len(leaders))]
                keys, values = (tuple(pair[side] for pair in pairs) for side in (0, 1))
                found.append((keys[0] if len(set(keys)) == 1 else keys, values[0] if len(set(values)) == 1 else values))
        return found

    def candidates(self, limit: int, sensitivity: dict[int, float] | None = None) -> list[CacheRecipe]:
        """Every plan and every bits with as many tokens as the limit has room for; those that do not fit are left out.

        Args:
            limit: bytes.
            sensitivity: as for `mixed_widths`.
        """
        found = []
        for plan in self.plans:
            for keys, values in [*self.widths(), *self.mixed_widths(plan, sensitivity or {})]:
                recipe = self.filled(plan, keys, values, limit)
                if recipe is not None:
                    found.append(recipe)
        return list(dict.fromkeys(found))

    def filled(self, plan: SharingPlan, keys: Width, values: Width, limit: int) -> CacheRecipe | None:
        """With as many tokens as fit, in steps of a group; None where the smallest number is too large."""
        whole = self.recipe(plan, keys, values)
        if self.bytes(whole) <= limit:
            return whole
        if "tokens" not in self.axes:
            return None
        most = self.context - 1
        for group in _GROUPS:  # budgets with such groups, the largest first
            least = self.least_tokens
            if group != _GROUPS[-1]:
                least = max(least, math.ceil(4 * group * self.context / self.measured_tokens))
            budgets = range(least, most + 1, group)
            fit = bisect_left(
                budgets, True, key=lambda tokens: self.bytes(self.recipe(plan, keys, values, tokens)) > limit
            )
            if fit:
                return self.recipe(plan, keys, values, budgets[fit - 1])
            most = min(most, least - 1)
        return None

    # Bytes

    def bytes(self, recipe: CacheRecipe) -> int:
        """Most bytes that the cache takes while the sequences grow to the context; with `working` a step's, too.

        Never less than `recipe.cache_bytes` there: before a group is packed or evicted the cache is a little larger.
        """
        total = sum(
            (self._lengthwise(recipe, self.kinds[leader], bits) for leader, bits in recipe.bits.items()),
            np.zeros(1, dtype=np.int64),
        )
        return self.batch * int(total.max()) + (
            recipe.working_bytes(self.kinds, self.dtype, self.context, self.batch) if self.working else 0
        )

    def _lengthwise(self, recipe: CacheRecipe, kind: LayerKind, bits: tuple[Bits, Bits]) -> np.ndarray:
        key = (recipe.tokens, recipe.group_size, recipe.rule_name, kind, bits)
        if key not in self._sizes:
            lengths = recipe.largest_lengths(self.context)
            sizes = [recipe.layer_bytes(kind, bits, self.dtype, tokens) for tokens in lengths]
            self._sizes[key] = np.array(sizes, dtype=np.int64)
        return self._sizes[key]


def mean_width(bits: Width) -> float:
    """Bits of a number, mean over the leaders."""
    widths = bits if isinstance(bits, tuple) else (bits,)
    return sum(8 if width == "fp8" else width for width in widths) / len(widths)


def axes_of(recipe: CacheRecipe) -> tuple[str, ...]:
    """The axes on which a recipe saves bytes."""
    used = (not recipe.plan.is_full, recipe.is_quantised, recipe.tokens is not None)
    return tuple(axis for axis, is_used in zip(AXES, used, strict=True) if is_used)

"""The joint planner: bytes spent on depth, bits and tokens together, by measuring recipes and predicting the others.

Each axis is measured alone and some are combined; a model of costs predicts every recipe that the budget has room for;
the most promising are measured and the model is fitted again, until none is expected to be better than the best that
was measured, and a few more were not, or no evaluations are left. What is chosen was always measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from depthkv.compress.costs import JointCosts
from depthkv.compress.losses import Measure
from depthkv.compress.recipe import Bits, CacheRecipe
from depthkv.compress.rules import RULES
from depthkv.compress.space import AXES, Space, axes_of, mean_width
from depthkv.errors import RecipeError
from depthkv.memory import format_bytes
from depthkv.plan import SharingPlan

__all__ = ["Chosen", "MeasuredRecipe", "choose_recipe", "front"]

Advance = Callable[[int], None]

_PLANS_ALONE = 6
"""Plans of a ladder that are measured alone; effects of those between are interpolated."""

_TOLERANCE = 0.001
"""Nats by which a recipe has to be expected better than the best measured one to be measured, too."""

_PATIENCE = 2
"""Times that what looks best is measured although nothing better is expected, since predictions may be too high."""

_AT_ONCE = 2
"""Recipes measured before the costs are fitted again."""


@dataclass(frozen=True, kw_only=True)
class MeasuredRecipe:
    """One recipe and what it costs."""

    recipe: CacheRecipe
    bytes: int
    """As `Space.bytes`."""
    losses: tuple[float, ...]
    """Of each block, nats per token."""
    excess: float
    """Mean over the full cache's loss, nats."""
    error: float
    """Standard error of `excess`, paired by block; NaN with one block."""
    predicted: float | None
    """Excess that was predicted before it was measured; None where nothing was."""
    reason: str
    """Why it was measured: "full", "rule", "alone", "combined", "known", "leader", "predicted" or "mixed"."""

    @property
    def axes(self) -> tuple[str, ...]:
        """On which it saves bytes."""
        return axes_of(self.recipe)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the planner found."""

    space: Space
    """With the rule that was chosen."""
    limit: int
    """Bytes."""
    best: MeasuredRecipe
    """The least loss among those measured that fit."""
    measured: tuple[MeasuredRecipe, ...]
    """In the order in which they were measured, the full cache first."""
    costs: JointCosts
    sensitivity: Mapping[int, float]
    """What each leader of a plan counts, see `_shrunk`; empty where bits are not mixed."""
    settled: bool
    """Whether nothing was expected to be better when the search ended."""

    @property
    def prediction_errors(self) -> list[float]:
        """Measured less predicted excess, of recipes that were predicted first."""
        return [entry.excess - entry.predicted for entry in self.measured if entry.predicted is not None]


def choose_recipe(
    space: Space,
    measure: Measure,
    limit: int,
    *,
    evaluations: int = 24,
    mix: bool = True,
    rule: str | None = None,
    known: Sequence[CacheRecipe] = (),
    sensitivity: Mapping[int, float] | None = None,
    advance: Advance = lambda done: None,
) -> Chosen:
    """The recipe of least loss that the limit has room for.

    Args:
        space: what may be chosen.
        measure: loss of each block under a recipe; asked at most once for each.
        limit: bytes, as `Space.bytes` counts them.
        evaluations: recipes to measure because they are predicted to be good, beyond the full cache, each axis alone,
            some combinations, and leaders.
        mix: offer other bits for some leaders than for others.
        rule: of eviction; None measures each of `RULES` alone and takes the best.
        known: measured for another purpose; what `measure` keeps costs nothing.
        sensitivity: of an earlier search; leaders that are all in it are not measured again.
        advance: called with 1 after each measurement.

    Raises:
        RecipeError: nothing fits.
    """
    search = _Search(space, measure, limit, advance, sensitivity=dict(sensitivity or {}) if mix else {})
    if not space.candidates(limit):
        least = min(space.bytes(recipe) for recipe in _smallest(space))
        raise RecipeError(
            f"expected a budget of at least {format_bytes(least)} for {' and '.join(space.axes)}, "
            f"got {format_bytes(limit)}"
        )
    search.measure([space.recipe()], "full")
    if search.space.token_budgets():
        search.choose_rule(rule)
    search.measure(list(alone(search.space, limit)), "alone")
    search.measure(combined(search.space, limit), "combined")
    search.measure([recipe for recipe in known if recipe.plan in space.plans], "known")
    settled = search.refine(evaluations - evaluations // 3 if mix and "bits" in space.axes else evaluations)
    if mix and "bits" in space.axes and evaluations > 0:
        plan = search.best().recipe.plan
        if not set(plan.leaders) <= set(search.sensitivity):
            search.measure_leaders(plan)
        settled = search.refine(evaluations - search.refined)
    return Chosen(
        space=search.space,
        limit=limit,
        best=search.best(),
        measured=tuple(search.found.values()),
        costs=search.costs(),
        sensitivity=search.sensitivity,
        settled=settled,
    )


@dataclass
class _Search:
    space: Space
    loss: Measure
    limit: int
    advance: Advance
    found: dict[CacheRecipe, MeasuredRecipe] = field(default_factory=dict)
    sensitivity: dict[int, float] = field(default_factory=dict)
    refined: int = 0

    def measure(self, recipes: Sequence[CacheRecipe], reason: str, predicted: Sequence[float] | None = None) -> None:
        """Those that are not known yet."""
        for i, recipe in enumerate(recipes):
            if recipe in self.found:
                continue
            losses = tuple(self.loss(self.space.on_text(recipe)))
            full = next(iter(self.found.values())).losses if self.found else losses
            apart = [a - b for a, b in zip(losses, full, strict=True)]
            self.found[recipe] = MeasuredRecipe(
                recipe=recipe,
                bytes=self.space.bytes(recipe),
                losses=losses,
                excess=statistics.fmean(apart),
                error=_standard_error(apart),
                predicted=None if predicted is None else float(predicted[i]),
                reason=reason,
            )
            self.advance(1)

    def choose_rule(self, rule: str | None) -> None:
        """The one that loses least, alone, at a large and a small number of tokens."""
        if rule is None:
            budgets = self.space.token_budgets()
            tried = sorted({budgets[0 if len(budgets) < 3 else 1], budgets[-1 if len(budgets) < 3 else -2]})
            sums = {}
            for name in RULES:
                recipes = [self.space.replaced(rule=name).recipe(tokens=tokens) for tokens in tried]
                self.measure(recipes, "rule")
                sums[name] = sum(self.found[recipe].excess for recipe in recipes)
            rule = min(sums, key=lambda name: sums[name])
        self.space = self.space.replaced(rule=rule)

    def costs(self) -> JointCosts:
        known = {recipe: entry.excess for recipe, entry in self.found.items()}
        return JointCosts(self.space, known, self.sensitivity, self._errors())

    def _errors(self) -> dict[CacheRecipe, float]:
        """Standard errors of what a recipe adds to its plan, or the measured one nearest in size.

        All shared plans have in common how their adapter fits the blocks, which would hide how axes act together.
        """
        entries = list(self.found.values())
        alone = [entry for entry in entries if entry.axes in ((), ("depth",))]
        found = {}
        for entry in entries:
            plan = entry.recipe.plan
            like = [other for other in alone if other.recipe.plan.is_full == plan.is_full] or alone
            own = min(like, key=lambda other: abs(len(other.recipe.plan.leaders) - len(plan.leaders)))
            found[entry.recipe] = _standard_error([a - b for a, b in zip(entry.losses, own.losses, strict=True)])
        return found

    def best(self) -> MeasuredRecipe:
        """Of those that fit and have only the space's axes."""
        fit = [entry for entry in self.found.values() if entry.bytes <= self.limit and self._belongs(entry.recipe)]
        return min(fit, key=lambda entry: (entry.excess, entry.bytes))

    def _belongs(self, recipe: CacheRecipe) -> bool:
        return set(axes_of(recipe)) <= set(self.space.axes)

    def refine(self, evaluations: int) -> bool:
        """Measure what is predicted best and fit again; whether nothing better was expected at the end."""
        candidates = self.space.candidates(self.limit, self.sensitivity)
        left, misses = evaluations, 0
        while True:
            predicted = self.costs().predict(candidates)
            order = [int(i) for i in np.argsort(predicted, kind="stable") if candidates[i] not in self.found]
            least = self._least()
            if not order:
                return True
            is_better = bool(predicted[order[0]] < least - _TOLERANCE)
            if math.isfinite(least) and ((not is_better and misses >= _PATIENCE) or left <= 0):
                return not is_better
            chosen = self._apart(candidates, order)[: max(1, min(_AT_ONCE, left))]
            reason = "mixed" if self.sensitivity else "predicted"
            self.measure([candidates[i] for i in chosen], reason, [predicted[i] for i in chosen])
            misses = 0 if self._least() < least - _TOLERANCE else misses + 1
            self.refined += len(chosen)
            left -= len(chosen)

    def _least(self) -> float:
        """Excess of the best that fits; inf without one."""
        fits = [e.excess for e in self.found.values() if e.bytes <= self.limit and self._belongs(e.recipe)]
        return min(fits, default=math.inf)

    def _apart(self, candidates: Sequence[CacheRecipe], order: Sequence[int]) -> list[int]:
        """The best, then the best of another plan or of other bits: neighbours tell little more than one of them."""
        first = candidates[order[0]]
        others = [i for i in order[1:] if _kind(candidates[i]) != _kind(first)]
        return [order[0], *others[:1]]

    def measure_leaders(self, plan: SharingPlan) -> None:
        """How much the loss rises above the plan's own with each leader alone in 2 bits."""
        self.measure([self.space.recipe(plan)], "leader")
        own = np.array(self.found[self.space.recipe(plan)].losses)
        rises = []
        for leader in plan.leaders:
            bits: tuple[Bits, ...] = tuple(2 if other == leader else 16 for other in plan.leaders)
            recipe = self.space.recipe(plan, bits, bits)
            self.measure([recipe], "leader")
            rises.append(np.array(self.found[recipe].losses) - own)
        self.sensitivity = dict(zip(plan.leaders, _shrunk(np.array(rises)), strict=True))


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _shrunk(rises: np.ndarray) -> list[float]:
    """What each leader counts, from its rise of the loss on each block, `[leaders, blocks]`: mean rises, drawn to
    their common mean as far as their differences may be chance, and none below a fifth of it; 1 each where all is."""
    means = rises.mean(axis=1)
    blocks, spread = rises.shape[1], float(means.var(ddof=1)) if len(means) > 1 else 0.0
    chance = float(rises.var(axis=1, ddof=1).mean()) / blocks if blocks > 1 else 0.0
    centre, kept = float(means.mean()), max(0.0, 1 - chance / spread) if spread > 0 else 0.0
    if centre <= 0 or kept == 0:
        return [1.0] * len(means)
    return [float(max(centre + kept * (mean - centre), 0.2 * centre)) for mean in means]


def _kind(recipe: CacheRecipe) -> tuple[int, int]:
    """Rough place: number of leaders and mean bits."""
    bits = (mean_width(recipe.key_bits) + mean_width(recipe.value_bits)) / 2
    return len(recipe.plan.leaders) // 2, round(2 * math.log2(bits))


def _smallest(space: Space) -> list[CacheRecipe]:
    tokens = space.least_tokens if "tokens" in space.axes and space.least_tokens < space.context else None
    return [space.recipe(space.plans[-1], keys, values, tokens) for keys, values in space.widths()]


def alone(space: Space, limit: int) -> list[CacheRecipe]:
    """Recipes that save on one axis, as far as the limit may need: the effects of `JointCosts`."""
    found = []
    shared = space.plans[1:]
    # of the plans that fit by themselves, the largest, and the next in case that one is no good
    fitting = [plan for plan in shared if space.bytes(space.recipe(plan)) <= limit]
    useful = [plan for plan in shared if plan not in fitting[2:]]
    if useful:
        steps = np.unique(np.round(np.linspace(0, len(useful) - 1, _PLANS_ALONE)).astype(int))
        found += [space.recipe(useful[i]) for i in steps]
    if "bits" in space.axes:
        found += [space.recipe(None, keys, 16) for keys, values in space.widths() if keys != 16 == values]
        found += [space.recipe(None, 16, values) for keys, values in space.widths() if values != 16 == keys]
    budgets = space.token_budgets()
    for i, tokens in enumerate(budgets):
        if i % 2 == 1 or i == len(budgets) - 1:
            found.append(space.recipe(tokens=tokens))
    return found


def combined(space: Space, limit: int) -> list[CacheRecipe]:
    """Combinations whose excess tells what pairs of axes add, all of moderate sizes."""
    shared = [recipe.plan for recipe in alone(space, limit) if not recipe.plan.is_full]
    plan = shared[len(shared) // 2] if shared else None
    budgets = space.token_budgets()
    tokens = budgets[len(budgets) // 2] if budgets else None
    found: list[CacheRecipe] = []
    if "bits" in space.axes:
        found += [space.recipe(None, 2, 2), space.recipe(None, 4, 4)]
        if plan is not None:
            found += [space.recipe(plan, 2, 16), space.recipe(plan, 16, 2), space.recipe(plan, 4, 4)]
        if tokens is not None:
            found += [space.recipe(None, 2, 16, tokens), space.recipe(None, 16, 2, tokens)]
    if plan is not None and tokens is not None:
        found.append(space.recipe(plan, 16, 16, tokens))
        if "bits" in space.axes:
            found.append(space.recipe(plan, 4, 4, tokens))
    return found


def front(measured: Sequence[MeasuredRecipe]) -> list[MeasuredRecipe]:
    """Those that no other is better than at as few bytes, from the largest to the smallest."""
    found: list[MeasuredRecipe] = []
    for entry in sorted(measured, key=lambda entry: (entry.bytes, entry.excess)):
        if not found or entry.excess < found[-1].excess:
            found.append(entry)
    return found[::-1]


def subsets() -> list[tuple[str, ...]]:
    """Single axes, pairs, all."""
    return [
        tuple(axis for axis in AXES if axis in chosen)
        for chosen in (
            {"depth"},
            {"bits"},
            {"tokens"},
            {"depth", "bits"},
            {"depth", "tokens"},
            {"bits", "tokens"},
            set(AXES),
        )
    ]

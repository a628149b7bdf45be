"""What a recipe's loss will be, from each axis measured alone and from combinations that were measured.

The excess loss over the full cache is the sum of four effects, of the plan, the bits of keys, those of values and the
tokens, and of one term for each pair of them; what remains at measured recipes is handed on to those beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from depthkv.compress.recipe import CacheRecipe
from depthkv.compress.space import Space, Width, mean_width

__all__ = ["JointCosts"]

EFFECTS = ("plan", "keys", "values", "tokens")

PAIRS = tuple(combinations(range(len(EFFECTS)), 2))

_FORMS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "harmonic": lambda a, b: a * b / np.maximum(a + b, 1e-12),
    "root": lambda a, b: np.sqrt(a * b),
    "product": lambda a, b: a * b,
}
"""Of the term of a pair, from its two effects. The one that predicts measured combinations best, each left out in
turn, is taken."""

_NOISE = 0.003
"""Nats by which a measured excess is taken to be off at least, with `_SHARE` of itself and its standard error."""
_SHARE = 0.1
_PRIOR = 1.0
"""Spread of a pair's coefficient before anything is measured."""
_REACH = 1.0
"""Factors of two in bytes over which a residual is handed on."""


class JointCosts:
    """Predicts excess losses, nats per token.

    Args:
        space: that the recipes are from.
        measured: excess over the full cache; recipes with another rule are left out.
        sensitivity: what each leader counts in recipes with mixed bits, above zero; alike without.
        errors: standard errors of the measured ones.
    """

    def __init__(
        self,
        space: Space,
        measured: Mapping[CacheRecipe, float],
        sensitivity: Mapping[int, float] | None = None,
        errors: Mapping[CacheRecipe, float] | None = None,
    ) -> None:
        self._sensitivity = dict(sensitivity or {})
        self._errors = dict(errors or {})
        self._context = space.context
        self.measured = {r: e for r, e in measured.items() if r.tokens is None or r.rule == space.rule}
        """What it knows."""
        self._plan_alone: dict[object, float] = {}
        curves: list[dict[float, float]] = [{} for _ in EFFECTS]
        for recipe, excess in self.measured.items():
            changed = [i for i, neutral in enumerate(self._neutral(recipe)) if not neutral]
            if changed == [0]:
                self._plan_alone[recipe.plan] = excess
                curves[0].setdefault(_plan_place(recipe), excess)
            elif len(changed) == 1 and not _is_mixed(recipe):
                curves[changed[0]][self._place(recipe, changed[0])] = excess
        # the full cache is no end of the first curve: an adapter may be on under every other plan
        self._curves = [_curve(points, anchored=i > 0) for i, points in enumerate(curves)]
        combined = [recipe for recipe in self.measured if sum(not n for n in self._neutral(recipe)) > 1]
        self.form, self.coefficients = self._fit(combined)
        self._known = list(self.measured)
        self._prepare_residuals()

    # Effects

    def _neutral(self, recipe: CacheRecipe) -> tuple[bool, ...]:
        return (recipe.plan.is_full, recipe.key_bits == 16, recipe.value_bits == 16, recipe.tokens is None)

    def _place(self, recipe: CacheRecipe, effect: int) -> float:
        """Factor of two by which the axis shrinks the cache."""
        if effect == 0:
            return _plan_place(recipe)
        if effect == 3:
            return math.log2(self._context / recipe.tokens) if recipe.tokens is not None else 0.0
        return math.log2(16 / mean_width(recipe.key_bits if effect == 1 else recipe.value_bits))

    def effects(self, recipe: CacheRecipe) -> np.ndarray:
        """Excess of the plan, keys, values and tokens alone, `[4]`."""
        neutral = self._neutral(recipe)
        found = np.zeros(len(EFFECTS))
        if not neutral[0]:
            known = self._plan_alone.get(recipe.plan)
            found[0] = self._curves[0](_plan_place(recipe)) if known is None else known
        for effect, bits in ((1, recipe.key_bits), (2, recipe.value_bits)):
            if not neutral[effect]:
                found[effect] = self._bits_effect(recipe, effect, bits)
        if not neutral[3]:
            found[3] = self._curves[3](self._place(recipe, 3))
        return found

    def _bits_effect(self, recipe: CacheRecipe, effect: int, bits: Width) -> float:
        curve = self._curves[effect]
        if not isinstance(bits, tuple):
            return curve(math.log2(16 / mean_width(bits)))
        alone = np.array([self._sensitivity.get(leader, 1.0) for leader in recipe.plan.leaders])
        each = np.array([curve(math.log2(16 / mean_width(width))) for width in bits])
        return float((alone * each).sum() / alone.sum())

    # Interactions

    def _fit(self, combined: Sequence[CacheRecipe]) -> tuple[str, np.ndarray]:
        if not combined:
            return "harmonic", np.zeros(len(PAIRS))
        effects = np.array([self.effects(recipe) for recipe in combined])
        excess = np.array([self.measured[recipe] for recipe in combined])
        rest = excess - effects.sum(axis=1)
        weight = 1 / np.array([self._noise(recipe, _SHARE) for recipe in combined])
        best: tuple[float, str, np.ndarray] | None = None
        for form in _FORMS:
            terms = _terms(effects, form) * weight[:, None]
            # ridge: without a measured combination of a pair its term is zero
            inverse = np.linalg.inv(terms.T @ terms + np.eye(len(PAIRS)) / _PRIOR**2)
            coefficients = inverse @ terms.T @ (rest * weight)
            off = rest * weight - terms @ coefficients
            leverage = np.einsum("ij,jk,ik->i", terms, inverse, terms)
            error = float(np.mean((off / np.maximum(1 - leverage, 1e-6)) ** 2))
            if best is None or error < best[0] * (1 - 1e-9):
                best = (error, form, coefficients)
        assert best is not None
        return best[1], best[2]

    def _noise(self, recipe: CacheRecipe, share: float) -> float:
        """Nats by which a measured excess is taken to be off what the parts can say."""
        error = self._errors.get(recipe, 0.0)
        return math.hypot(_NOISE + share * abs(self.measured[recipe]), error if math.isfinite(error) else 0.0)

    def sum_of_parts(self, recipe: CacheRecipe) -> float:
        """Effects and terms of pairs, without what was measured nearby."""
        effects = self.effects(recipe)
        return float(effects.sum() + (_terms(effects[None], self.form) @ self.coefficients)[0])

    # Residuals

    def _coordinates(self, recipe: CacheRecipe) -> np.ndarray:
        return np.array([self._place(recipe, effect) for effect in range(len(EFFECTS))])

    def _prepare_residuals(self) -> None:
        known = self._known
        self._places = np.array([self._coordinates(recipe) for recipe in known]).reshape(len(known), len(EFFECTS))
        residual = np.array([self.measured[recipe] - self.sum_of_parts(recipe) for recipe in known])
        gram = self._kernel(self._places)
        noise = np.array([self._noise(recipe, 0.3 * _SHARE) for recipe in known])
        # what was measured alone has none
        combined = np.array([sum(not n for n in self._neutral(recipe)) > 1 for recipe in known], dtype=bool)
        scale = max(float((residual[combined] ** 2).mean()) if combined.any() else 0.0, 1e-12)
        self._weights = np.linalg.solve(gram + np.diag(noise**2 / scale + 1e-9), residual) if len(known) else residual

    def _kernel(self, places: np.ndarray) -> np.ndarray:
        apart = np.abs(places[:, None] - self._places[None]).sum(axis=2)
        return np.asarray(np.exp(-apart / _REACH))

    def predict(self, recipes: Sequence[CacheRecipe]) -> np.ndarray:
        """Excess of each, nats per token, `[recipes]`."""
        if not recipes:
            return np.zeros(0)
        effects = np.array([self.effects(recipe) for recipe in recipes])
        parts = effects.sum(axis=1) + _terms(effects, self.form) @ self.coefficients
        places = np.array([self._coordinates(recipe) for recipe in recipes])
        rest = self._kernel(places) @ self._weights if self._known else np.zeros(len(recipes))
        return np.asarray(parts + rest)


def _terms(effects: np.ndarray, form: str) -> np.ndarray:
    """`[recipes, 4]` to `[recipes, pairs]`; an effect below zero is noise, and has no part in a pair."""
    above = np.maximum(effects, 0.0)
    return np.stack([_FORMS[form](above[:, a], above[:, b]) for a, b in PAIRS], axis=1)


def _plan_place(recipe: CacheRecipe) -> float:
    return math.log2(1 / recipe.plan.retention)


def _is_mixed(recipe: CacheRecipe) -> bool:
    return isinstance(recipe.key_bits, tuple) or isinstance(recipe.value_bits, tuple)


def _curve(points: Mapping[float, float], *, anchored: bool) -> Callable[[float], float]:
    """Straight between points, never falling, beyond the last as steep as before it.

    Args:
        points: excess by factors of two.
        anchored: zero at zero.
    """
    places = sorted(points)
    values = [points[place] for place in places]
    weights = [1.0] * len(values)
    if anchored:
        places, values, weights = [0.0, *places], [0.0, *values], [1e6, *weights]
    if not places:
        return lambda place: 0.0
    level = isotonic(values, weights)
    slope = (level[-1] - level[-2]) / (places[-1] - places[-2]) if len(places) > 1 else 0.0

    def value(place: float) -> float:
        return float(np.interp(place, places, level)) + max(0.0, place - places[-1]) * slope

    return value


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest values that never fall: neighbours out of order get their mean (Ayer et al. 1955)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, wa, na), (b, wb, nb) = pools[-2:]
            pools[-2:] = [((a * wa + b * wb) / (wa + wb), wa + wb, na + nb)]
    return [value for value, _, count in pools for _ in range(count)]

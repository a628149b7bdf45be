"""Training with the noise that a recipe's few bits will add to keys and values."""

from __future__ import annotations

from collections.abc import Sequence

from depthkv.architectures import LayerKind
from depthkv.attention import Noise, Pair
from depthkv.compress.quantization import fake_quantize
from depthkv.compress.recipe import ALONG, BITS, CacheRecipe
from depthkv.errors import RecipeError


def recipe_noise(recipe: CacheRecipe, kinds: Sequence[LayerKind]) -> Noise:
    """For `route(model, sampler, noise=...)`: what layers read is rounded to the recipe's bits, with the gradient of
    the identity.

    A leader's keys and values get its own bits. Maps are drawn at random, so any layer may be a source: one that is no
    leader gets the fewest bits of any leader. All tokens are rounded, those at both ends that a recipe spares, too.
    Layers with a window stay as they are. The rounding is a function of what is rounded, so that a layer that is
    recomputed in backward gives the same.

    Raises:
        RecipeError: a recipe that quantises nothing.
        PlanError: a recipe for another number of layers.
    """
    recipe.check(tuple(kinds))
    if not recipe.is_quantised:
        raise RecipeError(f"expected a recipe with fewer than 16 bits to train with, got {recipe.describe()}")
    pairs = recipe.bits.values()
    fewest = (max((keys for keys, _ in pairs), key=BITS.index), max((values for _, values in pairs), key=BITS.index))

    def noise(layer: int, pair: Pair) -> Pair:
        if kinds[layer].window is not None:
            return pair
        keys, values = (
            part if bits == 16 else fake_quantize(part, bits, recipe.group_size, along)
            for part, bits, along in zip(pair, recipe.bits.get(layer, fewest), ALONG, strict=True)
        )
        return keys, values

    return noise

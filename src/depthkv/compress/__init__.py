"""Bits and tokens beside depth: recipes, packed and evicting caches."""

from depthkv.compress.noise import recipe_noise
from depthkv.compress.recipe import CacheRecipe
from depthkv.compress.rules import RULES, Rule, Stored

__all__ = ["RULES", "CacheRecipe", "Rule", "Stored", "recipe_noise"]

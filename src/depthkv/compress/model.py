"""`share(model, recipe)`: a plan whose leaders keep their caches in few bits and with few tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from depthkv import attention
from depthkv.architectures import text_config
from depthkv.attention import Context, LayerCache
from depthkv.cache import fit_cache
from depthkv.checkpointing import is_checkpointed
from depthkv.compress.cache import CompressedLayer
from depthkv.compress.observe import run_observed
from depthkv.compress.recipe import CacheRecipe
from depthkv.decoder import Decoder
from depthkv.errors import CacheMismatchError, RecipeError
from depthkv.patches import wants_cache
from depthkv.sharing import SharedModel

__all__ = ["CompressedModel"]


class CompressedModel(SharedModel):
    """Handle that `share` returns for a recipe."""

    def __init__(self, decoder: Decoder, recipe: CacheRecipe, switch: Callable[[bool], None] | None = None) -> None:
        self.recipe = recipe
        """The recipe in force."""
        kinds = recipe.check(decoder.kinds)
        self._layers = frozenset(recipe.compressed(kinds))
        """Leaders whose caches are compressed."""
        super().__init__(decoder, recipe.plan, switch)

    def _involved(self) -> set[int]:
        sources = self.plan.kv_source_layers
        return super()._involved() | {layer for layer, source in enumerate(sources) if source in self._layers}

    def _attend(self) -> Callable[..., Callable[..., Any]]:
        return partial(attention_forward, text_config(self._decoder.config).num_attention_heads)

    def _fit(self, cache: Cache) -> None:
        _fit_cache(cache, self.recipe, self._layers)

    def _cache_for(self, arguments: dict[str, Any]) -> dict[str, Any]:
        # the model would make one inside, too late to be fitted
        if not wants_cache(arguments, self._decoder.config):
            return {}
        if is_checkpointed(self._decoder):  # a layer that is recomputed would fill it twice
            return {"use_cache": False, "past_key_values": None}
        cache = DynamicCache(config=self._decoder.config)  # type: ignore[no-untyped-call, unused-ignore]
        return {"use_cache": True, "past_key_values": cache}

    def _last_positions(self, needed: int | None, cache: Cache | None, arguments: dict[str, Any]) -> int | None:
        # layers above the last leader have a say in what is evicted, so they run for the queries that are asked
        if needed is None or cache is None or not self.recipe.eviction.needs_attention:
            return needed
        inputs = arguments.get("input_ids")
        tokens = (arguments["inputs_embeds"] if inputs is None else inputs).shape[1]
        observed = any(isinstance(layer, CompressedLayer) and layer.wants_attention(tokens) for layer in cache.layers)
        return max(needed, self.recipe.recent) if observed else needed

    def _refuse_budget(self) -> None:
        raise RecipeError("expected a plan with kv_budget, got a recipe, which says itself what is kept")


def _fit_cache(cache: Cache, recipe: CacheRecipe, layers: frozenset[int]) -> None:
    """Put place-holders for followers, and compressed layers for those leaders among `layers`, into a cache.

    Raises:
        CacheMismatchError: the cache holds tokens and was made under another recipe or plan.
    """
    if getattr(cache, "_depthkv_recipe", None) is recipe:
        return
    if getattr(cache, "offloading", False):
        raise CacheMismatchError("expected a cache that stays on its device under a recipe, got an offloaded one")
    fit_cache(cache, recipe.plan)
    for leader in recipe.plan.leaders:
        present = cache.layers[leader]
        if leader not in layers:
            if isinstance(present, CompressedLayer):
                raise CacheMismatchError(
                    f"expected a cache in which layer {leader} is kept as it is, got one made under another recipe"
                )
            continue
        if isinstance(present, CompressedLayer) and present.recipe == recipe:
            continue
        if int(present.get_seq_length()) > 0:
            raise CacheMismatchError(
                f"expected an empty cache or one made under the same recipe, got {int(present.get_seq_length())} "
                f"tokens in layer {leader}"
            )
        if type(present) not in (DynamicLayer, CompressedLayer):
            raise CacheMismatchError(
                f"expected transformers' dynamic cache under a recipe, got a {type(present).__name__} in layer {leader}"
            )
        cache.layers[leader] = CompressedLayer(recipe, leader)
    cache._depthkv_recipe = recipe


def attention_forward(
    num_heads: int, context: Context, layer: int, cache_argument: str, original: Callable[..., Any]
) -> Callable[..., Any]:
    """The attention module's forward, as `depthkv.attention.attention_forward`, on what a recipe kept."""
    plain = attention.attention_forward(context, layer, cache_argument, original)

    def forward(*args: Any, **kwargs: Any) -> Any:
        step, cache = context.current(), kwargs.get(cache_argument)
        source = step.sources[layer]
        entry = None if cache is None else cache.layers[source]
        if not isinstance(entry, CompressedLayer):
            return plain(*args, **kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None and getattr(mask, "ndim", None) != 4:
            raise RecipeError(
                'expected attn_implementation "sdpa" or "eager" under a recipe, got one that makes its own mask'
            )
        if source == layer:
            hidden = args[0] if args else kwargs["hidden_states"]
            step.observed[layer] = entry.wants_attention(hidden.shape[1])
            entry.note_padding(mask, hidden.shape[0])
        kwargs["attention_mask"] = entry.mask(mask, num_heads)
        entry.is_read = True
        stand_in = _Reading(step, layer, cache)
        kwargs[cache_argument] = stand_in
        if step.observed[source]:
            output, weights = run_observed(
                lambda: original(*args, **kwargs), lambda: stand_in.keys, entry.recipe.recent
            )
            entry.observe(weights)
        else:
            output = original(*args, **kwargs)
        if step.last_reader.get(source, source) == layer:
            entry.compress()
        return output

    return forward


class _Reading(LayerCache):
    """Remembers the keys that were read."""

    keys: Any = None

    def update(self, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        pair = super().update(keys, values, layer_idx, *args, **kwargs)
        self.keys = pair[0]
        return pair

"""`share(model, recipe)`: a plan whose leaders keep their caches in few bits and with few tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import Cache, DynamicCache

from depthkv import attention
from depthkv.architectures import text_config
from depthkv.attention import Context, LayerCache
from depthkv.checkpointing import is_checkpointed
from depthkv.compress.cache import CompressedLayer, fit_recipe_cache
from depthkv.compress.observe import run_observed
from depthkv.compress.recipe import CacheRecipe
from depthkv.decoder import Decoder
from depthkv.errors import RecipeError
from depthkv.patches import wants_cache
from depthkv.sharing import SharedModel


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
        fit_recipe_cache(cache, self.recipe, self._layers)

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

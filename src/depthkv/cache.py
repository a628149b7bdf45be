"""Place-holders for followers in transformers' caches, so that a follower never holds a byte."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from depthkv.errors import CacheMismatchError
from depthkv.plan import SharingPlan

try:  # transformers from 5.2x on skips its own dummy layers in mask creation and offloading
    from transformers.cache_utils import DummyLayer as _PlaceHolder
except ImportError:  # 5.17: any layer object will do
    _PlaceHolder = CacheLayerMixin


class FollowerLayer(_PlaceHolder):
    """Stands in a `Cache` where a follower's layer would be. Holds nothing; every cache operation passes over it."""

    supports_early_init = False
    is_compileable = True
    is_croppable = True

    def __init__(self, is_sliding: bool = False) -> None:
        self.keys = self.values = None
        self.is_initialized = True
        # transformers 5.17 looks for "the first layer that does not slide" by this flag: it has to stay a leader
        self.is_sliding = is_sliding

    def __repr__(self) -> str:
        return "FollowerLayer"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise CacheMismatchError(
            "expected a cache in which this layer has its own keys and values, got one that was filled under a "
            "sharing plan in which the layer is a follower"
        )

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def offload(self) -> None: ...
    def prefetch(self) -> None: ...
    def reset(self) -> None: ...
    def crop(self, tokens_to_remove: int) -> None: ...
    def reorder_cache(self, beam_idx: torch.Tensor) -> None: ...
    def batch_repeat_interleave(self, repeats: int) -> None: ...
    def batch_select_indices(self, indices: torch.Tensor) -> None: ...


def fit_cache(cache: Cache, plan: SharingPlan) -> None:
    """Put place-holders where `plan` has followers, in the cache that `generate()` or the user made.

    Raises:
        CacheMismatchError: a follower's layer already holds tokens, or a leader's is a place-holder.
    """
    if getattr(cache, "_depthkv_plan", None) is plan:
        return
    layers = cache.layers
    if getattr(cache, "layer_class_to_replicate", None) is not None:
        while len(layers) < plan.num_layers:
            layers.append(cache.layer_class_to_replicate())
    if len(layers) != plan.num_layers:
        raise CacheMismatchError(f"expected a cache of {plan.num_layers} layers, got one of {len(layers)}")
    for i in plan.leaders:
        if isinstance(layers[i], FollowerLayer):
            raise CacheMismatchError(
                f"expected a cache in which layer {i} keeps its KV, got one made under another plan"
            )
    for i in plan.followers:
        # `crop` and `reset` leave 0 tokens behind, and so does a static cache's early initialisation
        if not isinstance(layers[i], FollowerLayer) and int(layers[i].get_seq_length()) > 0:
            tokens = int(layers[i].get_seq_length())
            raise CacheMismatchError(
                f"expected an empty cache or one made under the same plan, got {tokens} tokens in layer {i}, a follower"
            )
    for i in plan.followers:
        if not isinstance(layers[i], FollowerLayer):
            layers[i] = FollowerLayer(is_sliding=getattr(layers[i], "is_sliding", False))
    cache._depthkv_plan = plan

"""One cache of keys and values for a backbone and all side networks on it, because beam search reorders only the first cache it knows.

The backbone's layers come first, then each side network's, one after another. Where they begin goes with the call: a side network sees
its own layers alone, counted from 0, so that the same one may stand in any number of models.
"""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from lst_scale.backbone.families import family_of
from lst_scale.backbone.spec import BackboneSpec


def new_cache() -> EncoderDecoderCache:
    """Return a cache that is empty and grows."""
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def cache_beside(spec: BackboneSpec, side_layers: int) -> DynamicCache:
    """Return an empty cache for a decoder-only model, whose layers may slide, and for side layers after them."""
    cache = DynamicCache(config=family_of(spec.model_type, "this backbone").generation_config(spec, side_layers=side_layers))
    cache.layers.extend(side_cache(side_layers).layers)
    return cache


def side_cache(side_layers: int) -> DynamicCache:
    """Return an empty cache for side layers alone."""
    cache = DynamicCache()
    cache.layers.extend(DynamicLayer() for _ in range(side_layers))
    return cache


def part_of(cache: Any, first: int, count: int) -> Any:
    """Return `count` layers of a cache from number `first` on as a cache of their own: the layers are the same objects."""
    if cache is None or isinstance(cache, DynamicCache):
        return None if cache is None else _part_of(cache, first, count)
    return EncoderDecoderCache(_part_of(cache.self_attention_cache, first, count), _part_of(cache.cross_attention_cache, first, count))


def _part_of(cache: DynamicCache, first: int, count: int) -> DynamicCache:
    cache.layers.extend(DynamicLayer() for _ in range(first + count - len(cache.layers)))
    part = DynamicCache()
    part.layers = cache.layers[first : first + count]
    return part

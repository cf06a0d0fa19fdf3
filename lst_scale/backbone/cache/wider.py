"""Caches that hold more than a run reads (further blocks, the final state, sources): whatever they remember serves it too, and is not
written again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lst_scale.backbone.cache.key import KEY, CacheKey, read_key
from lst_scale.backbone.cache.segment import Digests
from lst_scale.backbone.cache.store import TapCache
from lst_scale.errors import BackboneError


class WiderCache:
    """What a narrower key's run sees of another's payloads. A payload is read whole, for its checksum is of the whole."""

    def __init__(self, root: Path, wide: CacheKey, narrow: CacheKey) -> None:
        self._cache = TapCache(root, wide)
        self._places = [wide.layers.index(layer) for layer in narrow.layers]
        self._narrow_final = narrow.decoder_final

    @property
    def damaged(self) -> list[str]:
        return self._cache.damaged

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._cache

    def __len__(self) -> int:
        return len(self._cache)

    def has_each(self, digests: Digests) -> NDArray[np.bool_]:
        """Return which of many digests are here."""
        return self._cache.has_each(digests)

    def refresh(self) -> None:
        self._cache.refresh()

    def close(self) -> None:
        self._cache.close()

    def read_into(self, digest: bytes, into: Sequence[Tensor], of_target: bool = False) -> bool:
        """Fill tensors (L, D) with the blocks that are asked for, and after them the final state; see `TapCache.read_into`."""
        count = len(self._cache.key.layers)
        there = count + (self._cache.key.decoder_final if of_target else 0)
        whole = [torch.empty_like(into[0]) for _ in range(there)]
        final = (count,) if of_target and self._narrow_final else ()
        for place, tensor in zip((*self._places, *final), into, strict=True):
            whole[place] = tensor
        return self._cache.read_into(digest, whole, of_target)


def wider_caches(root: Path, narrow: CacheKey) -> list[WiderCache]:
    """Return the caches under `root` that differ from `narrow` by more states alone and hold something, the smallest first."""
    found = sorted(_keys_with_more(root, narrow), key=lambda key: (len(key.layers), key.decoder_final, key.folder))
    return [cache for key in found if len(cache := WiderCache(root, key, narrow))]


def _keys_with_more(root: Path, narrow: CacheKey) -> Iterator[CacheKey]:
    for mark in root.glob(f"*/{KEY}"):
        try:
            key = read_key(mark.parent)
        except BackboneError:
            continue  # somebody else's
        more = replace(key, layers=narrow.layers, decoder_final=narrow.decoder_final, target_only=narrow.target_only)
        if key != narrow and more == narrow and _holds(key, narrow):
            yield key


def _holds(key: CacheKey, narrow: CacheKey) -> bool:
    """Whether a cache has all states that a run reads."""
    return (
        set(key.layers) >= set(narrow.layers) and key.decoder_final >= narrow.decoder_final and (narrow.target_only or not key.target_only)
    )

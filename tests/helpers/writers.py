"""A program for ranks: write taps until somebody kills it."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from lst_scale.backbone.cache.key import CacheKey
from lst_scale.backbone.cache.store import TapCache
from lst_scale.inputs.keys import source_digest

KEY = CacheKey(fingerprint="f", precision="fp32", layers=(0, 2), decoder_final=False, d_model=8, dtype="fp32")


def states(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 8, generator=draw) * 5 for _ in range(2)]


def digest_of(row: int) -> bytes:
    return source_digest(torch.tensor([row]))


def write_for_ever(arguments: list[str]) -> None:
    """Write row after row; arguments: the cache's root, the first row's number."""
    root, first = arguments
    cache = TapCache(Path(root), KEY)
    for row in itertools.count(int(first)):
        cache.write(digest_of(row), states(20, row))

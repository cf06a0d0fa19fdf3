"""A caching backbone and batches for it."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.inputs import inputs_of
from lst_scale.backbone.cache.backbone import CachingBackbone
from lst_scale.backbone.cache.load import load_caching
from lst_scale.backbone.taps import Inputs, TapRequest
from lst_scale.recipe.backbone import BackboneRecipe
from lst_scale.recipe.schema import CacheRecipe
from lst_scale.system import distributed

REQUEST = TapRequest(layers=(0, 2), target_final=True)


def batches(count: int) -> list[Inputs]:
    """Return batches of three rows of 6, 4 and 9 source and 4, 2 and 3 target tokens."""
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(count):
        ids, targets = torch.randint(5, 4000, (3, 9), generator=draw), torch.randint(5, 4000, (3, 4), generator=draw)
        mask = (torch.arange(9)[None] < torch.tensor([[6], [4], [9]])).long()
        targets[1, 2:] = targets[2, 3:] = targets[:, 0] = 0
        found.append(inputs_of(ids * mask, mask, targets, (4, 2, 3)))
    return found


def opened(checkpoint: Path, folder: Path, dtype: str) -> CachingBackbone:
    recipe = BackboneRecipe(checkpoint=str(checkpoint), precision="fp32")
    cache = CacheRecipe.model_validate({"enabled": True, "dtype": dtype, "folder": str(folder)})
    return load_caching(recipe, cache, distributed.connect(), lambda spec: REQUEST, lambda live: None)

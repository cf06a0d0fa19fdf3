"""A program for ranks: load one checkpoint under several placements in one world and compare the taps with the replicated backbone's."""

from __future__ import annotations

import json

import torch
import yaml

from helpers.inputs import inputs_of
from lst_scale.backbone.placement.load import load_placed
from lst_scale.backbone.taps import TapRequest
from lst_scale.recipe.backbone import BackboneRecipe
from lst_scale.system import distributed

LAYERS = (0, 1, 2)


def rows(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unequal on every rank, in number and in length, as on the last step of an epoch."""
    generator = torch.Generator().manual_seed(rank)
    count, source, target = 1 + rank % 3, 6 + 3 * rank, 3 + rank
    ids = torch.randint(3, 4000, (count, source), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, source // 2 :] = 0
    return ids * mask, mask, torch.randint(3, 4000, (count, target), generator=generator)


def compare(arguments: list[str]) -> None:
    """Print one JSON line an item; arguments: checkpoint, folder for block files, then PLACEMENT:PRECISION with PLACEMENT in YAML..."""
    checkpoint, folder, *items = arguments
    world = distributed.connect()
    request = TapRequest(layers=LAYERS, target_final=True)
    inputs = inputs_of(*rows(world.rank))
    for item in items:
        text, precision = item.rsplit(":", 1)
        placement = yaml.safe_load(text)
        if isinstance(placement, dict) and placement.get("source") == "disk":
            placement["folder"] = folder
        make = lambda placed, p=precision: load_placed(  # noqa: E731
            BackboneRecipe.model_validate({"checkpoint": checkpoint, "precision": p, "placement": placed}), world
        )
        expected = make("replicated")
        found = make(placement)
        worst = 0.0
        for _ in range(2):  # the second pass begins with blocks that the first left behind
            a, b = expected(inputs, request), found(inputs, request)
            pairs = list(zip(a.source.hidden + a.target.hidden, b.source.hidden + b.target.hidden, strict=True))
            pairs += [(a.source.embedding, b.source.embedding), (a.final_BTD, b.final_BTD)]
            masks = [inputs.source_mask_BS.bool()] * len(LAYERS) + [torch.ones_like(inputs.target_BT).bool()] * len(LAYERS)
            masks += [inputs.source_mask_BS.bool(), torch.ones_like(inputs.target_BT).bool()]
            for (x, y), mask in zip(pairs, masks, strict=True):
                x, y = x.float(), y.float()
                assert x.shape == y.shape and not y.requires_grad
                worst = max(worst, float((x - y)[mask].norm() / x[mask].norm()))
        everyone = distributed.gather((worst, found.weight_bytes(), expected.weight_bytes()))
        if world.is_main:
            print(json.dumps({"item": item, "world": world.size, "ranks": everyone}), flush=True)
    distributed.disconnect()

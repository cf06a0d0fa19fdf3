"""Programs for ranks: load checkpoints under several placements in one world and compare what they give with the replicated backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from helpers.inputs import inputs_of
from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone.placement.load import load_placed
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.backbone.taps import TapRequest
from lst_scale.recipe.backbone import BackboneRecipe
from lst_scale.system import distributed
from lst_scale.system.distributed import World

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
    """Print one JSON line an item; arguments: folder for block files, then @CHECKPOINT and its PLACEMENT:PRECISION in YAML... for each."""
    folder, *items = arguments
    world = distributed.connect()
    checkpoint = ""
    for item in items:
        if item.startswith("@"):
            checkpoint = item[1:]
            continue
        text, precision = item.rsplit(":", 1)
        placement = yaml.safe_load(text)
        if isinstance(placement, dict) and placement.get("source") == "disk":
            placement["folder"] = folder
        expected, found = (_load(checkpoint, precision, each, world) for each in ("replicated", placement))
        everyone = distributed.gather((_worst(expected, found, world.rank), found.weight_bytes(), expected.weight_bytes()))
        if world.is_main:
            print(json.dumps({"model": Path(checkpoint).name, "item": item, "ranks": everyone}), flush=True)
    distributed.disconnect()


def _load(checkpoint: str, precision: str, placement: Any, world: World) -> LocalBackbone:
    values = {"checkpoint": checkpoint, "precision": precision, "placement": placement}
    return load_placed(BackboneRecipe.model_validate(values), world)


def _worst(expected: LocalBackbone, found: LocalBackbone, rank: int) -> float:
    """Return the largest relative error of a tap over the tokens of this rank's rows."""
    request, inputs = TapRequest(layers=LAYERS, target_final=True), inputs_of(*rows(rank))
    of_source, of_target = inputs.source_mask_BS.bool(), torch.ones_like(inputs.target_BT).bool()
    masks = [of_source] * len(LAYERS) + [of_target] * len(LAYERS) + [of_source, of_target]
    worst = 0.0
    for _ in range(2):  # the second pass begins with blocks that the first left behind
        a, b = expected(inputs, request), found(inputs, request)
        pairs = list(zip(a.source.hidden + a.target.hidden, b.source.hidden + b.target.hidden, strict=True))
        pairs += [(a.source.embedding, b.source.embedding), (a.final_BTD, b.final_BTD)]
        for (x, y), mask in zip(pairs, masks, strict=True):
            x, y = x.float(), y.float()
            assert x.shape == y.shape and not y.requires_grad
            worst = max(worst, float((x - y)[mask].norm() / x[mask].norm()))
    return worst


def generate(arguments: list[str]) -> None:
    """Print one JSON line a placement: whether each rank answers as beside a whole backbone; arguments: checkpoint, PLACEMENT in YAML...

    Ranks have rows of their own, and end at other lengths: the token that ends an answer is one that each rank says early, or never.
    """
    checkpoint, *placements = arguments
    world = distributed.connect()
    ids, mask, _ = rows(world.rank)
    config = LadderConfig(reduction_factor=4, side_layers=(1, 3), start_as_backbone=True)
    whole = _load(checkpoint, "fp32", "replicated", world)
    side = LadderModel(whole, config).eval()
    ends = side.generate(ids, mask, max_new_tokens=8)[0, ids.shape[1] + 2 * world.rank].item()
    options = {"max_new_tokens": 8, "eos_token_id": ends}
    expected = side.generate(ids, mask, **options)
    for text in placements:
        backbone = _load(checkpoint, "fp32", yaml.safe_load(text), world)
        shared = backbone.replica.count < world.size  # ranks of a group bring the same rows
        ladder = LadderModel(backbone, side.side).eval()
        if shared:
            ids, mask, expected, ends = distributed.gather((ids, mask, expected, ends))[0]
            options["eos_token_id"] = ends
        found = ladder.generate(ids, mask, **options)
        everyone = distributed.gather((bool(torch.equal(found, expected)), found.shape[1] - ids.shape[1]))
        if world.is_main:
            print(json.dumps({"placement": text, "ranks": everyone}), flush=True)
    distributed.disconnect()

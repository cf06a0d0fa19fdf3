"""recipe.backbone -> a frozen backbone, held as `placement` says. Nothing downstream knows which.

    replicated         one copy a rank
    tensor_parallel    every matrix divided over a group of ranks; the group runs the rows of all its ranks
    zero3              every block divided over all ranks, gathered while it runs
    streamed           blocks in host memory or on disk, two on the device

Ends (embedding, head, final norms) are whole on every rank. No rank ever holds more than one whole block beside its own share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lst_scale.backbone.families import BlockRef
from lst_scale.backbone.placement import grouped, streamed
from lst_scale.backbone.placement.meta import MetaBackbone, finish, open_alone, open_together
from lst_scale.backbone.placement.prefetch import Prefetcher, empty
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.backbone.placement.zero3 import PartitionedSource
from lst_scale.backbone.taps import BackboneIdentity, Replica
from lst_scale.backbone.weights import assemble
from lst_scale.recipe.backbone import BackboneRecipe, Streamed, TensorParallel, Zero3
from lst_scale.system import distributed
from lst_scale.system.assets import cache_folder
from lst_scale.system.distributed import World


def load_placed(recipe: BackboneRecipe, world: World) -> LocalBackbone:
    """Load the backbone that a recipe asks for. All ranks must call it.

    Raises:
        BackboneError: the checkpoint can't be used, on any rank.
        ArgumentError: the placement does not fit the number of ranks.
    """
    placement = recipe.placement
    size = grouped.group_size(placement, world) if isinstance(placement, TensorParallel) else world.size
    opened = open_together(recipe, world)
    if isinstance(placement, TensorParallel):
        return grouped.load_grouped(opened, placement, size, world)
    if isinstance(placement, Zero3):
        return _zero3(opened, world)
    if isinstance(placement, Streamed):
        return _streamed(opened, placement, world)
    return distributed.agree(world, lambda: _replicated(opened, world))


def load_alone(recipe: BackboneRecipe, world: World) -> LocalBackbone:
    """Load a replicated or streamed backbone without a word to other ranks."""
    opened = open_alone(recipe)
    if isinstance(recipe.placement, Streamed):
        return _streamed(opened, recipe.placement, world)
    return _replicated(opened, world)


def _replicated(opened: MetaBackbone, world: World) -> LocalBackbone:
    checkpoint, identity, model = opened.checkpoint, opened.identity, opened.model
    for ref in assemble.block_refs(checkpoint):
        assemble.fill_block(ref.get(model), ref.path, checkpoint, identity.precision, world.device)
    return finish(LocalBackbone, opened, world, replica=Replica(index=world.rank, count=world.size))


def _zero3(opened: MetaBackbone, world: World) -> LocalBackbone:
    checkpoint, identity, model = opened.checkpoint, opened.identity, opened.model
    source = PartitionedSource(distributed.consecutive_group(world, world.size), world.device)
    blocks = []

    def load() -> None:
        for ref in assemble.block_refs(checkpoint):
            block = ref.get(model)
            assemble.fill_block(block, ref.path, checkpoint, identity.precision, world.device)
            source.add(block)
            empty(block)
            blocks.append(block)

    distributed.agree(world, load)
    conveyor = Prefetcher(blocks, source, world.device)
    return finish(LocalBackbone, opened, world, replica=Replica(index=world.rank, count=world.size, in_step=True), conveyor=conveyor)


def _streamed(opened: MetaBackbone, placement: Streamed, world: World) -> LocalBackbone:
    checkpoint, identity, model = opened.checkpoint, opened.identity, opened.model
    refs = assemble.block_refs(checkpoint)
    blocks = [ref.get(model) for ref in refs]

    def build(index: int) -> nn.Module:
        assemble.fill_block(blocks[index], refs[index].path, checkpoint, identity.precision, world.device)
        return blocks[index]

    if placement.source == "host":
        source: Any = distributed.agree(world, lambda: _host_source(blocks, build, world.device))
    else:
        source = _disk_source(placement, identity, refs, blocks, build, world)
    return finish(
        LocalBackbone, opened, world, replica=Replica(index=world.rank, count=world.size), conveyor=Prefetcher(blocks, source, world.device)
    )


def _host_source(blocks: list[nn.Module], build: Callable[[int], nn.Module], device: torch.device) -> streamed.HostSource:
    source = streamed.HostSource(device)
    for index in range(len(blocks)):
        block = build(index)
        source.add(block)
        empty(block)
    return source


def _disk_source(
    placement: Streamed,
    identity: BackboneIdentity,
    refs: Sequence[BlockRef],
    blocks: list[nn.Module],
    build: Callable[[int], nn.Module],
    world: World,
) -> streamed.DiskSource:
    """Open the block files, written first where this machine has none for these weights in this precision."""
    folder = blocks_folder(placement) / f"{identity.fingerprint[:16]}-{identity.precision}"

    def build_and_forget_last(index: int) -> nn.Module:
        if index:
            empty(blocks[index - 1])
        return build(index)

    distributed.agree(world, lambda: streamed.write_missing(folder, [ref.path for ref in refs], build_and_forget_last))
    for block in blocks:
        assemble.make_room(block, identity.precision)
    return distributed.agree(world, lambda: streamed.DiskSource(folder, world.device))


def blocks_folder(placement: Streamed) -> Path:
    """Return where block files live on this machine."""
    if placement.folder is not None:
        return Path(placement.folder).expanduser()
    return cache_folder("blocks")

"""A backbone whose matrices are divided over a group of ranks, which runs the rows of all of them (placement `tensor_parallel`).

`tensor_parallel.py` divides the blocks; here are the groups, and the way from a rank's rows to its taps.
"""

from __future__ import annotations

import torch

from lst_scale.backbone.placement import tensor_parallel
from lst_scale.backbone.placement.meta import MetaBackbone, finish
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.backbone.taps import Inputs, Replica, StackTaps, TapRequest, Taps
from lst_scale.backbone.weights import assemble
from lst_scale.backbone.weights import precision as precisions
from lst_scale.errors import ArgumentError, BackboneError
from lst_scale.recipe.backbone import TensorParallel
from lst_scale.system import distributed
from lst_scale.system.assets import load_ds_config
from lst_scale.system.distributed import Group, World


class GroupedBackbone(LocalBackbone):
    """A backbone whose matrices are divided over a group. The group gathers token ids, runs all rows, and each rank keeps its own."""

    group: Group

    def move(self, device: torch.device) -> None:
        raise BackboneError(f"this backbone is divided over ranks, each on its own device, and can't be moved to {device}")

    def __call__(self, inputs: Inputs, request: TapRequest) -> Taps:
        S, T = inputs.source_BS.shape[1], inputs.target_BT.shape[1]
        pad = self.spec.pad_token_id
        # On the left: where a target sees a window of tokens alone, nothing comes between it and its source.
        source, own = self.group.gather_rows(inputs.source_BS, pad, on_left=True)
        mask, _ = self.group.gather_rows(inputs.source_mask_BS, 0, on_left=True)
        target, _ = self.group.gather_rows(inputs.target_BT, pad)
        taps = super().__call__(Inputs(source_BS=source, source_mask_BS=mask, target_BT=target), request)
        return Taps(
            source=_part(taps.source, (own, slice(source.shape[1] - S, None))),
            target=_part(taps.target, (own, slice(T))),
            source_mask_BS=inputs.source_mask_BS,
            final_BTD=None if taps.final_BTD is None else taps.final_BTD[own, :T].clone(),
        )


def load_grouped(opened: MetaBackbone, placement: TensorParallel, size: int, world: World) -> LocalBackbone:
    """Fill the blocks, divide each over groups of `size` ranks, and return the backbone. All ranks must call it."""
    checkpoint, identity, model = opened.checkpoint, opened.identity, opened.model
    options = load_ds_config(placement.deepspeed)
    group = distributed.consecutive_group(world, size)
    # Blocks are divided in the arithmetic's precision and quantized afterwards, each rank its own shards.
    dtype = assemble.compute_dtype(identity.precision)
    whole = "fp32" if identity.precision == "fp32" else "bf16"
    for ref in assemble.block_refs(checkpoint):
        block = ref.get(model)
        assemble.fill_block(block, ref.path, checkpoint, whole, world.device)
        if size > 1:
            config, summed = checkpoint.family.config_of_blocks(checkpoint.config), checkpoint.family.summed(ref)
            block = tensor_parallel.shard_block(block, config, group, options, dtype, summed)
        if identity.precision in precisions.QUANTIZED:
            tensor_parallel.quantize_shards(block, group, identity.precision)
        ref.put(model, block)
    backbone = finish(GroupedBackbone, opened, world, replica=Replica(index=world.rank // size, count=world.size // size))
    backbone.group = group
    return backbone


def group_size(placement: TensorParallel, world: World) -> int:
    """Return how many ranks share one backbone.

    Raises:
        ArgumentError: that does not divide the number of ranks, or a group would span machines.
    """
    size = placement.size or world.size
    if world.size % size:
        raise distributed.same_everywhere(
            ArgumentError(
                f"backbone.placement.size {size} must divide the number of ranks, {world.size}: start {size} ranks, or a multiple of it"
            )
        )
    names = distributed.nodes(world)
    spanning = [first for first in range(0, world.size, size) if len(set(names[first : first + size])) > 1]
    if spanning and not placement.across_nodes:
        raise distributed.same_everywhere(
            ArgumentError(
                f"ranks {spanning[0]} to {spanning[0] + size - 1} would share one backbone but run on different machines: lower "
                "backbone.placement.size to a divisor of the ranks a machine has, or write backbone.placement.across_nodes=true"
            )
        )
    return size


def _part(taps: StackTaps, own: tuple[slice, slice]) -> StackTaps:
    # Copies: a view would keep the other ranks' rows alive until backward.
    hidden = tuple(tap[own].clone() for tap in taps.hidden)
    return StackTaps(layers=taps.layers, embedding=taps.embedding[own].clone(), hidden=hidden)

"""recipe.backbone -> a frozen backbone, held as `placement` says. Nothing downstream knows which.

    replicated         one copy a rank
    tensor_parallel    every matrix divided over a group of ranks; the group runs the rows of all its ranks
    zero3              every block divided over all ranks, gathered while it runs
    streamed           blocks in host memory or on disk, two on the device

Ends (embedding, head, final norms) are whole on every rank. No rank ever holds more than one whole block beside its own share.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lst_scale import distributed
from lst_scale.assets import cache_folder, load_ds_config
from lst_scale.backbone import assemble, streamed, tensor_parallel
from lst_scale.backbone import precision as precisions
from lst_scale.backbone.caching import CachingBackbone
from lst_scale.backbone.checkpoint import Checkpoint, open_checkpoint
from lst_scale.backbone.conveyor import Conveyor, empty
from lst_scale.backbone.local import LocalBackbone, head_of
from lst_scale.backbone.partitioned import PartitionedSource
from lst_scale.backbone.tap_cache import CacheKey, TapCache
from lst_scale.backbone.taps import BackboneIdentity, BackboneSpec, Replica, StackTaps, TapRequest, Taps
from lst_scale.distributed import Group, World
from lst_scale.errors import ArgumentError, BackboneError
from lst_scale.recipe import BackboneRecipe, CacheRecipe, Streamed, TensorParallel, Zero3

Opened = tuple[Checkpoint, BackboneIdentity, Any]  # with the model on the meta device


def load_placed(recipe: BackboneRecipe, world: World) -> LocalBackbone:
    """Load the backbone that a recipe asks for. All ranks must call it.

    Raises:
        BackboneError: the checkpoint can't be used, on any rank.
        ArgumentError: the placement does not fit the number of ranks.
    """
    placement = recipe.placement
    size = _group_size(placement, world) if isinstance(placement, TensorParallel) else world.size
    checkpoint, identity, _ = opened = distributed.agree(world, lambda: _open(recipe))
    _refuse_different(identity, world)
    if isinstance(placement, TensorParallel):
        distributed.agree(world, lambda: tensor_parallel.check_divisible(checkpoint.spec, size))
        return _tensor_parallel(opened, placement, size, world)
    if isinstance(placement, Zero3):
        return _zero3(opened, world)
    if isinstance(placement, Streamed):
        return _streamed(opened, placement, world)
    return distributed.agree(world, lambda: _replicated(opened, world))


def _open(recipe: BackboneRecipe) -> Opened:
    """Look at every file and shape before any weight is loaded."""
    precisions.check(recipe.precision)
    checkpoint = open_checkpoint(recipe.checkpoint, recipe.revision)
    model = assemble.empty_model(checkpoint)
    assemble.check_shapes(model, checkpoint)
    identity = BackboneIdentity(
        checkpoint=recipe.checkpoint, revision=recipe.revision, precision=recipe.precision, fingerprint=checkpoint.fingerprint()
    )
    return checkpoint, identity, model


def _refuse_different(identity: BackboneIdentity, world: World) -> None:
    found = distributed.gather(identity.fingerprint)
    different = [str(rank) for rank, fingerprint in enumerate(found) if fingerprint != found[0]]
    if different:
        raise distributed.same_everywhere(
            BackboneError(
                f"{identity.checkpoint} on rank {', '.join(different)} differs from rank 0's: copy one checkpoint to all machines"
            )
        )


def _replicated(opened: Opened, world: World) -> LocalBackbone:
    checkpoint, identity, model = opened
    for place in assemble.places(model):
        assemble.fill_block(place.get(model), place.path, checkpoint, identity.precision, world.device)
    return _finish(opened, world, replica=Replica(index=world.rank, count=world.size))


def _finish(opened: Opened, world: World, *, replica: Replica, conveyor: Conveyor | None = None) -> LocalBackbone:
    checkpoint, identity, model = opened
    count = assemble.count_parameters(assemble.empty_model(checkpoint), checkpoint)
    assemble.fill_ends(model, checkpoint, identity.precision, world.device)
    return LocalBackbone(model, checkpoint.spec, identity, checkpoint.tensor, count, replica=replica, conveyor=conveyor)


# Tensor parallel


class GroupedBackbone(LocalBackbone):
    """A backbone whose matrices are divided over a group. The group gathers token ids, runs all rows, and each rank keeps its own."""

    group: Group

    def __call__(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, decoder_input_ids_BT: Tensor, request: TapRequest) -> Taps:
        S, T = input_ids_BS.shape[1], decoder_input_ids_BT.shape[1]
        pad = self.spec.pad_token_id
        all_ids, own = self.group.gather_rows(input_ids_BS, pad)
        all_mask, _ = self.group.gather_rows(attention_mask_BS, 0)
        all_decoder_ids, _ = self.group.gather_rows(decoder_input_ids_BT, pad)
        taps = super().__call__(all_ids, all_mask, all_decoder_ids, request)
        final = taps.decoder_final_BTD
        return Taps(
            encoder=_rows(taps.encoder, own, S),
            decoder=_rows(taps.decoder, own, T),
            attention_mask_BS=attention_mask_BS,
            decoder_final_BTD=None if final is None else final[own, :T].clone(),
        )


def _rows(taps: StackTaps, own: slice, length: int) -> StackTaps:
    # Copies: a view would keep the other ranks' rows alive until backward.
    hidden = tuple(tap[own, :length].clone() for tap in taps.hidden)
    return StackTaps(layers=taps.layers, embedding=taps.embedding[own, :length].clone(), hidden=hidden)


def _group_size(placement: TensorParallel, world: World) -> int:
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


def _tensor_parallel(opened: Opened, placement: TensorParallel, size: int, world: World) -> LocalBackbone:
    checkpoint, identity, model = opened
    options = load_ds_config(placement.deepspeed)
    group = distributed.consecutive_group(world, size)
    # Blocks are divided in the arithmetic's precision and quantized afterwards, each rank its own shards.
    dtype = assemble.compute_dtype(identity.precision)
    whole = "fp32" if identity.precision == "fp32" else "bf16"
    for place in assemble.places(model):
        block = place.get(model)
        assemble.fill_block(block, place.path, checkpoint, whole, world.device)
        if size > 1:
            block = tensor_parallel.shard_block(block, checkpoint.config, group, options, dtype)
        if identity.precision in precisions.QUANTIZED:
            tensor_parallel.quantize_shards(block, group, identity.precision)
        place.put(model, block)
    replica = Replica(index=world.rank // size, count=world.size // size)
    count = assemble.count_parameters(assemble.empty_model(checkpoint), checkpoint)
    assemble.fill_ends(model, checkpoint, identity.precision, world.device)
    backbone = GroupedBackbone(model, checkpoint.spec, identity, checkpoint.tensor, count, replica=replica)
    backbone.group = group
    return backbone


# Blocks that come and go


def _zero3(opened: Opened, world: World) -> LocalBackbone:
    checkpoint, identity, model = opened
    source = PartitionedSource(distributed.consecutive_group(world, world.size), world.device)
    blocks = []

    def load() -> None:
        for place in assemble.places(model):
            block = place.get(model)
            assemble.fill_block(block, place.path, checkpoint, identity.precision, world.device)
            source.add(block)
            empty(block)
            blocks.append(block)

    distributed.agree(world, load)
    conveyor = Conveyor(blocks, source, world.device)
    return _finish(opened, world, replica=Replica(index=world.rank, count=world.size, in_step=True), conveyor=conveyor)


def _streamed(opened: Opened, placement: Streamed, world: World) -> LocalBackbone:
    checkpoint, identity, model = opened
    all_places = list(assemble.places(model))
    blocks = [place.get(model) for place in all_places]

    def build(index: int) -> nn.Module:
        assemble.fill_block(blocks[index], all_places[index].path, checkpoint, identity.precision, world.device)
        return blocks[index]

    if placement.source == "host":
        source: Any = distributed.agree(world, lambda: _host_source(blocks, build, world.device))
    else:
        source = _disk_source(placement, identity, all_places, blocks, build, world)
    return _finish(opened, world, replica=Replica(index=world.rank, count=world.size), conveyor=Conveyor(blocks, source, world.device))


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
    all_places: list[assemble.BlockPlace],
    blocks: list[nn.Module],
    build: Callable[[int], nn.Module],
    world: World,
) -> streamed.DiskSource:
    """Open the block files, written first where this machine has none for these weights in this precision."""
    folder = blocks_folder(placement) / f"{identity.fingerprint[:16]}-{identity.precision}"

    def write() -> None:
        if world.local_rank == 0 and not streamed.is_whole(folder):

            def build_and_forget_last(index: int) -> nn.Module:
                if index:
                    empty(blocks[index - 1])
                return build(index)

            streamed.write_blocks(folder, [place.path for place in all_places], build_and_forget_last)

    distributed.agree(world, write)
    for block in blocks:
        assemble.make_room(block, identity.precision)
    return distributed.agree(world, lambda: streamed.DiskSource(folder, world.device))


def blocks_folder(placement: Streamed) -> Path:
    """Return where block files live on this machine."""
    if placement.folder is not None:
        return Path(placement.folder).expanduser()
    return cache_folder("blocks")


# Remembered


def load_caching(
    recipe: BackboneRecipe,
    cache: CacheRecipe,
    world: World,
    request: Callable[[BackboneSpec], TapRequest],
    check: Callable[[LocalBackbone], None],
) -> CachingBackbone:
    """Open the tap cache of this backbone; the backbone itself is loaded when a row is not in it, and then given to `check`.

    Raises:
        BackboneError: the checkpoint can't be used, or its placement needs all ranks at once.
    """
    if recipe.placement.name not in ("replicated", "streamed"):
        raise distributed.same_everywhere(
            BackboneError(
                f"a tap cache needs a backbone that each rank runs by itself, which placement {recipe.placement.name} is not: "
                "write backbone.placement=streamed, or cache.enabled=false"
            )
        )
    checkpoint, identity, model = distributed.agree(world, lambda: _open(recipe))
    _refuse_different(identity, world)
    count = assemble.count_parameters(model, checkpoint)
    assemble.fill_ends(model, checkpoint, identity.precision, world.device)
    wanted = request(checkpoint.spec)
    key = CacheKey(
        fingerprint=identity.fingerprint,
        precision=identity.precision,
        layers=wanted.layers,
        decoder_final=wanted.decoder_final,
        d_model=checkpoint.spec.d_model,
        dtype=cache.dtype,
    )
    root = Path(cache.folder).expanduser() if cache.folder is not None else cache_folder("taps")
    alone = World(rank=0, size=1, local_rank=world.local_rank, device=world.device)  # ranks load when they must, not together

    def load() -> LocalBackbone:
        backbone = load_alone(recipe, alone)
        check(backbone)
        return backbone

    return CachingBackbone(
        cache=TapCache(root, key),
        spec=checkpoint.spec,
        identity=identity,
        head=head_of(model, checkpoint.spec),
        embedding_VD=model.shared.weight,
        weight_source=checkpoint.tensor,
        replica=Replica(index=world.rank, count=world.size),
        load=load,
        num_parameters=count,
    )


def load_alone(recipe: BackboneRecipe, world: World) -> LocalBackbone:
    """Load a replicated or streamed backbone without a word to other ranks."""
    opened = _open(recipe)
    if isinstance(recipe.placement, Streamed):
        return _streamed(opened, recipe.placement, world)
    return _replicated(opened, world)

"""One training step of a recipe, run on fake tensors: what is alive when, and where the peak is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.backbone.spec import refuse_placement
from lst_scale.backbone.taps import StackTaps, TapRequest, Taps, cast_tap
from lst_scale.backbone.weights.precision import held_tensors
from lst_scale.data.batches import Batch
from lst_scale.methods.base import Trainee, trained_parameters
from lst_scale.methods.lst import LadderTrainee
from lst_scale.plan import fake
from lst_scale.plan.engine import EngineBytes, engine_bytes
from lst_scale.plan.live import LiveBytes, nbytes
from lst_scale.plan.packed import pack, packed_bytes
from lst_scale.recipe.backbone import Replicated
from lst_scale.recipe.schema import Recipe
from lst_scale.side.count import Shape
from lst_scale.system.assets import load_ds_config

# The parts of a step, in the order in which a table shows them.
WEIGHTS, TRAINED, OPTIMIZER = "backbone weights", "trained weights", "optimizer and engine"
TAPS, SAVED, GRADIENTS = "taps", "saved for backward", "gradients"
FORWARD, METHOD, BACKWARD, STEP = "backbone forward", "forward and loss", "backward", "optimizer step"
PARTS = (WEIGHTS, TRAINED, OPTIMIZER, TAPS, SAVED, GRADIENTS, FORWARD, METHOD, BACKWARD, STEP)
# Where a peak can be. ZeRO's bucket comes with the first gradient, when the widest of what was saved is gone.
NO_GRADIENT = "backward, no gradient yet"
MOMENTS = (FORWARD, METHOD, NO_GRADIENT, BACKWARD, STEP)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a step depends on beside the recipe: micro-batch and lengths in tokens, ranks, and whose kernels run."""

    rows: int
    source: int
    target: int
    images: int = 1  # of a row, where rows have some
    world_size: int = 1
    on_gpu: bool = True
    cached: bool = False  # taps come from disk, and no backbone is in memory
    packed: str | None = None  # int8 or nf4: matrices held in fewer bits by a method that runs backward through them


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one rank during one step."""

    parts: dict[str, int]  # at the peak
    where: str  # which moment that is
    kept: int  # what the forward pass leaves for the backward pass, taps included
    trainable: int  # parameters
    moments: dict[str, dict[str, int]]  # the parts at each moment's worst point

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def footprint(recipe: Recipe, shape: Shape, setting: Setting) -> Footprint:
    """Return what one step of one run needs on each rank.

    Raises:
        BackboneError: matrices of this shape can't be divided as the recipe's placement asks.
    """
    refuse_placement(shape.spec, recipe.backbone.placement, setting.world_size)
    live = LiveBytes()
    with FakeTensorMode(), live, fake.all_labelled(), fake.gpu_kernels() if setting.on_gpu else contextlib.nullcontext():
        placement = recipe.backbone.placement
        shards = placement.shards(setting.world_size)
        backbone = fake.backbone(shape, recipe, shards=shards)
        trainee = fake.trainee(recipe, backbone)
        if setting.packed is not None:
            pack(backbone, setting.packed)
        trained = trained_parameters(trainee.module)
        stage = load_ds_config(recipe.training.deepspeed).get("zero_optimization", {}).get("stage", 0)
        engine = engine_bytes([p.numel() for p in trained.values()], stage=stage, world_size=setting.world_size)
        # What trains inside the backbone is counted with the engine, the rest of the module with the backbone.
        weights = _resident(recipe, backbone, trainee, setting)
        batch = fake.batch(setting.rows, setting.source, setting.target, fake.images(recipe, setting.rows, setting.images))
        live.forget()
        kept = _step(trainee, backbone, batch, live, setting, shards)
    static = {WEIGHTS: weights, TRAINED: engine.weights, OPTIMIZER: engine.state}
    moments = {moment: static | _at(live, moment, engine) for moment in MOMENTS}
    return worst_of(moments, kept=kept, trainable=sum(p.numel() for p in trained.values()))


def packed_otherwise(found: Footprint, recipe: Recipe, shape: Shape, *, before: str, after: str) -> Footprint:
    """Return the footprint of a step on packed matrices with these packed otherwise: what both passes do with them is the same."""
    with FakeTensorMode(), LiveBytes():
        backbone = fake.backbone(shape, recipe)
        more = packed_bytes(backbone, after) - packed_bytes(backbone, before)
    moments = {moment: parts | {WEIGHTS: parts[WEIGHTS] + more} for moment, parts in found.moments.items()}
    return worst_of(moments, kept=found.kept, trainable=found.trainable)


def worst_of(moments: dict[str, dict[str, int]], *, kept: int, trainable: int) -> Footprint:
    """Return the footprint of a step whose moments are these."""
    where = max(moments, key=lambda moment: sum(moments[moment].values()))
    return Footprint(parts=moments[where], where=where, kept=kept, trainable=trainable, moments=moments)


def _step(trainee: Trainee, backbone: LocalBackbone, batch: Batch, live: LiveBytes, setting: Setting, shards: int) -> int:
    """Run a step on fake tensors and return the bytes that its forward pass leaves alive."""
    live.enter_phase(FORWARD)
    prepared = _prepare(trainee, backbone, batch, setting, shards)
    live.enter_phase(METHOD, survivors=TAPS)
    nll = trainee.nll(trainee.module, batch, prepared)
    live.enter_phase(BACKWARD, survivors=SAVED)
    kept = live.alive(TAPS) + live.alive(SAVED)
    nll.backward()  # type: ignore[no-untyped-call]
    del nll
    live.enter_phase(STEP, survivors=GRADIENTS)
    live.mark()
    return kept


def _prepare(trainee: Trainee, backbone: LocalBackbone, batch: Batch, setting: Setting, shards: int) -> Any:
    request = trainee.request
    if request is None:
        return trainee.prepare(batch)
    if setting.cached:
        return _read_taps(backbone, batch, request)
    if shards == 1:
        return trainee.prepare(batch)
    # A group runs the rows of all its ranks, and each keeps copies of its own.
    everyone = trainee.prepare(fake.batch(setting.rows * shards, setting.source, setting.target))
    return _own_rows(everyone, slice(0, setting.rows))


def _own_rows(taps: Taps, own: slice) -> Taps:
    def stack(whole: StackTaps) -> StackTaps:
        return replace(whole, embedding=whole.embedding[own].clone(), hidden=tuple(tap[own].clone() for tap in whole.hidden))

    final = taps.final_BTD
    return Taps(
        source=stack(taps.source),
        target=stack(taps.target),
        source_mask_BS=taps.source_mask_BS[own].clone(),
        final_BTD=None if final is None else final[own].clone(),
    )


def _read_taps(backbone: LocalBackbone, batch: Batch, request: TapRequest) -> Taps:
    """Return taps as they come from disk: nothing was computed for them."""
    dtype = backbone.head.weight_VD.dtype

    def stack(ids: Tensor) -> StackTaps:
        states = [cast_tap(torch.empty(*ids.shape, backbone.spec.d_model, dtype=dtype), request.storage) for _ in request.layers]
        return StackTaps(layers=request.layers, embedding=torch.empty(*ids.shape, backbone.spec.d_model, dtype=dtype), hidden=tuple(states))

    final = torch.empty(*batch.labels_BT.shape, backbone.spec.d_model, dtype=dtype) if request.target_final else None
    source = stack(batch.input_ids_BS)
    return Taps(
        source=source if request.source else source.nothing,
        target=stack(batch.labels_BT),
        source_mask_BS=batch.attention_mask_BS,
        final_BTD=final,
    )


def _resident(recipe: Recipe, backbone: LocalBackbone, trainee: Trainee, setting: Setting) -> int:
    """Return the bytes of frozen weights on a rank: all, its share, or the blocks that are there at a time."""
    model, placement = backbone.give_model(), recipe.backbone.placement
    blocks = [nbytes(held_tensors(ref.get(model))) for ref in backbone.family.blocks(backbone.spec)]
    if isinstance(trainee, LadderTrainee):
        ends = nbytes(held_tensors(model)) - sum(blocks)
        # What a side network runs again of the backbone, which shares it in float32 on a CPU alone.
        is_shared = isinstance(placement, Replicated) and recipe.backbone.precision == "fp32" and not (setting.cached or setting.on_gpu)
        if not is_shared:
            ends += nbytes(trainee.module.held())
        if setting.cached:
            return ends
        return ends + placement.resident(blocks, setting.world_size)
    return nbytes(tensor for tensor in _frozen(trainee.module))


def _frozen(module: nn.Module) -> Iterator[Tensor]:
    return (tensor for tensor in held_tensors(module) if not tensor.requires_grad)


def _at(live: LiveBytes, moment: str, engine: EngineBytes) -> dict[str, int]:
    """Return what came and went, by part, at the worst point of one moment of the step."""
    if moment == STEP:
        # Gradients are where ZeRO has put them: counted with the step.
        return {part: size for part, size in live.at_mark().items() if part != GRADIENTS} | {STEP: engine.step}
    if moment not in (NO_GRADIENT, BACKWARD):
        return live.at_peak(moment)
    start, end = live.spans[BACKWARD]
    first = live.first(GRADIENTS) or end
    if moment == NO_GRADIENT:
        return live.at_worst((start, first), without=GRADIENTS)
    found = live.at_worst((first, end), without=GRADIENTS if engine.takes_gradients else None)
    return found | {GRADIENTS: found.get(GRADIENTS, 0) + engine.gradients}

"""A pass over rows without a step, on fake tensors: what a linear probe needs of a device."""

from __future__ import annotations

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lst_scale.backbone.weights.precision import held_tensors
from lst_scale.methods.lst import taps_of
from lst_scale.methods.probe import request_of, states_of
from lst_scale.plan import fake
from lst_scale.plan.footprint import FORWARD, METHOD, TAPS, WEIGHTS, Footprint, Setting, worst_of
from lst_scale.plan.live import LiveBytes, nbytes
from lst_scale.recipe.method import ProbeRecipe
from lst_scale.recipe.schema import Recipe
from lst_scale.side.count import Shape, blocks_of, trainable_of


def pass_footprint(recipe: Recipe, shape: Shape, setting: Setting) -> Footprint:
    """Return what one batch of a probe's pass needs on each rank. The fit is made on the CPU, and is not counted.

    Ranks that share a backbone run the rows of all of them.
    """
    assert isinstance(recipe.method, ProbeRecipe)
    live, placement = LiveBytes(), recipe.backbone.placement
    shards = placement.shards(setting.world_size)
    request = request_of(recipe.method, blocks_of(recipe.method, shape.spec))
    with FakeTensorMode(), live, fake.gpu_kernels() if setting.on_gpu else contextlib.nullcontext(), torch.no_grad():
        backbone = fake.backbone(shape, recipe, shards=shards)
        model = backbone.give_model()
        blocks = [nbytes(held_tensors(ref.get(model))) for ref in backbone.family.blocks(backbone.spec)]
        weights = nbytes(held_tensors(model)) - sum(blocks) + placement.resident(blocks, setting.world_size)
        batch = fake.batch(setting.rows * shards, setting.source, setting.target)
        live.forget()
        live.enter_phase(FORWARD)
        taps = taps_of(backbone, batch, request)
        live.enter_phase(METHOD, survivors=TAPS)
        states_of(taps, request, recipe.method.position)
    moments = {moment: {WEIGHTS: weights} | live.at_peak(moment) for moment in (FORWARD, METHOD)}
    return worst_of(moments, kept=0, trainable=trainable_of(recipe, shape))

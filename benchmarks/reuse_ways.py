"""The ways that `benchmarks/reuse.py` compares: what is built for each, and its step."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import steps
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CACHED = ("lst-cached", "members-cached")
TOGETHER = ("members", "members-cached", "loop", "stacked")
LADDERS = ("forward", "lst", "side", *CACHED, *TOGETHER)
PLAIN = tuple(f"{way}-plain" for way in ("lst", "side", "lst-cached", "members", "members-cached"))
WAYS = (*LADDERS, *PLAIN, *steps.RIVALS, *(f"{rival}-checkpointed" for rival in steps.RIVALS))
Batch = dict[str, Tensor]
Step = Callable[[int], None]  # takes the number of a batch


def make_batches(options: argparse.Namespace, device: torch.device) -> list[Batch]:
    """Return different batches of full rows of random tokens; the last one is for warming up, which is not measured."""
    draw = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(options.batches + 1):
        source = torch.randint(3, 4000, (options.batch, options.source), generator=draw)
        labels = torch.randint(3, 4000, (options.batch, options.target), generator=draw)
        mask = torch.ones_like(source)
        batches.append({"input_ids": source.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)})
    return batches


def open_backbone(options: argparse.Namespace, way: str, precision: str, folder: Path) -> Any:
    """Return the backbone as `way` holds it."""
    from lst_scale.backbone.cache.load import load_caching
    from lst_scale.backbone.placement.load import load_placed
    from lst_scale.methods.lst import ladder_config
    from lst_scale.recipe.backbone import BackboneRecipe
    from lst_scale.recipe.schema import CacheRecipe
    from lst_scale.side.network import SideNetwork
    from lst_scale.system import distributed

    recipe, world = BackboneRecipe.model_validate({"checkpoint": str(options.checkpoint), "precision": precision}), distributed.connect()
    if way not in CACHED:
        return load_placed(recipe, world)
    method = ladder_recipe(options, precision)
    cache = CacheRecipe(enabled=True, dtype=options.cache_dtype, folder=str(folder))
    return load_caching(recipe, cache, world, lambda spec: SideNetwork.request_of(ladder_config(method, spec)), lambda live: None)


def ladder_recipe(options: argparse.Namespace, precision: str) -> Any:
    from lst_scale.recipe.method import LstRecipe

    layers: Any = "all" if options.layers == "all" else tuple(int(layer) for layer in options.layers.split(","))
    return LstRecipe(
        name="lst",
        reduction_factor=options.reduction_factor,
        side_layers=layers,
        initialization="random",
        precision="fp32" if precision == "fp32" else "bf16",
    )


def inputs_of(backbone: Any, batch: Batch) -> Any:
    """Return what a backbone is asked with."""
    from lst_scale.backbone.taps import Inputs
    from lst_scale.side.loss import shift_right

    labels_BT = shift_right(batch["labels"], backbone.spec)
    return Inputs(source_BS=batch["input_ids"], source_mask_BS=batch["attention_mask"], target_BT=labels_BT)


def build_sides(options: argparse.Namespace, way: str, precision: str, backbone: Any, *, plain: bool) -> list[Any]:
    from lst_scale.methods.lst import build_side_network

    recipe = ladder_recipe(options, precision).model_copy(update={"recompute": not plain})
    if way in ("loop", "stacked"):  # vmap knows neither checkpoints nor our own dropout
        recipe = recipe.model_copy(update={"recompute": False, "dropout": 0.0})
    count = options.members if way in TOGETHER else 1
    return [build_side_network(recipe, backbone, seed=seed).to(backbone.device).train() for seed in range(count)]


def ladder_step(options: argparse.Namespace, way: str, precision: str, backbone: Any, batches: list[Batch], *, plain: bool) -> Step:
    """Return the step of one side network, or of several on the same taps."""
    from lst_scale.side.loss import cross_entropy_sum

    sides = build_sides(options, way, precision, backbone, plain=plain)
    optimizers = [torch.optim.AdamW(side.parameters(), lr=1e-4, fused=True) for side in sides]
    request = sides[0].request
    kept = backbone(inputs_of(backbone, batches[0]), request) if way in ("side", "loop") else None

    def step(number: int) -> None:
        taps = backbone(inputs_of(backbone, batches[number]), request) if kept is None else kept
        if way in CACHED and number + 1 < options.batches:  # as the training loop does
            backbone.prefetch(inputs_of(backbone, batches[number + 1]))
        labels = batches[number if kept is None else 0]["labels"]
        for side, optimizer in zip(sides, optimizers, strict=True):
            nll, tokens = cross_entropy_sum(backbone.head, side(taps), labels)
            torch.autograd.backward(nll / tokens)
            if way != "loop":
                optimizer.step()
            optimizer.zero_grad()

    def forward(number: int) -> None:
        backbone(inputs_of(backbone, batches[number]), request)

    return forward if way == "forward" else step


def stacked_step(options: argparse.Namespace, precision: str, backbone: Any, batches: list[Batch]) -> Step:
    """Return forward and backward of side networks of one shape as one with a further dimension; the head meets them all at once."""
    from lst_scale.side.loss import cross_entropy_sum

    sides = build_sides(options, "stacked", precision, backbone, plain=True)
    taps = backbone(inputs_of(backbone, batches[0]), sides[0].request)
    parameters, buffers = torch.func.stack_module_state(sides)
    labels = batches[0]["labels"].repeat(len(sides), 1)

    def hidden_of(weights: Any, others: Any) -> Tensor:
        hidden: Tensor = torch.func.functional_call(sides[0], (weights, others), (taps,))
        return hidden

    def step(number: int) -> None:
        # vmap hides from attention that its mask wants a gradient, which the fused kernel on the CPU can't give.
        with sdpa_kernel(SDPBackend.MATH):
            hidden_MBTD = torch.func.vmap(hidden_of, randomness="error")(parameters, buffers)
        nll, tokens = cross_entropy_sum(backbone.head, hidden_MBTD.flatten(0, 1), labels)
        torch.autograd.backward(nll / tokens)
        for parameter in parameters.values():
            parameter.grad = None

    return step


def rival_step(options: argparse.Namespace, way: str, precision: str, device: torch.device, batches: list[Batch]) -> Step:
    """Return the step of a method that trains inside the backbone."""
    loss, trained, _ = steps.whole_model_loss(options, way, precision, device, batches[0])
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(number: int) -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step

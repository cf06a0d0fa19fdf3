"""The real model code on fake tensors: a backbone of a recipe's shape, and the method on it, with no weights anywhere.

Call everything inside one `torch._subclasses.FakeTensorMode`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone.families import Family, family_of
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.backbone.taps import BackboneIdentity
from lst_scale.backbone.weights import precision as precisions
from lst_scale.backbone.weights.assemble import compute_dtype
from lst_scale.data.batches import Batch
from lst_scale.inputs.images import Images
from lst_scale.methods import build_trainee
from lst_scale.methods.base import Trainee
from lst_scale.methods.full import WholeModelTrainee
from lst_scale.methods.images import reading_images, vision_config
from lst_scale.plan.lora import add_lora
from lst_scale.recipe.method import LoraRecipe, LstRecipe
from lst_scale.recipe.schema import Recipe
from lst_scale.side import loss
from lst_scale.side.count import Shape, check_targets
from lst_scale.side.designs import attention as side_attention


def backbone(shape: Shape, recipe: Recipe, *, shards: int = 1) -> LocalBackbone:
    """Return a backbone whose weights take the room that the recipe's precision gives them."""
    family = family_of(shape.spec.model_type, recipe.backbone.checkpoint)
    precision = recipe.backbone.precision
    with _created_as(compute_dtype(precision)):
        model = family.unfilled(shape.spec, shards=shards)
    spec = shape.spec  # the whole model's: what stands beside it knows nothing of shards
    family.tie(model, own_head=shape.own_head)
    if shape.own_head:
        _give_own_head(model, family)
    model.name_or_path = recipe.backbone.checkpoint  # peft asks
    for ref in family.blocks(spec):
        block = ref.get(model)
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear) and precision in precisions.QUANTIZED:
                precisions.replace(block, name, precisions.sized_quantized_linear(module, precision))
    identity = BackboneIdentity(checkpoint=recipe.backbone.checkpoint, revision=None, precision=precision, fingerprint="")

    @functools.cache
    def sizes() -> dict[str, torch.Size]:
        """Sizes of whole matrices, also where the model holds shards or packed ones."""
        with torch.device("meta"):
            return {
                name: parameter.shape for name, parameter in family.unfilled(shape.spec, shards=1).named_parameters(remove_duplicate=False)
            }

    def weight(name: str) -> Tensor:
        """Position tables, which a ladder starts from, and blocks that are run again; nothing else is asked of random initialisation."""
        shared = shards == 1 and precision not in precisions.QUANTIZED
        return model.get_parameter(name).detach().float() if shared else torch.empty(sizes()[name])

    return LocalBackbone(model, spec, identity, weight, num_parameters=0)


def _give_own_head(model: Any, family: Family) -> None:
    """Let the head be a matrix of its own: transformers makes every T5 with the embedding as its head."""
    embedding = family.embedding(model)
    if model.get_parameter(family.head_name) is embedding:
        path, _, last = family.head_name.rpartition(".")
        setattr(model.get_submodule(path), last, nn.Parameter(torch.empty_like(embedding)))


@contextlib.contextmanager
def _created_as(dtype: torch.dtype) -> Iterator[None]:
    """Create parameters in `dtype`; casting fake ones afterwards is refused by torch."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def trainee(recipe: Recipe, on: LocalBackbone) -> Trainee:
    """Return the recipe's method. Weights are drawn, not carved out of the backbone: they take the same room."""
    if isinstance(recipe.method, LstRecipe):
        recipe = recipe.model_copy(update={"method": recipe.method.model_copy(update={"initialization": "random"})})
    if isinstance(recipe.method, LoraRecipe):
        return sized_lora(recipe.method, on) if recipe.vision is None else _sized_lora_with_images(recipe, recipe.method, on)
    with unmoved():
        found = build_trainee(recipe, on, zero_stage=0)
    found.module.train()
    return found


def _sized_lora_with_images(recipe: Recipe, method: LoraRecipe, on: LocalBackbone) -> Trainee:
    vision = vision_config(recipe)
    assert recipe.vision is not None and vision is not None
    with unmoved():
        whole = reading_images(on.give_model(), on.family, vision, recipe.seed, vocab_size=recipe.vision.vocab_size)
    return sized_lora(method, on, whole)


def sized_lora(method: LoraRecipe, on: LocalBackbone, around: Any = None) -> Trainee:
    """Return LoRA without peft; `around`: a module that the model stands in."""
    method = check_targets(method, on.spec)
    model = on.give_model() if around is None else around
    add_lora(on.give_model(), on.family, method)
    if method.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return WholeModelTrainee(model.train(), on, bf16=method.precision == "bf16", in_step=False, facts={})


@contextlib.contextmanager
def unmoved() -> Iterator[None]:
    """Let `Module.to` do nothing: peft moves what it adds to where it is already, and torch refuses to move modules of fake tensors."""
    to = nn.Module.to
    nn.Module.to = lambda self, *args, **kwargs: self  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.to = to  # type: ignore[method-assign]


def batch(rows: int, source: int, target: int, images: Images | None = None) -> Batch:
    """Return one micro-batch without padding: the largest of its width."""
    return Batch(
        input_ids_BS=torch.ones(rows, source, dtype=torch.long),
        attention_mask_BS=torch.ones(rows, source, dtype=torch.long),
        labels_BT=torch.ones(rows, target, dtype=torch.long),
        indices=(),
        images=images,
    )


def images(recipe: Recipe, rows: int, count: int) -> Images | None:
    """Return features of so many rows' images, `count` each, as large as they are after pooling; None: there are none."""
    vision = recipe.vision
    if vision is None:
        return None
    return Images(features_BIGF=torch.ones(rows, count, vision.pooled_grid**2, vision.feature_dim, dtype=torch.float16))


@contextlib.contextmanager
def all_labelled() -> Iterator[None]:
    """Let every position count as labelled: which ones are is a matter of contents, and all is the most."""
    real = loss.labelled_positions
    loss.labelled_positions = lambda labels_BT: torch.arange(labels_BT.numel())
    try:
        yield
    finally:
        loss.labelled_positions = real


@contextlib.contextmanager
def gpu_kernels() -> Iterator[None]:
    """Let dropout keep what a GPU's kernels keep, and not what the CPU's do.

    Attention keeps no score maps and no mask: fused kernels draw it again in the backward pass from a stored seed. Dropout itself keeps one
    byte an element, where the CPU keeps a mask in the input's dtype.
    """
    attention, dropout = nn.functional.scaled_dot_product_attention, nn.functional.dropout
    within = side_attention.draws_within_kernel

    def without_mask(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        result: Tensor = attention(query, key, value, **(kwargs | {"dropout_p": 0.0}))
        return result

    def with_bytes(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input

    nn.functional.scaled_dot_product_attention, nn.functional.dropout = without_mask, with_bytes  # type: ignore[assignment]
    side_attention.draws_within_kernel = lambda device: True
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention, nn.functional.dropout = attention, dropout  # type: ignore[assignment]
        side_attention.draws_within_kernel = within

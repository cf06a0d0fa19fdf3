"""A backbone in 8 or 4 bits under a method that runs backward through it: QLoRA (Dettmers et al. 2023), as peft and bitsandbytes do it.

Of each matrix the packed bytes are held. Both passes unpack it to bf16, use it, and let go of it; nothing but the packed bytes is kept from
the forward pass for the backward pass, since the matrix itself does not train. Only sizes are here: this is for fake tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.backbone.weights import precision as precisions
from lst_scale.plan.live import nbytes


class PackedLinear(nn.Module):
    """A frozen matrix in fewer bits that gradients pass through."""

    def __init__(self, like: nn.Linear, precision: str) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.weight = None  # as in lst_scale/backbone/weights/precision.py
        self.held = precisions.sized_quantized_linear(like, precision)

    def unpacked(self, like: Tensor) -> Tensor:
        return like.new_empty(self.out_features, self.in_features)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = _Product.apply(hidden.to(torch.bfloat16), self)  # type: ignore[no-untyped-call]
        return result.to(hidden.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, linear: PackedLinear) -> Tensor:
        ctx.linear = linear
        return nn.functional.linear(hidden, linear.unpacked(hidden))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] @ ctx.linear.unpacked(gradients[0]), None


def packed_bytes(backbone: LocalBackbone, precision: str) -> int:
    """Return what the matrices of a backbone's blocks take when they are packed."""
    blocks = (ref.get(backbone.give_model()) for ref in backbone.family.blocks(backbone.spec))
    linears = (module for block in blocks for module in block.modules() if isinstance(module, nn.Linear))
    return sum(nbytes(precisions.sized_quantized_linear(linear, precision).buffers()) for linear in linears)


def pack(backbone: LocalBackbone, precision: str) -> None:
    """Put packed matrices in the place of the blocks' frozen ones, beneath what peft has put around them."""
    for ref in backbone.family.blocks(backbone.spec):
        block = ref.get(backbone.give_model())
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                precisions.replace(block, name, PackedLinear(module, precision))

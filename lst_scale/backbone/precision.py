"""Weights in 8 and 4 bits, activations in bf16: bitsandbytes' formats and kernels, forward only.

Both formats quantize the weight alone and multiply in bf16. LLM.int8 (bitsandbytes' Linear8bitLt) also quantizes activations and
passes them through fp16, where T5's feed-forward overflows; see docs/decisions/0001-weight-only-int8.md. `wo` is quantized like any
other matrix: transformers leaves it out because T5's feed-forward casts its input to `wo.weight.dtype`, which turns 4-bit storage into
garbage. `QuantizedLinear.weight` is None, so there is no dtype to cast to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.errors import BackboneError, did_you_mean

PRECISIONS = ("fp32", "bf16", "int8", "nf4")
QUANTIZED = ("int8", "nf4")
FP16_REASON = "T5 overflows in fp16 (its feed-forward exceeds 65504): write precision bf16, which has the range of fp32"
NF4_BLOCK = 64  # weights that share one scale; bitsandbytes' default


def check(precision: str) -> None:
    """Refuse a precision that can't be had, before any weight is read."""
    if precision in ("fp16", "float16", "half"):
        raise BackboneError(FP16_REASON)
    if precision not in PRECISIONS:
        raise BackboneError(f"backbone precision {precision!r} is unknown.{did_you_mean(precision, PRECISIONS)}")


class QuantizedLinear(nn.Module):
    """A frozen linear map without bias whose weight is held in 8 or 4 bits and unpacked to the input's dtype for each product."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.weight = None  # T5's feed-forward casts its input to wo.weight.dtype, unless that is no tensor

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out_features, in_features) in `dtype`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Int8Linear(QuantizedLinear):
    """One scale a row: w = packed * scale, with packed in -127..127."""

    packed: Tensor
    scale: Tensor

    def __init__(self, weight_OI: Tensor) -> None:
        from bitsandbytes.functional import int8_vectorwise_quant

        super().__init__(*weight_OI.shape)
        # bitsandbytes returns each row's largest magnitude; its CUDA kernel takes half precision only, which weights (unlike
        # activations) never leave.
        packed_OI, largest_O, _ = int8_vectorwise_quant(weight_OI.to(torch.float16))
        self.register_buffer("packed", packed_OI)
        self.register_buffer("scale", largest_O.float() / 127)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return (self.packed.to(torch.float32) * self.scale[:, None]).to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        # -127..127 is exact in bf16, so the scale may wait until after the product: one rounding less, and a narrower temporary.
        return nn.functional.linear(hidden, self.packed.to(hidden.dtype)) * self.scale.to(hidden.dtype)


class Nf4Linear(QuantizedLinear):
    """NormalFloat4 (QLoRA, Dettmers et al. 2023): 16 levels, one scale for 64 weights, scales quantized again."""

    packed: Tensor

    def __init__(self, weight_OI: Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        super().__init__(*weight_OI.shape)
        packed, state = quantize_4bit(weight_OI.contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
        self.register_buffer("packed", packed)
        self._state = state  # bitsandbytes' own record of the scales

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: Tensor = dequantize_4bit(self.packed, self._state).to(dtype)
        return weight

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.unpacked(hidden.dtype))

    def held(self) -> Iterator[Tensor]:
        yield self._state.absmax
        if self._state.nested:
            yield self._state.state2.absmax


def quantized_linear(weight_OI: Tensor, precision: str) -> QuantizedLinear:
    """Quantize one matrix (out_features, in_features)."""
    return Int8Linear(weight_OI) if precision == "int8" else Nf4Linear(weight_OI)


def replace(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at the dotted `path` below `root`."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def held_tensors(model: Any) -> Iterator[Tensor]:
    """Yield every tensor that a model holds, scales of quantized weights included."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, Nf4Linear):
            yield from module.held()

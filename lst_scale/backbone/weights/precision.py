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
from lst_scale.recipe.backbone import FP16_REASON as FP16_REASON
from lst_scale.recipe.backbone import QUANTIZED as QUANTIZED

PRECISIONS = ("fp32", "bf16", *QUANTIZED)
NF4_BLOCK = 64  # weights that share one scale; bitsandbytes' default
NF4_NESTED_BLOCK = 256  # scales that share one scale; the same


def check(precision: str) -> None:
    """Refuse a precision that can't be had, before any weight is read."""
    if precision in ("fp16", "float16", "half"):
        raise BackboneError(FP16_REASON)
    if precision not in PRECISIONS:
        raise BackboneError(f"backbone precision {precision!r} is unknown.{did_you_mean(precision, PRECISIONS)}")


class QuantizedLinear(nn.Module):
    """A frozen linear map whose weight is held in 8 or 4 bits and unpacked to the input's dtype for each product; a bias stays as it is.

    All that it holds are buffers, so that it can be moved, stored and streamed like any other module.
    """

    bias: Tensor | None

    def __init__(self, out_features: int, in_features: int, tensors: dict[str, Tensor], bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.weight = None  # T5's feed-forward casts its input to wo.weight.dtype, unless that is no tensor
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias_O)

    @staticmethod
    def pack(weight_OI: Tensor) -> dict[str, Tensor]:
        """Quantize one matrix (out_features, in_features) and return what stands for it."""
        raise NotImplementedError

    @staticmethod
    def sized(out_features: int, in_features: int) -> dict[str, Tensor]:
        """Return tensors as `pack` would, of the same sizes and without contents."""
        raise NotImplementedError

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out_features, in_features) in `dtype`."""
        raise NotImplementedError

    def product(self, hidden: Tensor) -> Tensor:
        """Return what the weight makes of (..., in_features), without the bias."""
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        return added(self.product(hidden), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Int8Linear(QuantizedLinear):
    """One scale a row: w = packed * scale, with packed in -127..127."""

    packed: Tensor
    scale: Tensor

    @staticmethod
    def pack(weight_OI: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import int8_vectorwise_quant

        # bitsandbytes returns each row's largest magnitude; its CUDA kernel takes half precision only, which weights (unlike
        # activations) never leave.
        packed_OI, largest_O, _ = int8_vectorwise_quant(weight_OI.to(torch.float16))
        return {"packed": packed_OI, "scale": largest_O.float() / 127}

    @staticmethod
    def sized(out_features: int, in_features: int) -> dict[str, Tensor]:
        return {"packed": torch.empty(out_features, in_features, dtype=torch.int8), "scale": torch.empty(out_features)}

    @classmethod
    def of_part(cls, weight_OI: Tensor, largest_O: Tensor) -> Int8Linear:
        """Quantize some of a matrix's columns by the scales of whole rows, whose largest magnitudes are `largest_O`."""
        scale = largest_O.to(torch.float16).float().clamp(min=1e-12) / 127
        packed_OI = (weight_OI.to(torch.float16).float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        out_features, in_features = weight_OI.shape
        return cls(out_features, in_features, {"packed": packed_OI, "scale": scale})

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return (self.packed.to(torch.float32) * self.scale[:, None]).to(dtype)

    def product(self, hidden: Tensor) -> Tensor:
        # -127..127 is exact in bf16, so the scale may wait until after the product: one rounding less, and a narrower temporary.
        return nn.functional.linear(hidden, self.packed.to(hidden.dtype)) * self.scale.to(hidden.dtype)


class Nf4Linear(QuantizedLinear):
    """NormalFloat4 (QLoRA, Dettmers et al. 2023): 16 levels, one scale for 64 weights, scales quantized again."""

    packed: Tensor
    absmax: Tensor  # uint8: one for 64 weights, itself quantized by 256
    code: Tensor
    offset: Tensor
    nested_absmax: Tensor
    nested_code: Tensor

    @staticmethod
    def pack(weight_OI: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight_OI.contiguous(), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
        nested = {"offset": state.offset, "nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
        return {"packed": packed, "absmax": state.absmax, "code": state.code} | nested

    @staticmethod
    def sized(out_features: int, in_features: int) -> dict[str, Tensor]:
        blocks = -(-out_features * in_features // NF4_BLOCK)
        return {
            "packed": torch.empty(-(-out_features * in_features // 2), 1, dtype=torch.uint8),
            "absmax": torch.empty(blocks, dtype=torch.uint8),
            "code": torch.empty(16),
            "offset": torch.empty(()),
            "nested_absmax": torch.empty(-(-blocks // NF4_NESTED_BLOCK)),
            "nested_code": torch.empty(256),
        }

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        nested = QuantState(absmax=self.nested_absmax, code=self.nested_code, blocksize=NF4_NESTED_BLOCK, dtype=torch.float32)
        state = QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.offset,
            state2=nested,
        )
        weight: Tensor = dequantize_4bit(self.packed, state)
        return weight

    def product(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.unpacked(hidden.dtype))


_LAYERS: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "nf4": Nf4Linear}


def added(product: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return a product with a layer's bias, where it has one."""
    return product if bias_O is None else product + bias_O.to(product.dtype)


def quantized_linear(weight_OI: Tensor, precision: str, bias_O: Tensor | None = None) -> QuantizedLinear:
    """Quantize one matrix (out_features, in_features); the bias (out_features) stays as it is."""
    kind = _LAYERS[precision]
    out_features, in_features = weight_OI.shape
    return kind(out_features, in_features, kind.pack(weight_OI), bias_O)


def empty_quantized_linear(like: nn.Linear, precision: str) -> QuantizedLinear:
    """Return a layer of the right kind and size that holds nothing yet."""
    kind = _LAYERS[precision]
    nothing = torch.empty(0)
    bias = None if like.bias is None else nothing
    return kind(like.out_features, like.in_features, dict.fromkeys(kind.pack(torch.ones(64, 64)), nothing), bias)


def sized_quantized_linear(like: nn.Linear, precision: str) -> QuantizedLinear:
    """Return a layer of the right kind whose tensors have their sizes and no contents."""
    kind = _LAYERS[precision]
    bias = None if like.bias is None else torch.empty(like.out_features, dtype=torch.bfloat16)
    return kind(like.out_features, like.in_features, kind.sized(like.out_features, like.in_features), bias)


def replace(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at the dotted `path` below `root`."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def held_tensors(model: Any) -> Iterator[Tensor]:
    """Yield every tensor that a model holds."""
    yield from model.parameters()
    yield from model.buffers()

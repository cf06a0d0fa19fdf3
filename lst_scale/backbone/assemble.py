"""Put a checkpoint's weights into transformers' T5, one tensor at a time: meta device first, then every weight read into its place.

A model is its ends (embedding, head, final norms, always whole) and its blocks, which a placement may hold otherwise: divided over
ranks, or off the device.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone import precision as precisions
from lst_scale.backbone.checkpoint import HEAD, SHARED, Checkpoint, read_to
from lst_scale.backbone.kernels import with_fused_kernels
from lst_scale.errors import BackboneError


@dataclass(frozen=True, kw_only=True)
class BlockPlace:
    """One block of a model: which stack, which number, where it sits."""

    stack: str  # "encoder" or "decoder"
    index: int

    @property
    def path(self) -> str:
        """Its name in checkpoints."""
        return f"{self.stack}.block.{self.index}"

    def get(self, model: Any) -> nn.Module:
        block: nn.Module = getattr(model, self.stack).block[self.index]
        return block

    def put(self, model: Any, block: nn.Module) -> None:
        getattr(model, self.stack).block[self.index] = block


def places(model: Any) -> Iterator[BlockPlace]:
    """Yield all blocks in the order in which a forward pass runs them."""
    for stack in ("encoder", "decoder"):
        for index in range(len(getattr(model, stack).block)):
            yield BlockPlace(stack=stack, index=index)


def empty_model(checkpoint: Checkpoint) -> Any:
    """Return the model on the meta device."""
    from transformers import AutoModelForSeq2SeqLM

    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(with_fused_kernels(checkpoint.config))
    return model


def count_parameters(model: Any, checkpoint: Checkpoint) -> int:
    """Count the weights of both stacks and the one embedding, and the head where it is a matrix of its own."""
    stacks = {name: p for name, p in model.named_parameters() if ".block." in name or "final_layer_norm" in name}
    head = model.lm_head.weight.numel() if checkpoint.has_own_head else 0
    return int(sum(p.numel() for p in stacks.values()) + model.shared.weight.numel() + head)


def check_shapes(model: Any, checkpoint: Checkpoint) -> None:
    """Compare every weight's stored shape with the configuration's, from the files' headers: nothing is read, nothing is loaded.

    Raises:
        BackboneError: a file, a tensor or a shape is wrong; the message names it.
    """
    for name, parameter in model.named_parameters():
        if name != HEAD or checkpoint.has_own_head:
            _refuse_shape(checkpoint, name, checkpoint.shape(name), tuple(parameter.shape))


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype of everything that isn't quantized."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def fill_ends(model: Any, checkpoint: Checkpoint, precision: str, device: torch.device) -> None:
    """Put embedding, head and final norms in place."""
    dtype = compute_dtype(precision)
    shared = _read_parameter(checkpoint, SHARED, model.shared.weight, dtype, device)
    model.shared.weight = shared
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    model.lm_head.weight = _read_parameter(checkpoint, HEAD, model.lm_head.weight, dtype, device) if checkpoint.has_own_head else shared
    for stack in ("encoder", "decoder"):
        norm = getattr(model, stack).final_layer_norm
        norm.weight = _read_parameter(checkpoint, f"{stack}.final_layer_norm.weight", norm.weight, dtype, device)


def fill_block(block: nn.Module, path: str, checkpoint: Checkpoint, precision: str, device: torch.device) -> None:
    """Put the weights of the block called `path` in place, cast or quantized as they arrive."""
    return_freed_memory()
    dtype = compute_dtype(precision)
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear) and precision in precisions.QUANTIZED:
            weight = read_checked(checkpoint, f"{path}.{name}.weight", module.weight, torch.bfloat16, device)
            precisions.replace(block, name, precisions.quantized_linear(weight, precision))
            continue
        for parameter_name, parameter in list(module.named_parameters(recurse=False)):
            full = ".".join(part for part in (path, name, parameter_name) if part)
            setattr(module, parameter_name, _read_parameter(checkpoint, full, parameter, dtype, device))


def return_freed_memory() -> None:
    """Give what the last block's temporaries took back to the system: glibc keeps it, and quantizing makes four times a matrix."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def make_room(block: nn.Module, precision: str) -> None:
    """Give an unfilled block the layers of `precision`, so that stored tensors find their places."""
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear) and precision in precisions.QUANTIZED:
            precisions.replace(block, name, precisions.empty_quantized_linear(module, precision))


def read_checked(checkpoint: Checkpoint, name: str, like: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Read one weight and refuse it unless it has the shape that the configuration gives it."""
    value = read_to(checkpoint, name, dtype, device)
    _refuse_shape(checkpoint, name, tuple(value.shape), tuple(like.shape))
    return value


def _read_parameter(checkpoint: Checkpoint, name: str, like: Tensor, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(read_checked(checkpoint, name, like, dtype, device), requires_grad=False)


def _refuse_shape(checkpoint: Checkpoint, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if found != wanted:
        raise BackboneError(
            f"{checkpoint.folder}: {name} has shape {found} where config.json asks for {wanted}: the two are not of one checkpoint"
        )

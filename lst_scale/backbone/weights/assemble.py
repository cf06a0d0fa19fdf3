"""Put a checkpoint's weights into transformers' model, one tensor at a time: meta device first, then every weight read into its place.

A model is its ends (embedding, head, final norms, always whole) and its blocks, which a placement may hold otherwise: divided over
ranks, or off the device.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone.families import BlockRef
from lst_scale.backbone.weights import precision as precisions
from lst_scale.backbone.weights.checkpoint import Checkpoint, read_to
from lst_scale.errors import BackboneError, fence


def empty_model(checkpoint: Checkpoint) -> Any:
    """Return the model on the meta device."""
    with fence(BackboneError, f"{checkpoint.folder}/config.json describes no model that can be built"):
        return checkpoint.family.skeleton(checkpoint.config)


def block_refs(checkpoint: Checkpoint) -> tuple[BlockRef, ...]:
    """Return all blocks in the order in which a forward pass runs them."""
    return checkpoint.family.blocks(checkpoint.spec)


def count_parameters(model: Any, checkpoint: Checkpoint) -> int:
    """Count the weights of an empty model, shared ones once."""
    family, sizes = checkpoint.family, dict[str, int]()
    for name, parameter in model.named_parameters():
        for one in family.canonical((name,)):
            if one != family.head_name or checkpoint.has_own_head:
                sizes[one] = parameter.numel()
    return sum(sizes.values())


def check_shapes(model: Any, checkpoint: Checkpoint) -> None:
    """Compare every weight's stored shape with the configuration's, from the files' headers: nothing is read, nothing is loaded.

    Raises:
        BackboneError: a file, a tensor or a shape is wrong; the message names it.
    """
    _refuse_surplus_blocks(checkpoint)
    for name, parameter in model.named_parameters():
        if name != checkpoint.family.head_name or checkpoint.has_own_head:
            _refuse_shape(checkpoint, name, checkpoint.shape(name), tuple(parameter.shape))


def _refuse_surplus_blocks(checkpoint: Checkpoint) -> None:
    """Refuse weights of more blocks than the configuration has: a shallower model of theirs would train, and be another one."""
    counts = Counter(ref.path.rpartition(".")[0] for ref in block_refs(checkpoint))
    for name in checkpoint.family.canonical(checkpoint.names()):
        for stack, count in counts.items():
            number = name.removeprefix(f"{stack}.").partition(".")[0] if name.startswith(f"{stack}.") else ""
            if number.isdecimal() and int(number) >= count:
                raise BackboneError(
                    f"{checkpoint.folder} holds {name}, but config.json has {count} blocks in {stack}: the two are not of one checkpoint"
                )


def compute_dtype(precision: str) -> torch.dtype:
    """Return the dtype of everything that isn't quantized."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def fill_ends(model: Any, checkpoint: Checkpoint, precision: str, device: torch.device) -> None:
    """Put embedding, head and final norms in place."""
    own_head = checkpoint.has_own_head
    for name in checkpoint.family.ends(own_head=own_head):
        fill_end(model, name, checkpoint, precision, device)
    checkpoint.family.tie(model, own_head=own_head)


def fill_end(model: Any, name: str, checkpoint: Checkpoint, precision: str, device: torch.device) -> None:
    """Put one weight outside the blocks in place."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    setattr(module, last, _read_parameter(checkpoint, name, getattr(module, last), compute_dtype(precision), device))


def fill_block(block: nn.Module, path: str, checkpoint: Checkpoint, precision: str, device: torch.device) -> None:
    """Put the weights of the block called `path` in place, cast or quantized as they arrive."""
    return_freed_memory()
    dtype = compute_dtype(precision)
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear) and precision in precisions.QUANTIZED:
            linear = f"{path}.{name}"
            weight = read_checked(checkpoint, f"{linear}.weight", module.weight, torch.bfloat16, device)
            bias = None if module.bias is None else read_checked(checkpoint, f"{linear}.bias", module.bias, torch.bfloat16, device)
            precisions.replace(block, name, precisions.quantized_linear(weight, precision, bias))
            continue
        for parameter_name, parameter in list(module.named_parameters(recurse=False)):
            full = ".".join(part for part in (path, name, parameter_name) if part)
            setattr(module, parameter_name, _read_parameter(checkpoint, full, parameter, dtype, device))


def filled(module: nn.Module, path: str, read: Callable[[str], Tensor]) -> nn.Module:
    """Return a part of a model that was made on the meta device, with the weights that `read` gives under their full names; frozen."""
    module.load_state_dict({name: read(f"{path}.{name}") for name, _ in module.named_parameters()}, assign=True)
    return module.eval().requires_grad_(False)


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

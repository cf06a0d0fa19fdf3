"""Every matrix of every block divided over the ranks of a group, by DeepSpeed inference (placement `tensor_parallel`).

`deepspeed.init_inference` is given one block at a time: a rank then holds its shards and one whole block at most, never the model.
Embedding, head and norms stay whole on each rank.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone.weights import precision as precisions
from lst_scale.system.distributed import Group


def shard_block(block: Any, config: Any, group: Group, options: dict[str, Any], dtype: torch.dtype, summed: tuple[str, ...]) -> nn.Module:
    """Return this rank's shard of a whole block. All ranks of the group must call it.

    Args:
        block: a block in `dtype`.
        config: the model's transformers configuration, from which AutoTP takes the number of heads.
        options: further arguments of `deepspeed.init_inference`, from a file in ds_configs/.
        summed: the layers whose output is a sum over ranks: AutoTP divides their inputs, and the outputs of all others.
    """
    import deepspeed

    holder = _Holder(block, config)
    with _quiet():
        engine = deepspeed.init_inference(
            holder,
            # The group is said twice: with mpu alone shapes clash.
            tensor_parallel={"tp_size": group.size, "mpu": _Groups(group), "tp_group": group.handle},
            dtype=dtype,
            replace_with_kernel_inject=False,
            injection_policy={type(block): summed},
            **options,
        )
    sharded: nn.Module = engine.module.block[0]
    sharded.eval().requires_grad_(False)  # the shards come back with requires_grad set
    return sharded


def quantize_shards(block: nn.Module, group: Group, precision: str) -> None:
    """Replace DeepSpeed's divided layers by quantized ones that do the same."""
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

    for name, module in list(block.named_modules()):
        if isinstance(module, LinearAllreduce):
            part = _quantized_part(module.weight, group, precision)
            precisions.replace(block, name, SummedLinear(part, group, _frozen(module.bias)))
        elif isinstance(module, LinearLayer):
            precisions.replace(block, name, precisions.quantized_linear(module.weight, precision, _frozen(module.bias)))


def _frozen(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _quantized_part(weight_OI: Tensor, group: Group, precision: str) -> precisions.QuantizedLinear:
    """Quantize this rank's columns. In int8 by the scales of whole rows, so that the shards are those of the undivided matrix; NF4's
    blocks of 64 are the same wherever 64 divides the shard, its nested scales differ by their own rounding."""
    if precision == "int8":
        return precisions.Int8Linear.of_part(weight_OI, group.largest(weight_OI.abs().amax(1)))
    return precisions.quantized_linear(weight_OI, precision)


class SummedLinear(nn.Module):
    """A quantized linear map over a part of the inputs, summed over the ranks that hold the other parts; the bias, whole on each rank,
    is added once."""

    bias: Tensor | None

    def __init__(self, part: precisions.QuantizedLinear, group: Group, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.part, self._group = part, group
        self.weight = None  # as in QuantizedLinear
        self.register_buffer("bias", bias_O)

    def forward(self, hidden: Tensor) -> Tensor:
        return precisions.added(self._group.sum(self.part(hidden)), self.bias)


class _Holder(nn.Module):
    """A model of one block, as `init_inference` wants to see it."""

    def __init__(self, block: nn.Module, config: Any) -> None:
        super().__init__()
        self.config = config
        self.block = nn.ModuleList([block])


class _Groups:
    """What DeepSpeed calls an mpu: it asks for the model-parallel group and nothing else."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def get_model_parallel_group(self) -> Any:
        return self._group.handle


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed reports every call of init_inference; here that is one for each block."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)

"""Is the quantized backbone still the backbone? Measured on the run's first batch, before training.

Each block is compared with the checkpoint's own precision, one block at a time: the reference block is read, run and dropped, so the
check needs the memory of one block. Both streams are carried along, so the error is the accumulated one that the ladder will see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lst_scale.backbone.families import BlockRef
from lst_scale.backbone.masks import causal_mask, padding_mask
from lst_scale.backbone.taps import Backbone, Inputs, TapRequest
from lst_scale.backbone.weights.assemble import filled
from lst_scale.backbone.weights.checkpoint import open_checkpoint, read_to
from lst_scale.errors import BackboneError

# Relative error of the last states on T5-large with planted outlier channels was 0.04 for int8 and 0.28 to 0.32 for nf4 (0.03 and 0.2
# without outliers). Garbage, such as a wrongly cast `wo`, is near or above 1.
DEFAULT_THRESHOLD = {"int8": 0.15, "nf4": 0.5}


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """Relative error ||quantized - reference|| / ||reference|| after every block, over real tokens only."""

    precision: str
    errors: dict[str, float]  # by a block's label
    threshold: float

    @property
    def worst(self) -> tuple[str, float]:
        name = max(self.errors, key=self.errors.__getitem__)
        return name, self.errors[name]

    @property
    def sentence(self) -> str:
        name, error = self.worst
        return f"{self.precision} check: the largest error against the checkpoint is {error:.3f}, in {name} (allowed {self.threshold})"


@torch.no_grad()
def check_quantization(
    backbone: Backbone,
    inputs: Inputs,
    threshold: float | None = None,
) -> QuantizationReport:
    """Compare every block of a quantized backbone with its checkpoint on one batch.

    Raises:
        BackboneError: some block's error is not finite or past the threshold; names the first such block.
    """
    allowed = threshold if threshold is not None else DEFAULT_THRESHOLD[backbone.identity.precision]
    inputs = inputs.to(backbone.device)
    mask_BS = inputs.source_mask_BS
    reference = _Reference(backbone)
    first, second = reference.family.stacks
    all_of_source, all_of_target = (TapRequest(layers=tuple(ref.index for ref in reference.refs(stack))) for stack in (first, second))
    source = backbone.read(inputs.source_BS, mask_BS, all_of_source)
    target = backbone.extend(inputs.target_BT, source, all_of_target)

    states, final_BSD = reference.stack(first, source.taps.embedding, None, mask_BS)
    errors = {ref.label: _error(q, r, mask_BS) for ref, q, r in zip(reference.refs(first), source.taps.tensors, states, strict=True)}
    states, _ = reference.stack(second, target.taps.embedding, final_BSD, mask_BS)
    errors |= {ref.label: _error(q, r, None) for ref, q, r in zip(reference.refs(second), target.taps.tensors, states, strict=True)}

    for name, error in errors.items():
        if not error <= allowed:
            raise BackboneError(
                f"{name} differs by {error:.3f} from the checkpoint in {backbone.identity.precision} (allowed {allowed}): "
                "write backbone.precision=bf16, or raise backbone.max_quantization_error knowingly"
            )
    return QuantizationReport(precision=backbone.identity.precision, errors=errors, threshold=allowed)


class _Reference:
    """Runs one stack of the checkpoint in float32 or bf16, a block at a time."""

    def __init__(self, backbone: Backbone) -> None:
        self.spec, self.device = backbone.spec, backbone.device
        self.checkpoint = open_checkpoint(backbone.identity.checkpoint, backbone.identity.revision)
        self.family = self.checkpoint.family
        # bf16 rounds away 1 % over a deep stack, nearly as much as int8: the reference computes in float32.
        self.dtype = torch.float32

    def refs(self, stack: str) -> list[BlockRef]:
        return [ref for ref in self.family.blocks(self.spec) if ref.stack == stack]

    def stack(self, stack: str, embedding: Tensor, source_final: Tensor | None, source_mask_BS: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the outputs of all blocks (on the CPU in bf16) and the final normed state."""
        hidden = embedding.to(self.dtype)
        cross_mask = padding_mask(source_mask_BS)
        self_mask = cross_mask if source_final is None else causal_mask(hidden.shape[1], 0, hidden.device)
        along: Any = None
        outputs = []
        for ref in self.refs(stack):
            block = filled(self.family.block(self.checkpoint.config, ref), ref.path, self._read)
            if along is None:
                along = self.family.positions(block)(hidden.shape[1], hidden.device)
            source_mask = None if source_final is None else cross_mask
            hidden, along = self.family.run_block(block, hidden, along, mask=self_mask, source=source_final, source_mask=source_mask)
            outputs.append(hidden.to("cpu", torch.bfloat16))
        return outputs, filled(*self.family.final_norm(self.spec, stack), self._read)(hidden)

    def _read(self, name: str) -> Tensor:
        return read_to(self.checkpoint, name, self.dtype, self.device)


def _error(quantized: Tensor, reference: Tensor, mask: Tensor | None) -> float:
    q, r = quantized.float().cpu(), reference.float()
    if mask is not None:
        keep = mask.cpu()[..., None].float()
        q, r = q * keep, r * keep
    return float((q - r).norm() / r.norm())

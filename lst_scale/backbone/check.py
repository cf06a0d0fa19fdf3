"""Is the quantized backbone still the backbone? Measured on the run's first batch, before training.

Each block is compared with the checkpoint's own precision, one block at a time: the reference block is read, run and dropped, so the
check needs the memory of one block. Both streams are carried along, so the error is the accumulated one that the ladder will see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone.families import BlockRef
from lst_scale.backbone.taps import Backbone, Inputs, TapRequest
from lst_scale.backbone.weights.assemble import empty_model, fill_block, fill_end
from lst_scale.backbone.weights.checkpoint import open_checkpoint
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

    states = reference.outputs(source.taps.embedding, target.taps.embedding, mask_BS)
    errors: dict[str, float] = {}
    for stack, mask, taps, expected in ((first, mask_BS, source.taps, states[0]), (second, None, target.taps, states[1])):
        for ref, q, r in zip(reference.refs(stack), taps.tensors, expected, strict=True):
            errors[ref.label] = max(_error(q, r, mask), errors.get(ref.label, 0.0), key=_nan_first)

    for name, error in errors.items():
        if not error <= allowed:
            raise BackboneError(
                f"{name} differs by {error:.3f} from the checkpoint in {backbone.identity.precision} (allowed {allowed}): "
                "write backbone.precision=bf16, or raise backbone.max_quantization_error knowingly"
            )
    return QuantizationReport(precision=backbone.identity.precision, errors=errors, threshold=allowed)


class _Reference:
    """Runs the checkpoint in float32: transformers' own model, each of whose blocks is read before it runs and dropped after."""

    def __init__(self, backbone: Backbone) -> None:
        self.spec, self.device = backbone.spec, backbone.device
        self.checkpoint = open_checkpoint(backbone.identity.checkpoint, backbone.identity.revision)
        self.family = self.checkpoint.family

    def refs(self, stack: str) -> list[BlockRef]:
        return [ref for ref in self.family.blocks(self.spec) if ref.stack == stack]

    def outputs(self, source_BSD: Tensor, target_BTD: Tensor, source_mask_BS: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return what all blocks make of the source and of the target, given their embeddings: on the CPU, in bf16."""
        model, outputs = empty_model(self.checkpoint).eval(), list[Tensor]()
        for name in self.family.ends(own_head=False):
            if name != self.family.embedding_name:
                fill_end(model, name, self.checkpoint, "fp32", self.device)
        for ref in self.family.blocks(self.spec):
            self._come_and_go(ref.get(model), ref.path, outputs)
        # bf16 rounds away 1 % over a deep stack, nearly as much as int8: the reference computes in float32.
        read = self.family.read(model, source_BSD.float(), source_mask_BS)
        of_source = len(outputs)
        self.family.extend(model, target_BTD.float(), read, source_mask_BS, None, None, num_blocks=len(self.refs(self.family.stacks[1])))
        return outputs[:of_source], outputs[of_source:]

    def _come_and_go(self, block: nn.Module, path: str, outputs: list[Tensor]) -> None:
        def come(_block: nn.Module, _inputs: Any) -> None:
            fill_block(block, path, self.checkpoint, "fp32", self.device)

        def go(_block: nn.Module, _inputs: Any, output: Any) -> None:
            outputs.append(self.family.state(output).to("cpu", torch.bfloat16))
            block.to("meta")

        block.register_forward_pre_hook(come)
        block.register_forward_hook(go)


def _nan_first(error: float) -> tuple[bool, float]:
    return error != error, error


def _error(quantized: Tensor, reference: Tensor, mask: Tensor | None) -> float:
    q, r = quantized.float().cpu(), reference.float()
    if mask is not None:
        keep = mask.cpu()[..., None].float()
        q, r = q * keep, r * keep
    return float((q - r).norm() / r.norm())

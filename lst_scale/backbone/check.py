"""Is the quantized backbone still the backbone? Measured on the run's first batch, before training.

Each block is compared with the checkpoint's own precision, one block at a time: the reference block is read, run and dropped, so the
check needs the memory of one block. Both streams are carried along, so the error is the accumulated one that the ladder will see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone.checkpoint import open_checkpoint, read_to
from lst_scale.backbone.local import LocalBackbone
from lst_scale.backbone.masks import causal_mask, padding_mask
from lst_scale.backbone.taps import TapRequest
from lst_scale.errors import BackboneError

# Relative error of the last states on T5-large with planted outlier channels was 0.04 for int8 and 0.28 to 0.32 for nf4 (0.03 and 0.2
# without outliers). Garbage, such as a wrongly cast `wo`, is near or above 1.
DEFAULT_THRESHOLD = {"int8": 0.15, "nf4": 0.5}


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """Relative error ||quantized - reference|| / ||reference|| after every block, over real tokens only."""

    precision: str
    errors: dict[str, float]  # "encoder block 0" -> error
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
    backbone: LocalBackbone,
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor,
    decoder_input_ids_BT: Tensor,
    threshold: float | None = None,
) -> QuantizationReport:
    """Compare every block of a quantized backbone with its checkpoint on one batch.

    Raises:
        BackboneError: some block's error is not finite or past the threshold; names the first such block.
    """
    allowed = threshold if threshold is not None else DEFAULT_THRESHOLD[backbone.identity.precision]
    spec = backbone.spec
    device = backbone.device
    mask_BS = attention_mask_BS.to(device)
    encoder_request = TapRequest(layers=tuple(range(spec.num_layers)))
    decoder_request = TapRequest(layers=tuple(range(spec.num_decoder_layers)))
    encoder = backbone.encode(input_ids_BS.to(device), mask_BS, encoder_request)
    decoder = backbone.decode(decoder_input_ids_BT.to(device), encoder, decoder_request)

    reference = _Reference(backbone)
    states, final_BSD = reference.stack("encoder", encoder.taps.embedding, None, mask_BS)
    errors = {f"encoder block {i}": _error(q, r, mask_BS) for i, (q, r) in enumerate(zip(encoder.taps.tensors, states, strict=True))}
    states, _ = reference.stack("decoder", decoder.taps.embedding, final_BSD, mask_BS)
    errors |= {f"decoder block {i}": _error(q, r, None) for i, (q, r) in enumerate(zip(decoder.taps.tensors, states, strict=True))}

    for name, error in errors.items():
        if not error <= allowed:
            raise BackboneError(
                f"{name} differs by {error:.3f} from the checkpoint in {backbone.identity.precision} (allowed {allowed}): "
                "write backbone.precision=bf16, or raise backbone.max_quantization_error knowingly"
            )
    return QuantizationReport(precision=backbone.identity.precision, errors=errors, threshold=allowed)


class _Reference:
    """Runs one stack of the checkpoint in float32 or bf16, a block at a time."""

    def __init__(self, backbone: LocalBackbone) -> None:
        self.backbone = backbone
        self.checkpoint = open_checkpoint(backbone.identity.checkpoint, backbone.identity.revision)
        # bf16 rounds away 1 % over a deep stack, nearly as much as int8: the reference computes in float32.
        self.dtype = torch.float32

    def stack(self, prefix: str, embedding: Tensor, encoder_final: Tensor | None, encoder_mask: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the outputs of all blocks (on the CPU in bf16) and the final normed state."""
        from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm

        config = self.backbone.stack_config(prefix)
        device = self.backbone.device
        hidden = embedding.to(self.dtype)
        cross_mask = padding_mask(encoder_mask)
        self_mask = cross_mask if prefix == "encoder" else causal_mask(hidden.shape[1], 0, hidden.device)
        bias: Any = None
        outputs = []
        for index in range(config.num_layers):
            with torch.device("meta"):
                block = T5Block(config, has_relative_attention_bias=index == 0, layer_idx=index)
            self._fill(block, f"{prefix}.block.{index}", device)
            hidden, bias, _ = block(
                hidden,
                attention_mask=self_mask,
                position_bias=bias,
                encoder_hidden_states=encoder_final,
                encoder_attention_mask=cross_mask if encoder_final is not None else None,
            )
            outputs.append(hidden.to("cpu", torch.bfloat16))
        norm = T5LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        norm.weight = nn.Parameter(read_to(self.checkpoint, f"{prefix}.final_layer_norm.weight", self.dtype, device), requires_grad=False)
        return outputs, norm(hidden)

    def _fill(self, block: nn.Module, prefix: str, device: torch.device) -> None:
        weights = {name: read_to(self.checkpoint, f"{prefix}.{name}", self.dtype, device) for name, _ in block.named_parameters()}
        block.load_state_dict(weights, assign=True)
        block.eval().requires_grad_(False)


def _error(quantized: Tensor, reference: Tensor, mask: Tensor | None) -> float:
    q, r = quantized.float().cpu(), reference.float()
    if mask is not None:
        keep = mask.cpu()[..., None].float()
        q, r = q * keep, r * keep
    return float((q - r).norm() / r.norm())

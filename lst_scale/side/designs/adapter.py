"""The design "adapter block + gates" of the paper's supplement: the side state has the backbone's full width.

s = dropout(embedding)                                     A(x) = x + dropout(up(gelu_new(down(RMSNorm(x)))))
for i in side_layers:
    s = A0(s)
    s = up_i(CrossAttention(down_i(s), down_i(encoder's side state)))     decoder only, at width d/r
    s = mu * s + (1 - mu) * h_i
    s = A1(s)
s = dropout(RMSNorm(s))
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lst_scale.backbone.families import Family, family_of
from lst_scale.backbone.taps import BackboneSpec, StackTaps, Tap
from lst_scale.side.config import LadderConfig
from lst_scale.side.designs.attention import Dropout, with_cheap_dropout
from lst_scale.side.designs.parts import SideEncoderState, attended, cast_embedding, make_gate, maybe_recompute, narrowing, prepare_tap


class SideAdapter(nn.Module):
    """x + dropout(y + up(gelu_new(down(y)))) with y = RMSNorm(x): two residuals, as in the release."""

    def __init__(self, norm: nn.Module, d_model: int, bottleneck: int, dropout: float) -> None:
        super().__init__()
        self.layer_norm = norm
        self.down = nn.Linear(d_model, bottleneck)
        self.activation = nn.GELU("tanh")
        self.up = nn.Linear(bottleneck, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.layer_norm(hidden)
        result: Tensor = hidden + self.dropout(normed + self.up(self.activation(self.down(normed))))
        return result


class AdapterBlock(nn.Module):
    """Adapter, in the decoder a narrow cross-attention, gate, adapter."""

    def __init__(self, spec: BackboneSpec, config: LadderConfig, family: Family, cache_layer: int, *, is_decoder: bool) -> None:
        super().__init__()
        narrow, width = narrowing(spec, config), spec.side_width(config.reduction_factor)
        self.before, self.after = (
            SideAdapter(family.side_norm(spec, spec.d_model), spec.d_model, width, narrow.dropout) for _ in ("before", "after")
        )
        self.gate = make_gate(config, spec.d_model)
        self.cross = with_cheap_dropout(family.source_attention(spec, narrow, cache_layer=cache_layer)) if is_decoder else None
        if self.cross is not None:
            self.downsample = nn.Linear(spec.d_model, width)
            self.upsample = nn.Linear(width, spec.d_model)

    def forward(self, hidden: Tensor, tap: Tensor, encoder: SideEncoderState | None, cache: Any) -> Tensor:
        hidden = self.before(hidden)
        if self.cross is not None:
            assert encoder is not None
            source, source_mask = attended(encoder)
            keys = self.downsample(source)
            hidden = self.upsample(self.cross(self.downsample(hidden), keys, source_mask, cache))
        result: Tensor = self.after(self.gate(hidden, tap))
        return result


class AdapterStack(nn.Module):
    """The ladder beside one stack of the backbone."""

    def __init__(self, spec: BackboneSpec, config: LadderConfig, *, is_decoder: bool) -> None:
        super().__init__()
        family = family_of(spec.model_type, "this backbone")
        self.normalize_taps, self.recompute = bool(config.normalize_taps), config.recompute
        self.dropout = Dropout(narrowing(spec, config).dropout)
        self.blocks = nn.ModuleDict(
            {str(layer): AdapterBlock(spec, config, family, j, is_decoder=is_decoder) for j, layer in enumerate(config.layers)}
        )
        self.final_norm = family.side_norm(spec, spec.d_model)

    def forward(self, taps: StackTaps, encoder: SideEncoderState | None, mask_BS: Tensor | None, cache: Any | None = None) -> Tensor:
        """Return the final side state (B, S or T, D). Nothing attends within a stack, so no mask is needed."""
        hidden = maybe_recompute(self.recompute, self._enter, taps.embedding)
        for block, tap in zip(self.blocks.values(), taps.hidden, strict=True):
            hidden = maybe_recompute(self.recompute, self._from_tap, block, hidden, tap, encoder, cache)
        final: Tensor = self.dropout(self.final_norm(hidden))
        return final

    def _enter(self, embedding: Tensor) -> Tensor:
        entered: Tensor = self.dropout(cast_embedding(embedding))
        return entered

    def _from_tap(self, block: AdapterBlock, hidden: Tensor, tap: Tap, encoder: SideEncoderState | None, cache: Any) -> Tensor:
        result: Tensor = block(hidden, prepare_tap(tap, normalize=self.normalize_taps), encoder, cache)
        return result

"""The reported design, "transformer block + gates" (Sung et al. 2022, section 3.1): per stack

    s = Dn_first(dropout(embedding))                    Linear d -> d/r with bias
    for i in side_layers:                               ascending
        mu = sigmoid(alpha_i / T)                       scalar
        s  = side_block_i(mu * s + (1 - mu) * Dn_i(h_i))
    s = dropout(RMSNorm(s))

Side blocks are the backbone's own kind of block in a narrower configuration.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lst_scale.backbone.families import Family, Narrowing, family_of
from lst_scale.backbone.masks import causal_mask, padding_mask, seen_so_far
from lst_scale.backbone.taps import BackboneSpec, StackTaps, Tap
from lst_scale.side.config import LadderConfig
from lst_scale.side.designs.attention import Dropout, with_cheap_dropout
from lst_scale.side.designs.parts import (
    SideEncoderState,
    attended,
    cast_embedding,
    make_downsample,
    make_gate,
    maybe_recompute,
    narrowing,
    prepare_tap,
)


class TransformerStack(nn.Module):
    """The ladder beside one stack of the backbone."""

    def __init__(self, spec: BackboneSpec, config: LadderConfig, *, is_decoder: bool) -> None:
        super().__init__()
        self.family: Family = family_of(spec.model_type, "this backbone")
        self.is_decoder = is_decoder
        narrow, width = narrowing(spec, config), spec.side_width(config.reduction_factor)
        keys = [str(layer) for layer in config.layers]
        self.normalize_taps, self.recompute = bool(config.normalize_taps), config.recompute
        self.dropout = Dropout(narrow.dropout)
        self.first_downsample = make_downsample(config, spec.d_model, width)
        self.downsamples = nn.ModuleDict({key: make_downsample(config, spec.d_model, width) for key in keys})
        self.gates = nn.ModuleDict({key: make_gate(config, width) for key in keys})
        self.blocks = nn.ModuleDict({key: with_cheap_dropout(self._make_block(spec, narrow, j, len(keys))) for j, key in enumerate(keys)})
        self.final_norm = self.family.side_norm(spec, width)

    def _make_block(self, spec: BackboneSpec, narrow: Narrowing, j: int, count: int) -> nn.Module:
        return self.family.side_block(spec, narrow, target=self.is_decoder, first=j == 0, cache_layer=j)

    def forward(self, taps: StackTaps, encoder: SideEncoderState | None, mask_BS: Tensor | None, cache: Any | None = None) -> Tensor:
        """Return the final side state (B, S or T, R).

        `mask_BS` is the padding mask of the encoder's own tokens; a decoder masks the future instead, and what `encoder` says is padding.
        """
        hidden = maybe_recompute(self.recompute, self._enter, taps.embedding)
        self_mask = self._self_mask(hidden, mask_BS if encoder is None else encoder.target_mask_BT, cache)
        along = None
        for key, tap in zip(self.blocks, taps.hidden, strict=True):
            hidden, along = maybe_recompute(self.recompute, self._from_tap, key, hidden, tap, encoder, self_mask, along, cache)
        final: Tensor = self.dropout(self.final_norm(hidden))
        return final

    def _enter(self, embedding: Tensor) -> Tensor:
        narrow: Tensor = self.first_downsample(self.dropout(cast_embedding(embedding)))
        return narrow

    def _from_tap(
        self, key: str, hidden: Tensor, tap: Tap, encoder: SideEncoderState | None, self_mask: Tensor, along: Any, cache: Any
    ) -> tuple[Tensor, Any]:
        narrow_tap = self.downsamples[key](prepare_tap(tap, normalize=self.normalize_taps))
        return self._rung(key, hidden, narrow_tap, encoder, self_mask, along, cache)

    def _rung(
        self, key: str, hidden: Tensor, tap: Tensor, encoder: SideEncoderState | None, self_mask: Tensor, along: Any, cache: Any
    ) -> tuple[Tensor, Any]:
        """Return the side state after one block, and what it tells the next of positions."""
        source, source_mask = attended(encoder)
        gated = self.gates[key](hidden, tap)
        return self.family.run_block(self.blocks[key], gated, along, mask=self_mask, source=source, source_mask=source_mask, cache=cache)

    def _self_mask(self, hidden: Tensor, mask_BS: Tensor | None, cache: Any | None) -> Tensor:
        if not self.is_decoder:
            assert mask_BS is not None
            return padding_mask(mask_BS)
        if mask_BS is not None:
            return seen_so_far(mask_BS, hidden.shape[1])
        past = 0 if cache is None else int(cache.get_seq_length())
        return causal_mask(hidden.shape[1], past, hidden.device)

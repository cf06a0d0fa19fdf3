"""The design "transformer block + cross attention" of the paper's supplement: no gates; each block attends to its tap.

s = Dn_first(dropout(embedding))
for i in side_layers:
    s = s + Attention(s)
    s = s + LadderAttention(queries s, keys and values Dn_i(h_i))     masked as the self-attention; its bias too, from the second block on
    s = s + CrossAttention(s, encoder's side state)                   decoder only
    s = s + FeedForward(s)
s = dropout(RMSNorm(s))
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lst_scale.backbone.families import Narrowing
from lst_scale.backbone.taps import BackboneSpec
from lst_scale.side.config import LadderConfig
from lst_scale.side.designs.parts import SideEncoderState, attended
from lst_scale.side.designs.transformer import TransformerStack


class CrossAttentionStack(TransformerStack):
    """The ladder beside one stack of the backbone, without gates."""

    def __init__(self, spec: BackboneSpec, config: LadderConfig, *, is_decoder: bool) -> None:
        super().__init__(spec, config, is_decoder=is_decoder)
        self.gates = nn.ModuleDict()

    def _make_block(self, spec: BackboneSpec, narrow: Narrowing, j: int, count: int) -> nn.Module:
        return self.family.tap_attention_block(spec, narrow, target=self.is_decoder, first=j == 0, cache_layer=j, tap_cache_layer=count + j)

    def _rung(
        self, key: str, hidden: Tensor, tap: Tensor, encoder: SideEncoderState | None, self_mask: Tensor, along: Any, cache: Any
    ) -> tuple[Tensor, Any]:
        after: tuple[Tensor, Any] = self.blocks[key](hidden, tap, along, self_mask, *attended(encoder), cache)
        return after

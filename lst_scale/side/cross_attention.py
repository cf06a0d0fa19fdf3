"""The design "transformer block + cross attention" of the paper's supplement: no gates; each block attends to its tap.

s = Dn_first(dropout(embedding))
for i in side_layers:
    s = s + SelfAttention(s)
    s = s + LadderAttention(queries s, keys and values Dn_i(h_i))     masked as the self-attention; its bias too, from the second block on
    s = s + CrossAttention(s, encoder's side state)                   decoder only
    s = s + FeedForward(s)
s = dropout(RMSNorm(s))
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5LayerCrossAttention, T5LayerFF, T5LayerSelfAttention

from lst_scale.backbone.cache_argument import cache_argument
from lst_scale.backbone.masks import padding_mask
from lst_scale.side.parts import SideEncoderState
from lst_scale.side.transformer import TransformerStack


class CrossAttentionBlock(nn.Module):
    """A T5 block with one attention more, after its self-attention. Names are the release's."""

    def __init__(self, narrow: Any, *, has_relative_attention_bias: bool, layer_idx: int, ladder_layer_idx: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [
                T5LayerSelfAttention(narrow, has_relative_attention_bias=has_relative_attention_bias, layer_idx=layer_idx),
                T5LayerCrossAttention(narrow, layer_idx=ladder_layer_idx),
                *([T5LayerCrossAttention(narrow, layer_idx=layer_idx)] if narrow.is_decoder else []),
                T5LayerFF(narrow),
            ]
        )

    def forward(
        self, hidden: Tensor, tap: Tensor, encoder: SideEncoderState | None, self_mask: Tensor, bias: Any, cache: Any
    ) -> tuple[Tensor, Any]:
        # The release hands the ladder the bias that came into the block: none in the first, the self-attention's in all others.
        ladder_bias = bias
        hidden, bias, _ = self.layer[0](hidden, attention_mask=self_mask, position_bias=bias, **cache_argument(cache))
        # Keys and values of the ladder grow with each new token, as a self-attention's do: they live in that half of the cache.
        growing = None if cache is None else cache.self_attention_cache
        hidden, _, _ = self.layer[1](
            hidden, key_value_states=tap, attention_mask=self_mask, position_bias=ladder_bias, **cache_argument(growing)
        )
        if encoder is not None:
            mask = padding_mask(encoder.attention_mask_BS)
            hidden, _, _ = self.layer[2](hidden, key_value_states=encoder.final_BSR, attention_mask=mask, **cache_argument(cache))
        hidden = self.layer[-1](hidden)
        return hidden, bias


class CrossAttentionStack(TransformerStack):
    """The ladder beside one stack of the backbone, without gates."""

    def __init__(self, spec: Any, config: Any, *, is_decoder: bool) -> None:
        super().__init__(spec, config, is_decoder=is_decoder)
        self.gates = nn.ModuleDict()

    def _make_block(self, narrow: Any, j: int, count: int) -> nn.Module:
        return CrossAttentionBlock(narrow, has_relative_attention_bias=j == 0, layer_idx=j, ladder_layer_idx=count + j)

    def _rung(
        self, key: str, hidden: Tensor, tap: Tensor, encoder: SideEncoderState | None, self_mask: Tensor, bias: Any, cache: Any
    ) -> tuple[Tensor, Any]:
        after: tuple[Tensor, Any] = self.blocks[key](hidden, tap, encoder, self_mask, bias, cache)
        return after

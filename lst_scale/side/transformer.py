"""The reported design, "transformer block + gates" (Sung et al. 2022, section 3.1): per stack

    s = Dn_first(dropout(embedding))                    Linear d -> d/r with bias
    for i in side_layers:                               ascending
        mu = sigmoid(alpha_i / T)                       scalar
        s  = side_block_i(mu * s + (1 - mu) * Dn_i(h_i))
    s = dropout(RMSNorm(s))

Side blocks are transformers' T5Block in a narrower configuration.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm

from lst_scale.backbone.cache_argument import cache_argument
from lst_scale.backbone.masks import causal_mask, padding_mask
from lst_scale.backbone.taps import BackboneSpec, StackTaps, Tap
from lst_scale.side.attention import Dropout, with_cheap_dropout
from lst_scale.side.config import LadderConfig
from lst_scale.side.parts import SideEncoderState, entering, fed, make_downsample, make_gate, narrowed, recomputed


class TransformerStack(nn.Module):
    """The ladder beside one stack of the backbone."""

    def __init__(self, spec: BackboneSpec, config: LadderConfig, *, is_decoder: bool) -> None:
        super().__init__()
        narrow = narrowed(spec, config, is_decoder=is_decoder)
        width, keys = narrow.d_model, [str(layer) for layer in config.side_layers]
        self.is_decoder = is_decoder
        self.normalize_taps, self.recompute = config.normalize_taps, config.recompute
        self.dropout = Dropout(narrow.dropout_rate)
        self.first_downsample = make_downsample(config, spec.d_model, width)
        self.downsamples = nn.ModuleDict({key: make_downsample(config, spec.d_model, width) for key in keys})
        self.gates = nn.ModuleDict({key: make_gate(config, width) for key in keys})
        self.blocks = nn.ModuleDict({key: with_cheap_dropout(self._make_block(narrow, j, len(keys))) for j, key in enumerate(keys)})
        self.final_norm = T5LayerNorm(width, eps=narrow.layer_norm_epsilon)

    def _make_block(self, narrow: Any, j: int, count: int) -> nn.Module:
        # The first kept block owns the relative-position table, the others reuse its bias.
        block: nn.Module = T5Block(narrow, has_relative_attention_bias=j == 0, layer_idx=j)
        return block

    def forward(self, taps: StackTaps, encoder: SideEncoderState | None, mask_BS: Tensor | None, cache: Any | None = None) -> Tensor:
        """Return the final side state (B, S or T, R).

        `mask_BS` is the padding mask of the encoder's own tokens; a decoder masks the future instead.
        """
        hidden = recomputed(self.recompute, self._enter, taps.embedding)
        self_mask = self._self_mask(hidden, mask_BS, cache)
        bias = None
        for key, tap in zip(self.blocks, taps.hidden, strict=True):
            hidden, bias = recomputed(self.recompute, self._from_tap, key, hidden, tap, encoder, self_mask, bias, cache)
        final: Tensor = self.dropout(self.final_norm(hidden))
        return final

    def _enter(self, embedding: Tensor) -> Tensor:
        narrow: Tensor = self.first_downsample(self.dropout(entering(embedding)))
        return narrow

    def _from_tap(
        self, key: str, hidden: Tensor, tap: Tap, encoder: SideEncoderState | None, self_mask: Tensor, bias: Any, cache: Any
    ) -> tuple[Tensor, Any]:
        narrow_tap = self.downsamples[key](fed(tap, normalize=self.normalize_taps))
        return self._rung(key, hidden, narrow_tap, encoder, self_mask, bias, cache)

    def _rung(
        self, key: str, hidden: Tensor, tap: Tensor, encoder: SideEncoderState | None, self_mask: Tensor, bias: Any, cache: Any
    ) -> tuple[Tensor, Any]:
        """Return the side state after one block, and the position bias for the next."""
        hidden, bias, _ = self.blocks[key](
            self.gates[key](hidden, tap),
            attention_mask=self_mask,
            position_bias=bias,
            encoder_hidden_states=None if encoder is None else encoder.final_BSR,
            encoder_attention_mask=None if encoder is None else padding_mask(encoder.attention_mask_BS),
            **cache_argument(cache),
        )
        return hidden, bias

    def _self_mask(self, hidden: Tensor, mask_BS: Tensor | None, cache: Any | None) -> Tensor:
        if not self.is_decoder:
            assert mask_BS is not None
            return padding_mask(mask_BS)
        past = 0 if cache is None else int(cache.get_seq_length())
        return causal_mask(hidden.shape[1], past, hidden.device)

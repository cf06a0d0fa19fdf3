"""The side network: per stack a ladder of downsamples, gates and narrow transformer blocks (Sung et al. 2022, section 3.1).

    s = Dn_first(dropout(embedding))                    Linear d -> d/r with bias
    for i in side_layers:                               ascending
        mu = sigmoid(alpha_i / T)                       scalar
        s  = side_block_i(mu * s + (1 - mu) * Dn_i(h_i))
    s = dropout(RMSNorm(s))
    hidden = Up(s of the decoder)                       Linear d/r -> d, bias; then the backbone's frozen head

Shapes: B rows, S source tokens, T target tokens, D = d_model, R = d_model / r.
Side blocks are transformers' T5Block in a narrower configuration. Every parameter here trains, is float32, and is used by its own
module's forward alone, so that ZeRO-3 can gather it there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm

from lst_scale.backbone.masks import causal_mask, padding_mask
from lst_scale.backbone.taps import BackboneSpec, DecoderState, StackTaps, TapRequest, Taps
from lst_scale.side.config import LadderConfig


class Gate(nn.Module):
    """mu * side + (1 - mu) * tap with mu = sigmoid(alpha / T); alpha starts at 0, so mu at 1/2."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))
        self.temperature = temperature

    def forward(self, side: Tensor, tap: Tensor) -> Tensor:
        mu = torch.sigmoid(self.alpha / self.temperature)
        return mu * side + (1 - mu) * tap


@dataclass(frozen=True, kw_only=True)
class SideEncoderState:
    """The side encoder's result, which the side decoder attends to under the backbone's padding mask."""

    final_BSR: Tensor
    attention_mask_BS: Tensor


class SideStack(nn.Module):
    """The ladder beside one stack of the backbone."""

    def __init__(self, spec: BackboneSpec, config: LadderConfig, *, is_decoder: bool) -> None:
        super().__init__()
        narrow = narrowed(spec, config, is_decoder=is_decoder)
        width, keys = narrow.d_model, [str(layer) for layer in config.side_layers]
        self.is_decoder = is_decoder
        self.normalize_taps = config.normalize_taps
        # In a cache the backbone's blocks come first, the side blocks after them.
        self.first_cache_layer = spec.num_decoder_layers
        self.dropout = nn.Dropout(narrow.dropout_rate)
        self.first_downsample = nn.Linear(spec.d_model, width)
        self.downsamples = nn.ModuleDict({key: nn.Linear(spec.d_model, width) for key in keys})
        self.gates = nn.ModuleDict({key: Gate(config.gate_temperature) for key in keys})
        self.blocks = nn.ModuleDict(
            {
                # The first kept block owns the relative-position table, the others reuse its bias.
                key: T5Block(narrow, has_relative_attention_bias=j == 0, layer_idx=self.first_cache_layer + j)
                for j, key in enumerate(keys)
            }
        )
        self.final_norm = T5LayerNorm(width, eps=narrow.layer_norm_epsilon)

    def forward(self, taps: StackTaps, encoder: SideEncoderState | None, mask_BS: Tensor | None, cache: Any | None = None) -> Tensor:
        """Return the final side state (B, S or T, R).

        `mask_BS` is the padding mask of the encoder's own tokens; a decoder masks the future instead.
        """
        hidden = self.first_downsample(self.dropout(taps.embedding))
        self_mask = self._self_mask(hidden, mask_BS, cache)
        bias = None
        for tap, gate, downsample, block in zip(
            taps.hidden, self.gates.values(), self.downsamples.values(), self.blocks.values(), strict=True
        ):
            hidden, bias, _ = block(
                gate(hidden, downsample(nn.functional.rms_norm(tap, tap.shape[-1:], eps=1e-6) if self.normalize_taps else tap)),
                attention_mask=self_mask,
                position_bias=bias,
                encoder_hidden_states=None if encoder is None else encoder.final_BSR,
                encoder_attention_mask=None if encoder is None else padding_mask(encoder.attention_mask_BS),
                past_key_values=cache,
            )
        final: Tensor = self.dropout(self.final_norm(hidden))
        return final

    def _self_mask(self, hidden: Tensor, mask_BS: Tensor | None, cache: Any | None) -> Tensor:
        if not self.is_decoder:
            assert mask_BS is not None
            return padding_mask(mask_BS)
        past = 0 if cache is None else int(cache.get_seq_length(self.first_cache_layer))
        return causal_mask(hidden.shape[1], past, hidden.device)


class SideNetwork(nn.Module):
    """All that trains. Reads taps, returns the decoder's hidden states for the backbone's frozen head."""

    def __init__(self, spec: BackboneSpec, config: LadderConfig) -> None:
        config.validate(spec)
        super().__init__()
        self.spec, self.config = spec, config
        self.request = TapRequest(layers=tuple(config.side_layers), decoder_final=config.merge_last)
        self.encoder = SideStack(spec, config, is_decoder=False)
        self.decoder = SideStack(spec, config, is_decoder=True)
        self.upsample = nn.Linear(spec.d_model // config.reduction_factor, spec.d_model)
        self.merge_gate = Gate(config.gate_temperature) if config.merge_last else None

    def forward(self, taps: Taps) -> Tensor:
        """Return hidden states (B, T, D), to be scaled and multiplied by the frozen head."""
        encoder = self.encode(taps.encoder, taps.attention_mask_BS)
        return self.decode(DecoderState(taps=taps.decoder, final_BTD=taps.decoder_final_BTD), encoder)

    def encode(self, taps: StackTaps, attention_mask_BS: Tensor) -> SideEncoderState:
        with self._precision(taps):
            final_BSR = self.encoder(self._cast(taps), None, attention_mask_BS)
        return SideEncoderState(final_BSR=final_BSR, attention_mask_BS=attention_mask_BS)

    def decode(self, decoder: DecoderState, encoder: SideEncoderState, cache: Any | None = None) -> Tensor:
        """Return hidden states (B, T, D) of the given positions; with a cache, of the new ones."""
        with self._precision(decoder.taps):
            final_BTR = self.decoder(self._cast(decoder.taps), encoder, None, cache)
            hidden_BTD: Tensor = self.upsample(final_BTR)
            if self.merge_gate is not None:
                assert decoder.final_BTD is not None
                hidden_BTD = self.merge_gate(hidden_BTD, decoder.final_BTD.to(hidden_BTD.dtype))
        return hidden_BTD

    def _cast(self, taps: StackTaps) -> StackTaps:
        """The one cast between backbone and side network. bf16 taps of a bf16 side network stay as they are."""
        if self.config.precision == "bf16":
            return taps
        to = torch.float32
        return StackTaps(layers=taps.layers, embedding=taps.embedding.to(to), hidden=tuple(tap.to(to) for tap in taps.hidden))

    @contextlib.contextmanager
    def _precision(self, taps: StackTaps) -> Iterator[None]:
        if self.config.precision == "bf16":
            with torch.autocast(taps.embedding.device.type, torch.bfloat16):
                yield
        else:
            yield


def narrowed(spec: BackboneSpec, config: LadderConfig, *, is_decoder: bool) -> T5Config:
    """Return the configuration of a side block: widths divided by r, heads unchanged."""
    r = config.reduction_factor
    narrow = T5Config(
        vocab_size=2,  # no embedding is made from it; it must only exceed the token ids that a configuration names
        d_model=spec.d_model // r,
        d_ff=spec.d_ff // r,
        d_kv=spec.d_kv // r,
        num_layers=len(config.side_layers),
        num_heads=spec.num_heads,
        relative_attention_num_buckets=spec.relative_attention_num_buckets,
        relative_attention_max_distance=spec.relative_attention_max_distance,
        dropout_rate=spec.dropout_rate if config.dropout is None else config.dropout,
        layer_norm_epsilon=spec.layer_norm_epsilon,
        feed_forward_proj=spec.feed_forward_proj,
        is_decoder=is_decoder,
    )
    narrow._attn_implementation = "sdpa"
    return narrow

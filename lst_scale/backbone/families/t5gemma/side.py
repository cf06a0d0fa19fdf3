"""What stands beside a T5Gemma 2: T5Gemma's blocks, narrower, with the backbone's width of a head and its rotary frequencies.

Their attention to the source is one of its own, after self-attention: merged into one, as in the backbone, it would need a cache that
knows both. Every block sees all positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5GemmaModuleConfig
from transformers.models.t5gemma.modeling_t5gemma import (
    T5GemmaCrossAttention,
    T5GemmaDecoderLayer,
    T5GemmaEncoderLayer,
    T5GemmaMLP,
    T5GemmaRMSNorm,
    T5GemmaRotaryEmbedding,
    T5GemmaSelfAttention,
)

from lst_scale.backbone.cache_argument import cache_argument
from lst_scale.backbone.families import Narrowing, Sublayer
from lst_scale.backbone.families.t5gemma.model import NOT_CARVED, config_of
from lst_scale.backbone.families.t5gemma.spec import T5GemmaSpec
from lst_scale.errors import LadderError

IMAGES = "images stand beside a T5's text: choose a T5, or leave vision out"


class T5GemmaSide:
    """Side blocks, made."""

    def side_block(self, spec: T5GemmaSpec, narrowing: Narrowing, *, target: bool, first: bool, cache_layer: int) -> nn.Module:
        return SideBlock(_narrow(spec, narrowing, cache_layer, target=target), first=first, layer_idx=cache_layer)

    def tap_attention_block(
        self, spec: T5GemmaSpec, narrowing: Narrowing, *, target: bool, first: bool, cache_layer: int, tap_cache_layer: int
    ) -> nn.Module:
        raise LadderError("design cross_attention stands beside a T5: beside a T5Gemma write design transformer")

    def source_attention(self, spec: T5GemmaSpec, narrowing: Narrowing, *, cache_layer: int) -> nn.Module:
        raise LadderError("design adapter stands beside a T5: beside a T5Gemma write design transformer")

    def side_feed_forward(self, spec: T5GemmaSpec, narrowing: Narrowing) -> nn.Module:
        raise LadderError("design pointwise stands beside a decoder-only model: beside an encoder-decoder write design transformer")

    def side_positions(self, spec: T5GemmaSpec, narrowing: Narrowing) -> nn.Module:
        raise LadderError("the first side block beside a T5Gemma makes its rotary embedding itself")

    def side_norm(self, spec: T5GemmaSpec, width: int) -> nn.Module:
        norm: nn.Module = T5GemmaRMSNorm(width, eps=spec.rms_norm_eps)
        return norm

    def positions_of_text(self, first_block: nn.Module, num_text: int, num_beside: int) -> Any:
        raise LadderError(IMAGES)

    def generation_config(self, spec: T5GemmaSpec, *, side_layers: int) -> Any:
        """Generation asks which tokens begin and end an answer; caches grow as they are filled."""
        return T5Config(
            vocab_size=spec.vocab_size,
            d_model=spec.d_model,
            d_kv=spec.head_dim,
            num_heads=spec.num_heads,
            num_layers=spec.num_decoder_layers + side_layers,
            pad_token_id=spec.pad_token_id,
            eos_token_id=spec.eos_token_id,
            decoder_start_token_id=spec.decoder_start_token_id,
        )


class SideBlock(nn.Module):
    """One of T5Gemma's blocks; the first of a stack also makes cosines and sines for all of them. Nothing of these trains or is stored."""

    def __init__(self, narrow: T5GemmaModuleConfig, *, first: bool, layer_idx: int) -> None:
        super().__init__()
        self.block = (T5GemmaDecoderLayer if narrow.is_decoder else T5GemmaEncoderLayer)(narrow, layer_idx=layer_idx)
        self.rotary = None
        if first:
            with torch.device("cpu"):  # whatever the weights are made on: frequencies are not read from a file
                self.rotary = T5GemmaRotaryEmbedding(narrow)

    def forward(
        self, hidden: Tensor, along: Any, mask: Tensor, source: Tensor | None, source_mask: Tensor | None, cache: Any
    ) -> tuple[Tensor, Any]:
        if self.rotary is not None:
            past = 0 if cache is None else int(cache.get_seq_length())
            along = self.rotary(hidden, torch.arange(past, past + hidden.shape[1], device=hidden.device)[None])
        if source is None:
            return self.block(hidden, along, mask), along
        attended = {"encoder_hidden_states": source, "encoder_attention_mask": source_mask}
        return self.block(hidden, along, mask, **attended, use_cache=cache is not None, **cache_argument(cache)), along


def _narrow(spec: T5GemmaSpec, narrowing: Narrowing, cache_layer: int, *, target: bool) -> T5GemmaModuleConfig:
    """Whole heads of the backbone's width: the rotary embedding is then the backbone's own."""
    r = narrowing.reduction_factor
    kv_heads, width = max(1, round(spec.num_kv_heads / r)), spec.side_width(r)
    rotary = config_of(spec).decoder.rope_parameters
    narrow = T5GemmaModuleConfig(
        vocab_size=2,  # no embedding is made from it
        hidden_size=width,
        intermediate_size=max(8, 8 * round(spec.d_ff / r / 8)),
        num_hidden_layers=cache_layer + 1,
        num_attention_heads=kv_heads * max(1, round(narrowing.heads / r / kv_heads)),
        num_key_value_heads=kv_heads,
        head_dim=spec.head_dim,
        query_pre_attn_scalar=spec.head_dim,
        rms_norm_eps=spec.rms_norm_eps,
        attention_dropout=narrowing.dropout,
        max_position_embeddings=spec.setting("max_position_embeddings", 8192),
        rope_parameters=dict(rotary["full_attention"]),
        layer_types=["full_attention"] * (cache_layer + 1),
        attn_logit_softcapping=None,
        is_decoder=target,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    narrow.dropout_rate, narrow.cross_attention_hidden_size = narrowing.dropout, width
    narrow._attn_implementation = narrowing.attention
    return narrow


class T5GemmaStart:
    """How side blocks start."""

    def draw(self, module: nn.Module, normal: Callable[[Tensor, float], None]) -> Iterable[nn.Module]:
        """Norms 0, which is a factor of 1; every matrix N(0, 1 / its inputs), so that states keep their scale."""
        if isinstance(module, T5GemmaRMSNorm):
            module.weight.zero_()
        elif isinstance(module, T5GemmaSelfAttention | T5GemmaCrossAttention | T5GemmaMLP):
            linears = [linear for linear in module.modules() if isinstance(linear, nn.Linear)]
            for linear in linears:
                normal(linear.weight, linear.in_features**-0.5)
            return linears
        return ()

    def start_positions(self, stack: str, side_blocks: nn.Module, weights: Callable[[str], Tensor]) -> None:
        """Rotary positions have no weights."""

    def sublayers(self, spec: T5GemmaSpec, narrowing: Narrowing, stack: str) -> tuple[Sublayer, ...]:
        raise LadderError(NOT_CARVED)

    def put_carved(self, side_block: nn.Module, carved: dict[str, Tensor], *, attends_to_tap: bool) -> None:
        raise LadderError(NOT_CARVED)

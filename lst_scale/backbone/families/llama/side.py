"""What stands beside a decoder-only model: Llama blocks, narrower, with the backbone's width of a head and its rotary frequencies.

All of the kin get the same kind of side block. What sets them apart (norms of queries and keys, norms after a sublayer, soft caps) keeps
large models stable in training; a side network is small, and a random start lost nothing measurable against one carved out of the
backbone (SmolLM2-135M, movie sentences).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from lst_scale.backbone.families import Narrowing, Sublayer, WholeHeads
from lst_scale.backbone.families.llama.model import config_of
from lst_scale.backbone.families.llama.spec import LlamaSpec
from lst_scale.errors import LadderError


class Rotary(nn.Module):
    """Cosines and sines of positions (B, T), for all blocks of a side network. Nothing in it trains or is stored."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        with torch.device("cpu"):  # whatever the weights are made on: frequencies are not read from a file
            self.embedding = LlamaRotaryEmbedding(config)

    def forward(self, hidden: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        cosines, sines = self.embedding(hidden, positions_BT)
        return cosines, sines


class LlamaSide:
    """Side blocks, made."""

    def side_block(self, spec: LlamaSpec, narrowing: Narrowing, *, target: bool, first: bool, cache_layer: int) -> nn.Module:
        block: nn.Module = LlamaDecoderLayer(_narrow(spec, narrowing), layer_idx=cache_layer)
        return block

    def side_feed_forward(self, spec: LlamaSpec, narrowing: Narrowing) -> nn.Module:
        feed_forward: nn.Module = LlamaMLP(_narrow(spec, narrowing))
        return feed_forward

    def side_positions(self, spec: LlamaSpec, narrowing: Narrowing) -> nn.Module:
        return Rotary(_narrow(spec, narrowing))

    def tap_attention_block(
        self, spec: LlamaSpec, narrowing: Narrowing, *, target: bool, first: bool, cache_layer: int, tap_cache_layer: int
    ) -> nn.Module:
        raise LadderError("design cross_attention stands beside an encoder-decoder: beside a decoder-only model write design transformer")

    def source_attention(self, spec: LlamaSpec, narrowing: Narrowing, *, cache_layer: int) -> nn.Module:
        raise LadderError("design adapter stands beside an encoder-decoder: beside a decoder-only model write design transformer")

    def side_norm(self, spec: LlamaSpec, width: int) -> nn.Module:
        norm: nn.Module = LlamaRMSNorm(width, eps=spec.rms_norm_eps)
        return norm

    def positions_of_text(self, first_block: nn.Module, num_text: int, num_beside: int) -> Any:
        raise LadderError("images stand beside an encoder's text: choose a T5, or leave vision out")

    def generation_config(self, spec: LlamaSpec, *, side_layers: int) -> Any:
        return config_of(spec)


def _narrow(spec: LlamaSpec, narrowing: Narrowing) -> LlamaConfig:
    """Whole heads of the backbone's width: the rotary embedding is then the backbone's own."""
    r = narrowing.reduction_factor
    heads, kv_heads = spec.narrow_heads(r, narrowing.heads)
    narrow = LlamaConfig(
        vocab_size=2,  # no embedding is made from it
        hidden_size=spec.side_width(r),
        intermediate_size=_narrow_feed_forward(spec, r),
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.rms_norm_eps,
        attention_dropout=narrowing.dropout,
        max_position_embeddings=spec.setting("max_position_embeddings", 2048),
        rope_parameters=_rotary_of(spec),
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    narrow._attn_implementation = narrowing.attention
    return narrow


def _narrow_feed_forward(spec: LlamaSpec, reduction_factor: int) -> int:
    return max(8, 8 * round(spec.d_ff / reduction_factor / 8))


def _rotary_of(spec: LlamaSpec) -> dict[str, Any]:
    """Return the rotary frequencies of the backbone's blocks that see everything; where they turn a part of a head, of the whole head."""
    found = config_of(spec).rope_parameters or {}
    found = found.get("full_attention", found)
    if found.get("rope_type") == "longrope":  # its factors are given for a part of a head, and for two lengths
        found = {"rope_type": "default", "rope_theta": found["rope_theta"]}
    return {name: value for name, value in found.items() if name != "partial_rotary_factor"}


class LlamaStart:
    """How side blocks start."""

    def draw(self, module: nn.Module, normal: Callable[[Tensor, float], None]) -> Iterable[nn.Module]:
        """Norms 1; every matrix N(0, 1 / its inputs), so that states keep their scale."""
        if isinstance(module, LlamaRMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, LlamaAttention | LlamaMLP):
            linears = [linear for linear in module.modules() if isinstance(linear, nn.Linear)]
            for linear in linears:
                normal(linear.weight, linear.in_features**-0.5)
            return linears
        return ()

    def leave_alone(self, block: nn.Module, channels: slice) -> None:
        """Let a residual state pass through a side block, or a feed-forward of one, unchanged in some channels."""
        for name, weight in block.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[channels] = 0

    def start_averaging(self, block: nn.Module, channels: slice, to: slice, factors_Q: Tensor) -> None:
        """Let the first head see all tokens so far alike, and add its mean of some channels (of normed states) to others."""
        attention = block.self_attn
        assert isinstance(attention, LlamaAttention)
        of_head, read = slice(0, attention.head_dim), torch.arange(len(factors_Q))
        attention.q_proj.weight[of_head] = 0
        attention.v_proj.weight[read] = 0
        attention.v_proj.weight[read, read + channels.start] = 1
        attention.o_proj.weight[:, read] = 0
        attention.o_proj.weight[read + to.start, read] = factors_Q

    def start_positions(self, stack: str, side_blocks: nn.Module, weights: Callable[[str], Tensor]) -> None:
        """Rotary positions have no weights."""

    def sublayers(self, spec: LlamaSpec, narrowing: Narrowing, stack: str) -> tuple[Sublayer, ...]:
        r = narrowing.reduction_factor
        reason = spec.why_not_carved(r, narrowing.heads)
        if reason is not None:
            raise LadderError(f"{reason}: write initialization: random")
        heads, kv_heads = spec.narrow_heads(r, narrowing.heads)
        whole = WholeHeads(groups=spec.num_kv_heads, kept_groups=kv_heads, kept_in_group=heads // kv_heads, head_dim=spec.head_dim)
        norm_adds = 1.0 if spec.model_type == "gemma" else 0.0
        attention = Sublayer(
            norm="input_layernorm.weight",
            inputs=tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
            output="self_attn.o_proj.weight",
            rows=heads * spec.head_dim,
            heads=whole,
            norm_adds=norm_adds,
        )
        feed_forward = Sublayer(
            norm="post_attention_layernorm.weight",
            inputs=("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            output="mlp.down_proj.weight",
            rows=_narrow_feed_forward(spec, r),
            norm_adds=norm_adds,
        )
        return attention, feed_forward

    def put_carved(self, side_block: nn.Module, carved: dict[str, Tensor], *, attends_to_tap: bool) -> None:
        parameters = dict(side_block.named_parameters())
        assert parameters.keys() == carved.keys(), sorted(parameters.keys() ^ carved.keys())
        for name, parameter in parameters.items():
            parameter.copy_(carved[name])

"""What stands beside T5: side blocks of its own kind in a narrower configuration, how they start, and how they are carved out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import (
    T5Attention,
    T5Block,
    T5LayerCrossAttention,
    T5LayerFF,
    T5LayerNorm,
    T5LayerSelfAttention,
)

from lst_scale.backbone.cache_argument import cache_argument
from lst_scale.backbone.families import Narrowing, Sublayer
from lst_scale.backbone.families.t5.model import DECODER, POSITION_TABLE, with_fused_kernels
from lst_scale.backbone.families.t5.spec import T5Spec
from lst_scale.errors import LadderError


class T5Side:
    """Side blocks, made."""

    def side_block(self, spec: T5Spec, narrowing: Narrowing, *, target: bool, first: bool, cache_layer: int) -> nn.Module:
        # The first kept block owns the relative-position table, the others reuse its bias.
        block: nn.Module = T5Block(_narrow(spec, narrowing, is_decoder=target), has_relative_attention_bias=first, layer_idx=cache_layer)
        return block

    def tap_attention_block(
        self, spec: T5Spec, narrowing: Narrowing, *, target: bool, first: bool, cache_layer: int, tap_cache_layer: int
    ) -> nn.Module:
        return T5TapAttentionBlock(
            _narrow(spec, narrowing, is_decoder=target),
            has_relative_attention_bias=first,
            layer_idx=cache_layer,
            ladder_layer_idx=tap_cache_layer,
        )

    def source_attention(self, spec: T5Spec, narrowing: Narrowing, *, cache_layer: int) -> nn.Module:
        return T5SourceAttention(_narrow(spec, narrowing, is_decoder=True), layer_idx=cache_layer)

    def side_positions(self, spec: T5Spec, narrowing: Narrowing) -> nn.Module:
        raise LadderError("the first side block beside a T5 makes its position bias itself")

    def side_norm(self, spec: T5Spec, width: int) -> nn.Module:
        norm: nn.Module = T5LayerNorm(width, eps=spec.layer_norm_epsilon)
        return norm

    def positions_of_text(self, first_block: nn.Module, num_text: int, num_beside: int) -> Tensor:
        """The position bias among the text; 0 where a token beside it is row or column."""
        attention = first_block.get_submodule("layer.0.SelfAttention")
        bias: Tensor = attention.compute_bias(num_text, num_text, device=attention.q.weight.device)  # type: ignore[operator,union-attr]
        return nn.functional.pad(bias, (0, num_beside, 0, num_beside))

    def side_feed_forward(self, spec: T5Spec, narrowing: Narrowing) -> nn.Module:
        raise LadderError("design pointwise stands beside a decoder-only model: beside an encoder-decoder write design transformer")

    def generation_config(self, spec: T5Spec, *, side_layers: int) -> Any:
        return T5Config(
            vocab_size=spec.vocab_size,
            d_model=spec.d_model,
            d_kv=spec.d_kv,
            num_heads=spec.num_heads,
            num_layers=spec.num_decoder_layers + side_layers,
            pad_token_id=spec.pad_token_id,
            eos_token_id=spec.eos_token_id,
            decoder_start_token_id=spec.decoder_start_token_id,
        )


class T5TapAttentionBlock(nn.Module):
    """A T5 block with one attention more, after its self-attention. Names are the release's."""

    def __init__(self, narrow: T5Config, *, has_relative_attention_bias: bool, layer_idx: int, ladder_layer_idx: int) -> None:
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
        self, hidden: Tensor, tap: Tensor, along: Any, mask: Tensor, source: Tensor | None, source_mask: Tensor | None, cache: Any
    ) -> tuple[Tensor, Any]:
        # The release hands the ladder the bias that came into the block: none in the first, the self-attention's in all others.
        ladder_bias = along
        hidden, bias, _ = self.layer[0](hidden, attention_mask=mask, position_bias=along, **cache_argument(cache))
        # Keys and values of the ladder grow with each new token, as a self-attention's do: they live in that half of the cache.
        growing = None if cache is None else cache.self_attention_cache
        hidden, _, _ = self.layer[1](
            hidden, key_value_states=tap, attention_mask=mask, position_bias=ladder_bias, **cache_argument(growing)
        )
        if source is not None:
            hidden, _, _ = self.layer[2](hidden, key_value_states=source, attention_mask=source_mask, **cache_argument(cache))
        hidden = self.layer[-1](hidden)
        return hidden, bias


class T5SourceAttention(T5LayerCrossAttention):  # type: ignore[misc]
    """An attention to the source's states."""

    def forward(self, hidden: Tensor, source: Tensor, source_mask: Tensor, cache: Any) -> Tensor:
        attended: Tensor = super().forward(hidden, key_value_states=source, attention_mask=source_mask, **cache_argument(cache))[0]
        return attended


def _narrow(spec: T5Spec, narrowing: Narrowing, *, is_decoder: bool) -> T5Config:
    r = narrowing.reduction_factor
    narrow = T5Config(
        vocab_size=2,  # no embedding is made from it; it must only exceed the token ids that a configuration names
        d_model=spec.d_model // r,
        d_ff=spec.d_ff // r,
        d_kv=spec.d_kv // r,
        num_heads=narrowing.heads,
        relative_attention_num_buckets=spec.relative_attention_num_buckets,
        relative_attention_max_distance=spec.relative_attention_max_distance,
        dropout_rate=narrowing.dropout,
        layer_norm_epsilon=spec.layer_norm_epsilon,
        feed_forward_proj=spec.feed_forward_proj,
        is_decoder=is_decoder,
    )
    return with_fused_kernels(narrow, narrowing.attention)


class T5Start:
    """How side blocks start: at random, or carved out of the backbone."""

    def draw(self, module: nn.Module, normal: Callable[[Tensor, float], None]) -> Iterable[nn.Module]:
        """T5's own start (mesh-tensorflow) at the narrow widths.

        | weight | start |
        | --- | --- |
        | norms | 1 |
        | q | N(0, 1 / (width * d_kv)): T5 attention has no 1/sqrt(d_kv), the start carries it |
        | k, v, wi, position table | N(0, 1 / width) |
        | o | N(0, 1 / (heads * d_kv)) |
        | wo | N(0, 1 / d_ff) |
        """
        if isinstance(module, T5LayerNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, T5Attention):
            normal(module.q.weight, (module.d_model * module.key_value_proj_dim) ** -0.5)
            normal(module.k.weight, module.d_model**-0.5)
            normal(module.v.weight, module.d_model**-0.5)
            normal(module.o.weight, (module.n_heads * module.key_value_proj_dim) ** -0.5)
            if module.has_relative_attention_bias:
                normal(module.relative_attention_bias.weight, module.d_model**-0.5)
            return (module.q, module.k, module.v, module.o)
        elif isinstance(module, T5LayerFF):
            linears = [linear for linear in module.DenseReluDense.children() if isinstance(linear, nn.Linear)]
            for linear in linears:
                normal(linear.weight, linear.in_features**-0.5)
            return linears
        return ()

    def start_positions(self, stack: str, side_blocks: nn.Module, weights: Callable[[str], Tensor]) -> None:
        """The first side block starts with the backbone's whole table; with fewer heads, with every (H / h)-th head's column of it."""
        table = weights(f"{stack}.block.0.layer.0.SelfAttention.{POSITION_TABLE}.weight")
        (parameter,) = (p for name, p in side_blocks.named_parameters() if POSITION_TABLE in name)
        if parameter.shape[1] < table.shape[1]:
            table = table[:, torch.arange(parameter.shape[1]) * table.shape[1] // parameter.shape[1]]
        if parameter.shape != table.shape:
            raise LadderError(f"the backbone's position table is {tuple(table.shape)}, the side network's {tuple(parameter.shape)}")
        parameter.copy_(table)

    def sublayers(self, spec: T5Spec, narrowing: Narrowing, stack: str) -> tuple[Sublayer, ...]:
        r = narrowing.reduction_factor
        wi = ("wi_0", "wi_1") if spec.gated else ("wi",)
        attentions = ("SelfAttention", "EncDecAttention") if stack == DECODER else ("SelfAttention",)
        kinds: list[tuple[str, tuple[str, ...], str, int]] = [
            *((kind, ("q", "k", "v"), "o", narrowing.heads * spec.d_kv // r) for kind in attentions),
            ("DenseReluDense", wi, "wo", spec.d_ff // r),
        ]
        return tuple(
            Sublayer(
                norm=f"layer.{index}.layer_norm.weight",
                inputs=tuple(f"layer.{index}.{kind}.{name}.weight" for name in inputs),
                output=f"layer.{index}.{kind}.{output}.weight",
                rows=rows,
            )
            for index, (kind, inputs, output, rows) in enumerate(kinds)
        )

    def put_carved(self, side_block: nn.Module, carved: dict[str, Tensor], *, attends_to_tap: bool) -> None:
        if attends_to_tap:
            carved = _with_tap_attention(carved)
        parameters = {name: p for name, p in side_block.named_parameters() if POSITION_TABLE not in name}
        assert parameters.keys() == carved.keys(), sorted(parameters.keys() ^ carved.keys())
        for name, parameter in parameters.items():
            parameter.copy_(carved[name])


def _with_tap_attention(carved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a block's weights with the self-attention's once more as its attention to the tap, layer 1; later layers move up by one."""
    moved = {}
    for name, tensor in carved.items():
        layer, rest = name.removeprefix("layer.").split(".", 1)
        moved[f"layer.{int(layer) + (layer != '0')}.{rest}"] = tensor
        if layer == "0":
            moved[f"layer.1.{rest.replace('SelfAttention', 'EncDecAttention')}"] = tensor
    return moved

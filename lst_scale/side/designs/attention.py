"""Attention and dropout of the side blocks: torch's fused kernels where they are, and on the CPU, which has none with dropout, a plain one.

Heads are not narrowed with the widths, so the score maps of a side block are as large as the backbone's, and on the CPU drawing their
dropout is most of a side network's time. torch draws a 64-bit number for each score and goes over the whole maps a dozen times; here 16
bits decide (a rate is met to 1/65536), and a few rows' maps at a time go through all that is done with them while they are in the
processor's cache. What waits for the backward pass is the softmax and a byte a score.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "lst_side"


def side_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return attention's output (B, T, H, d_kv), under transformers' interface for attention functions.

    `attention_mask` is boolean (True: may be seen) or added to the scores. `position_bias` is (1 or B, H, T, S), or (1, B * H, T, S) where
    each row has a table of its own.
    """
    if position_bias is not None and position_bias.shape[1] != query.shape[1]:
        position_bias = position_bias.view(len(query), query.shape[1], *position_bias.shape[2:])
    if dropout == 0.0 or attention_mask is None or draws_within_kernel(query.device):
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, position_bias=position_bias, **kwargs
        )
        return result
    if key.shape[1] != query.shape[1]:  # several heads of queries read the same keys
        key, value = (held.repeat_interleave(query.shape[1] // held.shape[1], 1) for held in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, torch.finfo(query.dtype).min)
    scaled = query if scale == 1.0 else query * scale
    output: Tensor = _DroppedAttention.apply(scaled, key, value, position_bias, attention_mask, dropout)  # type: ignore[no-untyped-call]
    return output, None


class _DroppedAttention(torch.autograd.Function):
    """dropout(softmax(q k^T + bias + mask)) v, a few rows at a time. Shapes: q (B, H, T, d), k and v (B, H, S, d), result (B, T, H, d)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, position_bias: Tensor | None, attention_mask: Tensor, rate: float
    ) -> Tensor:
        B, H, T, _ = query.shape
        weights = query.new_empty(B, H, T, key.shape[2])
        masks = torch.empty(weights.shape, dtype=torch.int8, device=query.device)
        output = query.new_empty(B, T, H, value.shape[-1])
        for rows in _row_groups(weights.shape):
            scores = torch.matmul(query[rows], key[rows].transpose(2, 3))
            if position_bias is not None:
                scores += _rows_of(position_bias, rows)
            scores += _rows_of(attention_mask, rows)
            torch.softmax(scores, dim=-1, out=weights[rows])
            mask = bernoulli_mask(scores.shape, rate, scores)
            masks[rows] = mask
            output[rows] = narrow_product(mask.mul_(weights[rows]), value[rows]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, weights, masks)
        ctx.rate, ctx.bias = rate, position_bias if position_bias is not None and ctx.needs_input_grad[3] else None
        return output.div_(1 - rate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, masks = ctx.saved_tensors
        (output_gradient,) = gradients
        for_query, for_key, for_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        for_bias = None if ctx.bias is None else torch.zeros_like(ctx.bias)
        for rows in _row_groups(weights.shape):
            outer, mask = output_gradient[rows].transpose(1, 2) / (1 - ctx.rate), masks[rows].to(weights.dtype)
            for_weights = torch.matmul(outer, value[rows].transpose(2, 3)).mul_(mask)
            for_value[rows] = narrow_product(mask.mul_(weights[rows]).transpose(2, 3), outer)
            for_scores = torch._softmax_backward_data(for_weights, weights[rows], -1, weights.dtype)
            for_query[rows] = narrow_product(for_scores, key[rows])
            for_key[rows] = narrow_product(for_scores.transpose(2, 3), query[rows])
            if for_bias is not None:
                _rows_of(for_bias, rows).add_(for_scores.sum(0, keepdim=True) if len(for_bias) == 1 else for_scores)
        return for_query, for_key, for_value, for_bias, None, None


def narrow_product(maps: Tensor, states: Tensor) -> Tensor:
    """Return maps @ states, (B, H, T, S) @ (B, H, S, d).

    A side network's heads are d_kv / r wide. For fewer than 16 columns MKL takes four times as long as for as few rows (0.22 ms against
    0.06 for 12 maps of 128 x 128 and d = 8), so there it is asked for the transpose.
    """
    if states.shape[-1] < 16 and min(maps.shape[-2:]) >= 32 and states.dtype == torch.float32:
        return torch.matmul(states.transpose(2, 3), maps.transpose(2, 3)).transpose(2, 3)
    return torch.matmul(maps, states)


def _row_groups(shape: torch.Size, most: int = 1 << 18) -> list[slice]:
    """Cut the rows of score maps (B, H, T, S) into groups of about `most` scores, which a processor's cache holds."""
    size = max(1, most // max(1, shape[1:].numel()))
    return [slice(first, first + size) for first in range(0, shape[0], size)]


def _rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """Return these rows of what may be the same for all."""
    return tensor if len(tensor) == 1 else tensor[rows]


def draws_within_kernel(device: torch.device) -> bool:
    """Whether this device's attention kernels draw dropout themselves and store no mask."""
    return device.type == "cuda"


def bernoulli_mask(shape: torch.Size, rate: float, like: Tensor) -> Tensor:
    """Return a tensor of `like`'s dtype in which each element is 0 with probability `rate` and 1 otherwise, from 16 random bits each."""
    count = shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    # Compared straight into place: twice as fast as a boolean mask, and multiplying by it six times as fast as masked_fill.
    result = torch.empty(count, dtype=like.dtype, device=like.device)
    return torch.ge(bits.view(torch.int16)[:count], round(rate * 2**16) - 2**15, out=result).view(shape)


class _Dropped(torch.autograd.Function):
    """Dropout that keeps a byte an element for its backward pass."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, rate: float) -> Tensor:
        mask = bernoulli_mask(input.shape, rate, input)
        ctx.save_for_backward(mask.to(torch.int8))
        ctx.scale = 1 / (1 - rate)
        return mask.mul_(input).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (mask,) = gradients, ctx.saved_tensors
        return mask.to(gradient.dtype).mul_(gradient).mul_(ctx.scale), None


class Dropout(nn.Dropout):
    """Dropout that draws its mask as attention's is drawn; on a GPU torch's own."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0 or draws_within_kernel(input.device):
            return super().forward(input)
        result: Tensor = _Dropped.apply(input, self.p)  # type: ignore[no-untyped-call]
        return result


def with_cheap_dropout(module: nn.Module) -> nn.Module:
    """Return `module` with each of its dropouts replaced by one of these."""
    for child in list(module.modules()):
        for name, part in list(child.named_children()):
            if type(part) is nn.Dropout:
                setattr(child, name, Dropout(part.p))
    return module


ALL_ATTENTION_FUNCTIONS.register(NAME, side_attention)

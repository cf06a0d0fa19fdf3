"""Attention and dropout of the side blocks: torch's fused kernels where they are, and on the CPU, which has none with dropout, a plain one.

Heads are not narrowed with the widths, so the score maps of a side block are as large as the backbone's, and on the CPU drawing their
dropout is most of a side network's time. torch draws a 64-bit number for each score and looks at the result several times over; here
16 bits decide (a rate is met to 1/65536) and nothing is looked at twice: a step on cached taps takes about half.
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

    `attention_mask` is boolean (True: may be seen) or added to the scores.
    """
    if dropout == 0.0 or attention_mask is None or draws_within_kernel(query.device):
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, position_bias=position_bias, **kwargs
        )
        return result
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query if scale == 1.0 else query * scale, key.transpose(2, 3))  # then in place: its own product needs none of it
    if position_bias is not None:
        scores += position_bias
    if attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=scores.dtype).masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
    scores += attention_mask
    kept = torch.softmax(scores, dim=-1).masked_fill(dropped(scores.shape, dropout, scores.device), 0.0)
    return torch.matmul(kept, value / (1 - dropout)).transpose(1, 2).contiguous(), None


def draws_within_kernel(device: torch.device) -> bool:
    """Whether this device's attention kernels draw dropout themselves and store no mask."""
    return device.type == "cuda"


def dropped(shape: torch.Size, rate: float, device: torch.device) -> Tensor:
    """Return a boolean tensor in which each element is True with probability `rate`, from 16 random bits each."""
    count = shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
    return (bits.view(torch.int16)[:count] < round(rate * 2**16) - 2**15).view(shape)


class Dropout(nn.Dropout):
    """Dropout that draws its mask as attention's is drawn; on a GPU torch's own."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0 or draws_within_kernel(input.device):
            return super().forward(input)
        return input.masked_fill(dropped(input.shape, self.p, input.device), 0.0) / (1 - self.p)


def with_cheap_dropout(module: nn.Module) -> nn.Module:
    """Return `module` with each of its dropouts replaced by one of these."""
    for child in list(module.modules()):
        for name, part in list(child.named_children()):
            if type(part) is nn.Dropout:
                setattr(child, name, Dropout(part.p))
    return module


ALL_ATTENTION_FUNCTIONS.register(NAME, side_attention)

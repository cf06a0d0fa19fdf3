"""Attention masks as booleans, True where a key may be seen: what transformers' T5 attention adds its position bias under."""

from __future__ import annotations

import torch
from torch import Tensor


def padding_mask(attention_mask_BS: Tensor) -> Tensor:
    """Return (B, 1, 1, S): every query sees the real tokens."""
    return attention_mask_BS[:, None, None, :].bool()


def causal_mask(length: int, past: int, device: torch.device) -> Tensor:
    """Return (1, 1, length, past + length): new position t sees all cached positions and the new ones up to itself."""
    query = torch.arange(length, device=device)[:, None] + past
    key = torch.arange(past + length, device=device)[None, :]
    return (key <= query)[None, None]

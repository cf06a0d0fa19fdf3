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


def seen_so_far(mask: Tensor, length: int) -> Tensor:
    """Return (B, 1, length, past + length) of a mask of all tokens (B, past + length): each new one sees the real ones up to itself.

    Padding sees itself at least: attention over nothing would not be finite.
    """
    past = mask.shape[1] - length
    causal = causal_mask(length, past, mask.device)
    own = torch.eye(length, dtype=torch.bool, device=mask.device)
    return (causal & padding_mask(mask)) | torch.nn.functional.pad(own, (past, 0))[None, None]


def whole_mask(mask_BS: Tensor, past: int, length: int) -> Tensor:
    """Return the mask of all past and new tokens (B, past + length), given the whole one, or that of the past alone."""
    missing = past + length - mask_BS.shape[1]
    assert missing in (0, length), f"a mask of {mask_BS.shape[1]} tokens for {past} and {length} more"
    return torch.nn.functional.pad(mask_BS, (0, missing), value=1)


def positions_of(mask: Tensor, length: int) -> Tensor:
    """Return the positions (B, length) of the last tokens of a mask: padding before a row's first token, or between tokens, does not count.

    So what a target is told of positions does not depend on the longest source beside its own. Padding after a row's last token counts on,
    as in transformers, where nobody looks at it.
    """
    past = mask.shape[1] - length
    before, new = mask[:, :past].sum(1, keepdim=True), mask[:, past:]
    after_last = (new.flip(1).cumsum(1) == 0).flip(1).long()
    return (before + new.cumsum(1) + after_last.cumsum(1) - 1).clamp(min=0)

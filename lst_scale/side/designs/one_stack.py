"""The transformer design beside a decoder-only model: one ladder along all tokens.

    s = Dn_first(dropout(RMS(embedding)))
    for i in side_layers:                               ascending
        s = side_block_i(mu * s + (1 - mu) * Dn_i(RMS(h_i)))
    s = dropout(RMSNorm(s))

Taps are RMS-normalised unless a recipe says otherwise, the embedding among them: at a text's first token the states of a large language
model are 20 to 200 times larger than elsewhere, and one channel dominates the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lst_scale.backbone.masks import positions_of, seen_so_far
from lst_scale.backbone.taps import BackboneSpec, PackedTap, StackTaps, Tap
from lst_scale.side.config import LadderConfig
from lst_scale.side.designs.parts import maybe_recompute, narrowing, prepare_tap
from lst_scale.side.designs.transformer import TransformerStack


@dataclass(frozen=True, kw_only=True)
class SidePrefix:
    """What comes before a target: the source's taps, and a mask of its tokens, or of all tokens up to the target's last."""

    taps: StackTaps
    attention_mask_BS: Tensor


class OneStack(TransformerStack):
    """The ladder beside a decoder-only model."""

    def __init__(self, spec: BackboneSpec, config: LadderConfig) -> None:
        super().__init__(spec, config, is_decoder=True)
        self.positions = self.family.side_positions(spec, narrowing(spec, config))

    def forward(self, taps: StackTaps, encoder: Any, mask_BS: Tensor | None, cache: Any | None = None) -> Tensor:
        """Return the side state (B, T, R) of the tokens whose taps are given: the last of those that `mask_BS` (B, past + T) has."""
        assert mask_BS is not None
        length = taps.embedding.shape[1]
        hidden = maybe_recompute(self.recompute, self._enter, taps.embedding)
        self_mask, along = seen_so_far(mask_BS, length), self.positions(hidden, positions_of(mask_BS, length))
        for key, tap in zip(self.blocks, taps.hidden, strict=True):
            hidden, along = maybe_recompute(self.recompute, self._from_tap, key, hidden, tap, None, self_mask, along, cache)
        final: Tensor = self.dropout(self.final_norm(hidden))
        return final

    def _enter(self, embedding: Tensor) -> Tensor:
        narrow: Tensor = self.first_downsample(self.dropout(prepare_tap(embedding, normalize=self.normalize_taps)))
        return narrow


def followed_by(first: StackTaps, then: StackTaps) -> StackTaps:
    """Return the taps of some tokens and of those after them as those of one text."""
    embedding = torch.cat([first.embedding, then.embedding], 1)
    return StackTaps(layers=then.layers, embedding=embedding, hidden=tuple(map(_joined, first.hidden, then.hidden)))


def _joined(first: Tap, then: Tap) -> Tap:
    if isinstance(first, PackedTap):
        assert isinstance(then, PackedTap)
        values, scales = torch.cat([first.values_BSD, then.values_BSD], 1), torch.cat([first.scale_BS1, then.scale_BS1], 1)
        return PackedTap(values_BSD=values, scale_BS1=scales)
    assert isinstance(then, Tensor)
    return torch.cat([first, then], 1)

"""Tensors to what a backbone takes."""

from __future__ import annotations

from torch import Tensor

from lst_scale.backbone.taps import Inputs


def inputs_of(source_BS: Tensor, source_mask_BS: Tensor, target_BT: Tensor, lengths: tuple[int, ...] | None = None) -> Inputs:
    return Inputs(source_BS=source_BS, source_mask_BS=source_mask_BS, target_BT=target_BT, target_lengths=lengths)

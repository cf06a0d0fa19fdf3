"""Token-level cross-entropy over the backbone's frozen head, and the shift that makes decoder inputs of labels."""

from __future__ import annotations

import torch
from torch import Tensor

from lst_scale.backbone.taps import BackboneSpec, FrozenHead

IGNORED = -100


def shift_right(labels_BT: Tensor, spec: BackboneSpec) -> Tensor:
    """Return decoder input ids (B, T): the start token, then the labels but the last; ignored ones become padding."""
    shifted = torch.full_like(labels_BT, spec.decoder_start_token_id)
    shifted[:, 1:] = labels_BT[:, :-1]
    return shifted.masked_fill(shifted == IGNORED, spec.pad_token_id)


def cross_entropy_sum(head: FrozenHead, hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[Tensor, int]:
    """Return the summed negative log-likelihood in nats (float32 scalar) and the number of tokens it covers.

    Positions labelled -100 never meet the head: their logits, the widest tensor of a step, are not made. Without any labelled
    position the sum is 0 and still has a gradient (of 0), so that a rank with filler rows alone joins its peers' reductions.
    """
    keep_BT = labels_BT != IGNORED
    logits_NV = head(hidden_BTD[keep_BT])
    loss = torch.nn.functional.cross_entropy(logits_NV.float(), labels_BT[keep_BT], reduction="sum")
    return loss + 0.0 * hidden_BTD.float().sum(), int(keep_BT.sum())


def mean_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the mean negative log-likelihood in nats (float32 scalar) over the labels that are not -100; 0 when all are."""
    nll = torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    return nll / (labels_BT != IGNORED).sum().clamp(min=1)

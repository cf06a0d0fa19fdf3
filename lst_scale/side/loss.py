"""Token-level cross-entropy over the backbone's frozen head, and the target ids that labels are predicted from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lst_scale.backbone.families import family_of
from lst_scale.backbone.taps import BackboneSpec, FrozenHead
from lst_scale.errors import LadderError, did_you_mean
from lst_scale.inputs.batch import moved
from lst_scale.inputs.keys import IGNORED

CHUNK = 256  # tokens whose logits exist at once: 33 MB in float32 for T5's 32,128 pieces


def shift_right(labels_BT: Tensor, spec: BackboneSpec) -> Tensor:
    """Return the target ids (B, T) that a backbone reads to predict these labels."""
    return family_of(spec.model_type, "this backbone").divide(spec, labels_BT, labels_BT, labels_BT)[2]


def cross_entropy_sum(head: FrozenHead, hidden_BTD: Tensor, labels_BT: Tensor, weights_B: Tensor | None = None) -> tuple[Tensor, int]:
    """Return the summed negative log-likelihood in nats (float32 scalar) and the number of tokens it covers.

    Labels may be on the CPU while the states are on a GPU: then nobody waits for the GPU to say which positions count.
    Positions labelled -100 never meet the head. The others meet it CHUNK at a time, and since the head is frozen their gradient is
    made on the spot: logits, the widest tensor of a step, exist for one chunk and are not kept. Without any labelled position the sum
    is 0 and still has a gradient (of 0), so that a rank with filler rows alone joins its peers' reductions. With `weights_B` each token's
    counts as often as its row's weight says.
    """
    kept_N = labelled_positions(labels_BT)
    labels_N = moved(labels_BT.flatten()[kept_N], hidden_BTD.device)
    hidden_ND = hidden_BTD.flatten(0, 1)[moved(kept_N, hidden_BTD.device)]
    weights_N = None
    if weights_B is not None:
        weights_N = moved(weights_B.repeat_interleave(labels_BT.shape[1])[kept_N], hidden_BTD.device)
    nll: Tensor = _HeadLoss.apply(hidden_ND, labels_N, head, weights_N)  # type: ignore[no-untyped-call]
    return nll + 0.0 * hidden_BTD.float().sum(), len(kept_N)


def labelled_positions(labels_BT: Tensor) -> Tensor:
    """Return which of the B * T positions, counted row by row, have a label."""
    return (labels_BT.flatten() != IGNORED).nonzero()[:, 0]


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy over a frozen head. Keeps the gradient of the hidden states, (N, D), in place of the logits, (N, V).

    nll = log sum exp(logits) - logits[label];  d nll / d logits = softmax(logits) - onehot(label), made where the logits were.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, labels_N: Tensor, head: FrozenHead, weights_N: Tensor | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND)
        for start in range(0, len(labels_N), CHUNK):
            hidden, labels_N1 = hidden_ND[start : start + CHUNK], labels_N[start : start + CHUNK, None]
            logits_NV = head(hidden).float()
            slope_NV = head.slope(logits_NV)
            largest_N1 = logits_NV.amax(-1, keepdim=True)
            weights_N1 = None if weights_N is None else weights_N[start : start + CHUNK, None]
            total += _weighted(largest_N1 - logits_NV.gather(-1, labels_N1), weights_N1).sum()
            sums_N1 = logits_NV.sub_(largest_N1).exp_().sum(-1, keepdim=True)
            total += _weighted(sums_N1.log(), weights_N1).sum()
            logits_NV.div_(sums_N1).scatter_add_(-1, labels_N1, -torch.ones_like(sums_N1))
            if weights_N1 is not None:
                logits_NV.mul_(weights_N1)
            gradient_ND[start : start + CHUNK] = head.backward(logits_NV, hidden.dtype, slope_NV)
        ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * gradient.to(gradient_ND.dtype), None, None, None


def _weighted(values_N1: Tensor, weights_N1: Tensor | None) -> Tensor:
    return values_N1 if weights_N1 is None else values_N1 * weights_N1


LOSS_FORMS = ("token_mean", "example_mean", "scored_example_mean")


def cross_entropy(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    form: str = "token_mean",
    scores_B: Tensor | None = None,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Return the negative log-likelihood in nats (float32 scalar) of the labels that are not -100.

    Args:
        form: "token_mean": over all tokens of the batch. "example_mean": over each row's tokens, then over rows. "scored_example_mean":
            the same with each row's mean times its score. A row without labels counts as 0.
        scores_B: of "scored_example_mean" alone.
        num_items: by how many tokens the sum of "token_mean" is divided, where that isn't the batch's own number.

    Raises:
        LadderError: the form is unknown, or scores are missing, idle, or not one a row.
    """
    if form not in LOSS_FORMS:
        raise LadderError(f"loss_form {form!r} is unknown.{did_you_mean(form, LOSS_FORMS)}")
    if (scores_B is not None) != (form == "scored_example_mean"):
        raise LadderError("scores go with loss_form='scored_example_mean' and with no other: give both or neither")
    if scores_B is not None and scores_B.shape != (len(labels_BT),):
        raise LadderError(f"scores are {tuple(scores_B.shape)}, but must be ({len(labels_BT)},): one a row")
    if form == "token_mean":
        return mean_cross_entropy(logits_BTV, labels_BT, num_items)
    if num_items is not None:
        raise LadderError(f"num_items_in_batch counts tokens, over which loss_form={form!r} is no mean: leave one of them out")
    nll_BT = torch.nn.functional.cross_entropy(logits_BTV.float().transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none")
    mean_B = nll_BT.sum(1) / (labels_BT != IGNORED).sum(1).clamp(min=1)
    return (mean_B if scores_B is None else mean_B * scores_B).mean()


def mean_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Return the mean negative log-likelihood in nats (float32 scalar) over the labels that are not -100; 0 when all are.

    With `num_items` the sum is divided by it, and not by how many labels there are.
    """
    nll = torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    return nll / ((labels_BT != IGNORED).sum().clamp(min=1) if num_items is None else num_items)

"""What the designs share: gates, downsamples, how narrow blocks are, and how a side network's parts are fed.

Shapes: B rows, S source tokens, T target tokens, D = d_model, R = d_model / r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lst_scale.backbone.families import Narrowing
from lst_scale.backbone.masks import padding_mask
from lst_scale.backbone.taps import BackboneSpec, PackedTap, Tap
from lst_scale.side.config import LadderConfig
from lst_scale.side.designs import attention


class Gate(nn.Module):
    """mu * side + (1 - mu) * tap with mu = sigmoid(alpha / T); alpha starts at 0, so mu at 1/2.

    One alpha, or one a channel (QST, Zhang et al., ACL 2024).
    """

    def __init__(self, temperature: float, channels: int = 1) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.temperature = temperature

    def forward(self, side: Tensor, tap: Tensor) -> Tensor:
        mu = torch.sigmoid(self.alpha / self.temperature)
        return mu * side + (1 - mu) * tap

    def opening(self, alpha: Tensor) -> float:
        """Return mu of a scalar gate with this alpha: the share of the side state; 1 - mu is the tap's."""
        return float(torch.sigmoid(alpha.double() / self.temperature))


class Mean(nn.Module):
    """A gate that stays where it starts: half of each."""

    def forward(self, side: Tensor, tap: Tensor) -> Tensor:
        return 0.5 * (side + tap)


class Sum(nn.Module):
    """No gate: the plain sum (PAC, arXiv 2408.10746)."""

    def forward(self, side: Tensor, tap: Tensor) -> Tensor:
        return side + tap


def make_gate(config: LadderConfig, width: int) -> nn.Module:
    """Return the gate that `config.gate` names, for states of `width` channels."""
    if config.gate == "fixed":
        return Mean()
    if config.gate == "none":
        return Sum()
    return Gate(config.gate_temperature, width if config.gate == "per_channel" else 1)


class TwoStepDownsample(nn.Module):
    """Linear d -> rank, then rank -> d/r: fewer weights than one step where rank < d/r (QST's "Adapter" downsample, without its SiLU)."""

    def __init__(self, d_model: int, rank: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(d_model, rank, bias=False)
        self.second = nn.Linear(rank, width)

    def forward(self, tap: Tensor) -> Tensor:
        narrow: Tensor = self.second(self.first(tap))
        return narrow


def make_downsample(config: LadderConfig, d_model: int, width: int) -> nn.Module:
    """Return one rung of the ladder: d_model -> width, with bias."""
    if config.downsample_rank is None:
        return nn.Linear(d_model, width)
    return TwoStepDownsample(d_model, config.downsample_rank, width)


def cast_embedding(embedding: Tensor) -> Tensor:
    """Return the embedding as the side state starts from it: float32, unless autocast will choose."""
    return embedding if torch.is_autocast_enabled(embedding.device.type) else embedding.float()


def prepare_tap(tap: Tap, *, normalize: bool) -> Tensor:
    """Return a tap as its downsample reads it. Cast inside the recomputed part, so that what is kept is the tap as the backbone gave it.

    `normalize`: root mean square 1 in every position; the downsample after it has the scale.
    """
    if isinstance(tap, PackedTap):
        tap = tap.unpack()
    if not torch.is_autocast_enabled(tap.device.type):
        tap = tap.to(torch.float32)
    return nn.functional.rms_norm(tap, tap.shape[-1:], eps=1e-6) if normalize else tap


def maybe_recompute(wanted: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function`; when `wanted` and in training, keep its inputs alone for the backward pass and call it again there.

    Dropout draws the same numbers both times.
    """
    if not (wanted and torch.is_grad_enabled()):
        return function(*arguments)
    # The two halves of a packed tap go in by themselves: autograd keeps account of tensors only.
    packed = [isinstance(argument, PackedTap) for argument in arguments]
    tensors = [half for argument in arguments for half in _halves(argument)]

    def call(*parts: Any) -> Any:
        rest = iter(parts)
        return function(*(PackedTap(values_BSD=next(rest), scale_BS1=next(rest)) if pair else next(rest) for pair in packed))

    return checkpoint(call, *tensors, use_reentrant=False)


def _halves(argument: Any) -> tuple[Any, ...]:
    return (argument.values_BSD, argument.scale_BS1) if isinstance(argument, PackedTap) else (argument,)


@dataclass(frozen=True, kw_only=True)
class SideEncoderState:
    """The side encoder's result, which the side decoder attends to under the backbone's padding mask."""

    final_BSR: Tensor  # (B, S, R), or (B, S, D) for the adapter design
    attention_mask_BS: Tensor
    target_mask_BT: Tensor | None = None  # of all positions of the target so far; None: all are tokens


def attended(encoder: SideEncoderState | None) -> tuple[Tensor | None, Tensor | None]:
    """Return what a side block of the decoder attends to, and its mask; nothing in the encoder."""
    return (None, None) if encoder is None else (encoder.final_BSR, padding_mask(encoder.attention_mask_BS))


def narrowing(spec: BackboneSpec, config: LadderConfig) -> Narrowing:
    """Return how side blocks are narrower than the backbone's: widths divided by r, heads unchanged unless `side_heads` says otherwise."""
    return Narrowing(
        reduction_factor=config.reduction_factor,
        heads=config.side_heads or spec.num_heads,
        dropout=spec.dropout_rate if config.dropout is None else config.dropout,
        attention=attention.NAME,
    )

"""A linear map from states to labels, fitted: multinomial logistic regression with an L2 penalty, by L-BFGS.

    z = (x - mean) / deviation / sqrt(F)             by the training rows; a channel that never changes is left out
    minimise over W, b    mean_n -log softmax(W z_n + b)[label_n]  +  decay / 2 |W|^2

Divided by sqrt(F), rows have a length of about 1 however many channels there are, so that one scale of decays serves one block and all
together. The loss is convex: the start, and the order in which decays are tried, change nothing but time. What comes out reads the states
as they are, with the scale in its weight and the mean in its bias.

Shapes: N rows, F channels, L labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOST_ITERATIONS = 500
CLOSE_ENOUGH = 1e-7  # of every entry of the gradient
CHANNELS_AT_ONCE = 4096
SMALLEST = 1e-12  # of the largest eigenvalue: what is below is rounding


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """Log-odds of labels: states (N, F) -> (N, L)."""

    weight_LF: Tensor
    bias_L: Tensor

    def __call__(self, states_NF: Tensor) -> Tensor:
        return nn.functional.linear(states_NF, self.weight_LF, self.bias_L)


def fits(states_NF: Tensor, labels_N: Tensor, num_labels: int, decays: Sequence[float]) -> Iterator[tuple[float, LinearMap]]:
    """Yield the fitted map for each weight decay, the largest first. States are float32, on the CPU; the fit is made in float64."""
    scaled = _Scaled(states_NF)
    for decay, weight_LC, bias_L in _path(scaled.rows_NC, labels_N, torch.zeros(len(labels_N), num_labels), decays):
        yield decay, scaled.back(weight_LC, bias_L)


def cross_validated(
    states_NF: Tensor, labels_N: Tensor, given_NL: Tensor, decays: Sequence[float], folds_N: Tensor
) -> tuple[LinearMap, float, float]:
    """Return a map that adds to log-odds that are `given`, its weight decay, and the loss (nats a row) that chose it.

    That loss is of rows that were held out, those of a fold together.
    """
    scaled = _Scaled(states_NF)
    losses = dict.fromkeys(decays, 0.0)
    for fold in folds_N.unique():  # type: ignore[no-untyped-call]
        kept, held = folds_N != fold, folds_N == fold
        for decay, weight_LC, bias_L in _path(scaled.rows_NC[kept], labels_N[kept], given_NL[kept], decays):
            logits_ML = nn.functional.linear(scaled.rows_NC[held], weight_LC, bias_L) + given_NL[held]
            losses[decay] += float(nn.functional.cross_entropy(logits_ML, labels_N[held], reduction="sum")) / len(labels_N)
    decay = min(losses, key=lambda each: losses[each])
    larger = [each for each in decays if each >= decay]
    *_, (_, weight_LC, bias_L) = _path(scaled.rows_NC, labels_N, given_NL, larger)
    return scaled.back(weight_LC, bias_L), decay, losses[decay]


class _Scaled:
    """Standardised states, in as few coordinates as they need."""

    def __init__(self, states_NF: Tensor) -> None:
        self._mean_F, deviation_F = states_NF.mean(0), states_NF.std(0, unbiased=False)
        changes_F = deviation_F > 1e-6 * states_NF.abs().amax(0).clamp(min=1e-30)
        self._inverse_F = torch.where(changes_F, 1 / deviation_F.clamp(min=1e-30), 0.0) * states_NF.shape[1] ** -0.5
        self._rotation = _Rotation((states_NF - self._mean_F) * self._inverse_F)
        self.rows_NC = self._rotation.rows_NC

    def back(self, weight_LC: Tensor, bias_L: Tensor) -> LinearMap:
        """Return a map of these coordinates as one of states as they are."""
        weight_LF = self._rotation.back(weight_LC) * self._inverse_F
        return LinearMap(weight_LF=weight_LF.float(), bias_L=(bias_L - weight_LF @ self._mean_F.double()).float())


def _path(rows_NC: Tensor, labels_N: Tensor, given_NL: Tensor, decays: Sequence[float]) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield weight and bias for each weight decay, the largest first, each from where the one before it ended."""
    given_NL = given_NL.double()
    weight_LC = torch.zeros(given_NL.shape[1], rows_NC.shape[1], dtype=torch.float64)
    bias_L = torch.zeros(given_NL.shape[1], dtype=torch.float64)
    for decay in sorted(decays, reverse=True):
        weight_LC, bias_L = _fitted(rows_NC, labels_N, given_NL, decay, weight_LC, bias_L)
        yield decay, weight_LC, bias_L


class _Rotation:
    """Rows in as few coordinates as they need: of N rows with more than N channels, a map under an L2 penalty reads no more than N.

    Z Z^T = U S^2 U^T          rows are U S in the orthonormal basis V = Z^T U / S, and W V^T is the map of the channels
    """

    def __init__(self, scaled_NF: Tensor) -> None:
        count, channels = scaled_NF.shape
        self._back: Tensor | None = None
        if channels <= count:
            self.rows_NC = scaled_NF.double()
            return
        gram_NN = torch.zeros(count, count, dtype=torch.float64)
        for some in torch.split(scaled_NF, CHANNELS_AT_ONCE, 1):
            gram_NN += some.double() @ some.double().T
        squares_N, vectors_NN = torch.linalg.eigh(gram_NN)
        kept = squares_N > SMALLEST * squares_N[-1]
        sizes_C, vectors_NC = squares_N[kept].sqrt(), vectors_NN[:, kept]
        self.rows_NC = vectors_NC * sizes_C
        self._back, self._scaled_NF = vectors_NC / sizes_C, scaled_NF

    def back(self, weight_LC: Tensor) -> Tensor:
        """Return a map of these coordinates as one of the channels (L, F)."""
        if self._back is None:
            return weight_LC
        by_row_LN = weight_LC @ self._back.T
        return torch.cat([by_row_LN @ some.double() for some in torch.split(self._scaled_NF, CHANNELS_AT_ONCE, 1)], 1)


def _fitted(rows_NC: Tensor, labels_N: Tensor, given_NL: Tensor, decay: float, weight_LC: Tensor, bias_L: Tensor) -> tuple[Tensor, Tensor]:
    weight_LC, bias_L = (tensor.clone().requires_grad_() for tensor in (weight_LC, bias_L))
    optimizer = torch.optim.LBFGS(
        [weight_LC, bias_L],
        max_iter=MOST_ITERATIONS,
        tolerance_grad=CLOSE_ENOUGH,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        nll = nn.functional.cross_entropy(nn.functional.linear(rows_NC, weight_LC, bias_L) + given_NL, labels_N)
        total = nll + decay / 2 * weight_LC.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight_LC.detach(), bias_L.detach()

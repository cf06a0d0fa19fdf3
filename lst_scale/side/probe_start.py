"""A side network that starts as a linear map of the backbone's states: what the best probe knows, it need not learn in steps.

The map reads, at each position that predicts a token of an answer, the taps there and their mean over the row's tokens so far:

    logits = logits of the backbone (with start_as_backbone) + sum_i W_i t_i + sum_i M_i mean(t_i) + b       t_i = RMS(h_i), for few tokens

It goes into Q channels for W and Q for M of the side state, which all blocks leave alone, so that downsamples add up in them:

    downsamples     rows of W and M, divided by what the gates after them leave of a tap
    last block      one head begins uniform, and adds its mean of the channels of M to those of W; a pointwise side network has no M
    upsample        the pseudo-inverse of the tokens' rows of the head; its bias also puts other tokens out of the way

What remains of the side network is as it was drawn. Its norms divide by a length that differs between positions: by their means here, so
logits come out a little larger or smaller, mostly in the same order.

Shapes: K tokens, D = d_model, R = d_model / r, Q <= R / 4 channels, L blocks that are read, N positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lst_scale.backbone.families import family_of
from lst_scale.backbone.taps import FrozenHead, Taps
from lst_scale.side.designs.parts import Sum
from lst_scale.side.network import SideNetwork

BLOCKS_READ = 6  # the last of the ladder: gates halve what a downsample adds, so earlier ones would need weights above 2^6
SMALLEST = 1e-4  # of the largest direction of a map: what is below is left out
ITERATIONS = 25  # to put other tokens out of the way
PULL = 1e-4  # by which the bias that does so is kept short


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A fitted map, and by what it is to be scaled."""

    tokens_K: Tensor  # ids
    own_KLD: Tensor  # W, of the states at a position
    mean_KLD: Tensor | None  # M, of their means so far; None: no position knows of others
    bias_K: Tensor
    states_NF: Tensor  # what it was fitted to: own states, then means, (N, L * D) each
    final_ND: Tensor | None  # the backbone's final states there, if the side state is added to them


def blocks_read(side: SideNetwork) -> tuple[int, ...]:
    """Return which of the ladder's blocks a side network starts from."""
    return side.config.layers[-BLOCKS_READ:]


def reads_means(side: SideNetwork) -> bool:
    return side.config.design != "pointwise"


def rows_of_head(head: FrozenHead, tokens_K: Tensor) -> Tensor:
    """Return by what final states are multiplied for the logits of some tokens (K, D)."""
    return head.weight_VD[tokens_K.to(head.weight_VD.device)].float() * (head.scale / head.divided_by)


@torch.no_grad()
def start_as(side: SideNetwork, reading: Reading, head: FrozenHead, taps: Taps) -> None:
    """Put a map into a side network that was drawn at random.

    Args:
        side: on the device of `taps`, in eval mode.
        taps: of some rows, to see how long its states are.
    """
    _Placing(side, reading, head).place(taps)


class _Placing:
    def __init__(self, side: SideNetwork, reading: Reading, head: FrozenHead) -> None:
        self.side, self.reading, self.head = side, reading, head
        self.family = family_of(side.spec.model_type, "this backbone")
        ((_, self.stack),) = side.stacks()
        self.rows_KD = rows_of_head(head, reading.tokens_K).cpu()
        self.back_DK = torch.linalg.pinv(self.rows_KD)
        # What all tokens have in common changes no odds among them; how far they stand above others is found apart.
        each_KF = torch.cat([part.flatten(1) for part in (reading.own_KLD, reading.mean_KLD) if part is not None], 1)
        self.map_KF, self.bias_K = each_KF - each_KF.mean(0), reading.bias_K - reading.bias_K.mean()
        left_KC, sizes_C, _ = torch.linalg.svd(self.map_KF * reading.states_NF.std(0), full_matrices=False)
        most = side.spec.side_width(side.config.reduction_factor) // 4
        self.count = min(int((sizes_C > SMALLEST * sizes_C[0]).sum()), most)
        self.left_KQ = left_KC[:, : self.count]
        self.map_QF = self.left_KQ.T @ self.map_KF
        self.own, self.mean = slice(0, self.count), slice(self.count, 2 * self.count)

    def place(self, taps: Taps) -> None:
        said_NQ = self.reading.states_NF @ self.map_QF.T
        middle_Q, size_Q = said_NQ.mean(0), said_NQ.std(0).clamp(min=1e-6)
        self._downsamples(middle_Q, size_Q)
        self._pass_on()
        if self.reading.mean_KLD is not None:
            self._average(size_Q, taps)
        self._upsample(middle_Q, size_Q, taps)

    @property
    def keys(self) -> list[str]:
        return list(self.stack.downsamples)

    def _downsamples(self, middle_Q: Tensor, size_Q: Tensor) -> None:
        read, width = [str(block) for block in blocks_read(self.side)], self.side.spec.d_model
        reserved = slice(0, self.count * (1 if self.reading.mean_KLD is None else 2))
        own_QLD, *means = self.map_QF.split(len(read) * width, 1)
        for linear in (self.stack.first_downsample, *self.stack.downsamples.values()):
            linear.weight[reserved] = 0
            linear.bias[reserved] = 0
        for number, key in enumerate(read):
            linear, left, here = self.stack.downsamples[key], self._left_of(key), slice(number * width, (number + 1) * width)
            linear.weight[self.own] = own_QLD[:, here].div(size_Q[:, None] * left).to(linear.weight.device)
            for mean_QF in means:
                linear.weight[self.mean] = mean_QF[:, here].div(self._size_of_means(mean_QF)[:, None] * left).to(linear.weight.device)
        linear.bias[self.own] = -(middle_Q / size_Q / self._left_of(read[-1])).to(linear.bias.device)

    def _size_of_means(self, mean_QF: Tensor) -> Tensor:
        own_NF = self.reading.states_NF[:, : mean_QF.shape[1]]
        return (own_NF @ mean_QF.T).std(0).clamp(min=1e-6)

    def _left_of(self, key: str) -> float:
        """Return what the gates from this block on leave of its tap, as they start."""
        after = len(self.keys) - self.keys.index(key)
        return 1.0 if isinstance(self.stack.gates[key], Sum) else 0.5**after

    def _pass_on(self) -> None:
        reserved = slice(0, self.count * (1 if self.reading.mean_KLD is None else 2))
        for block in self.stack.blocks.values():
            self.family.leave_alone(block, reserved)

    def _average(self, size_Q: Tensor, taps: Taps) -> None:
        last = self.keys[-1]
        with _watched(self.stack.gates[last]) as seen:
            self.side(taps)
        source_BS = taps.source_mask_BS[:, : taps.source.embedding.shape[1]].bool()
        tokens_BS = torch.cat([source_BS, source_BS.new_ones(taps.target.embedding.shape[:2])], 1)
        lengths_S = seen[0].float().square().mean(-1).sqrt()[tokens_BS]
        mean_QF = self.map_QF[:, self.map_QF.shape[1] // 2 :]
        factors_Q = self._size_of_means(mean_QF) / size_Q / float(lengths_S.reciprocal().mean())
        device = self.stack.final_norm.weight.device
        self.family.start_averaging(self.stack.blocks[last], self.mean, self.own, factors_Q.to(device))

    def _upsample(self, middle_Q: Tensor, size_Q: Tensor, taps: Taps) -> None:
        upsample = self.side.upsample
        assert isinstance(upsample, nn.Linear)
        with _watched(self.stack.final_norm, inputs=True) as seen:
            self.side(taps)
        length = float(seen[0][:, -taps.target.embedding.shape[1] :].float().square().mean(-1).sqrt().mean())
        device = upsample.weight.device
        upsample.weight[:, self.own] = (self.back_DK @ (self.left_KQ * size_Q) * length).to(device)
        bias_K = self.bias_K + self.left_KQ @ middle_Q
        upsample.bias.copy_(self._bias(bias_K).to(device))

    def _bias(self, bias_K: Tensor) -> Tensor:
        """Return a bias (D,) whose odds among the tokens are these, at which other tokens are as unlikely as answers make them.

        bias = P (b + c) + (u - P E u)            P is the pseudo-inverse of the tokens' rows E of the head; c and u are what is free
        """
        reading = self.reading
        some = torch.linspace(0, len(reading.states_NF) - 1, min(32, len(reading.states_NF))).long()
        said_NK = (reading.states_NF[some] @ self.map_QF.T - reading.states_NF.mean(0) @ self.map_QF.T) @ self.left_KQ.T
        hidden_ND = said_NK @ self.back_DK.T
        if reading.final_ND is not None:
            hidden_ND = hidden_ND + reading.final_ND[some]
        wanted_N = reading.tokens_K[(hidden_ND @ self.rows_KD.T + bias_K).argmax(-1)]
        device = self.head.weight_VD.device
        hidden_ND, wanted_N, back_DK, rows_KD, fixed_K = (
            each.to(device) for each in (hidden_ND, wanted_N, self.back_DK, self.rows_KD, bias_K)
        )
        above = torch.zeros(1, device=device, requires_grad=True)
        away_D = torch.zeros(len(back_DK), device=device, requires_grad=True)

        def bias() -> Tensor:
            found: Tensor = back_DK @ (fixed_K + above) + away_D - back_DK @ (rows_KD @ away_D)
            return found

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits_NV = self.head((hidden_ND + bias())[None])[0].float()
            total = nn.functional.cross_entropy(logits_NV, wanted_N) + PULL * away_D.square().sum()
            total.backward()  # type: ignore[no-untyped-call]
            return total

        optimizer = torch.optim.LBFGS([above, away_D], max_iter=ITERATIONS, line_search_fn="strong_wolfe")
        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[no-untyped-call]
        return bias().detach()


@contextlib.contextmanager
def _watched(module: nn.Module, *, inputs: bool = False) -> Iterator[list[Tensor]]:
    """Give what a module returns, or what it is given first, when it runs."""
    seen: list[Tensor] = []
    handle = (
        module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        if inputs
        else module.register_forward_hook(lambda _, __, made: seen.append(made))
    )
    try:
        yield seen
    finally:
        handle.remove()

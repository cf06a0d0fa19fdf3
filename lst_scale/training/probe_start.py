"""`method.initialization: probe`: one pass over training rows before the first step, and a map fitted to what it made of them.

A tap cache keeps that pass for the first epoch; without one it is a pass more. Members that start so share it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lst_scale.backbone.families import NO_PROBE
from lst_scale.backbone.taps import FrozenHead, Taps, select
from lst_scale.data.batches import Batch, collate
from lst_scale.data.encode import EncodedSplit
from lst_scale.errors import BackboneError, DataError
from lst_scale.inputs.keys import FILLER, IGNORED
from lst_scale.methods.linear import cross_validated
from lst_scale.methods.lst import LadderTrainee, SharedPasses
from lst_scale.recipe.method import LstRecipe
from lst_scale.recipe.schema import Recipe
from lst_scale.runs.logs import Logger
from lst_scale.side.designs.parts import prepare_tap
from lst_scale.side.network import SideNetwork
from lst_scale.side.probe_start import Reading, blocks_read, reads_means, rows_of_head, start_as
from lst_scale.system import distributed
from lst_scale.system.distributed import World

MOST_POSITIONS = 4096  # that a map is fitted to: a matrix of that size is decomposed
MOST_TOKENS = 64
FOLDS = 5
WEIGHT_DECAYS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
ROWS_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The rows that a map is fitted to, of each split the shortest first, and the tokens that their answers are made of."""

    rows: tuple[tuple[int, ...], ...]  # of each split
    tokens_K: Tensor


def begins_as_probe(recipe: Recipe) -> bool:
    return isinstance(recipe.method, LstRecipe) and recipe.method.initialization == "probe"


def sample_of(splits: Sequence[EncodedSplit]) -> Sample:
    """Return rows at equal distances, as many as have `MOST_POSITIONS` positions that predict an answer's tokens.

    Raises:
        DataError: answers have too many different tokens.
    """
    positions = sum(int(split.labels.lengths.sum()) for split in splits)
    step = max(1, -(-positions // MOST_POSITIONS))
    rows = tuple(_by_length(split, range(0, len(split), step)) for split in splits)
    found = [split.labels[row] for split, some in zip(splits, rows, strict=True) for row in some]
    tokens = np.unique(np.concatenate(found))
    tokens = tokens[tokens != IGNORED]
    if len(tokens) > MOST_TOKENS:
        raise DataError(
            f"method.initialization=probe starts from answers of few tokens, like labels and numbers, and those of the training rows have "
            f"{len(tokens):,} different ones (at most {MOST_TOKENS}): write method.initialization=random"
        )
    return Sample(rows=rows, tokens_K=torch.from_numpy(tokens.astype(np.int64)))


def _by_length(split: EncodedSplit, rows: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(rows, key=lambda row: len(split.input_ids[row])))


class Starts:
    """What members of a run that start so have in common, until all have started: the pass, and the map that was fitted to it."""

    def __init__(self, splits: Sequence[EncodedSplit], passes: SharedPasses, world: World) -> None:
        self._splits, self._passes, self._world = splits, passes, world
        self._read: dict[tuple[Any, ...], tuple[Sample, Read, Taps | None]] = {}
        self._fits: dict[tuple[Any, ...], Fit] = {}  # on rank 0

    def begin(self, trainee: LadderTrainee, logger: Logger) -> float:
        """Let a side network that was drawn start as a linear reading of the backbone's states; return the seconds that took.

        All ranks must call it; they end with the same weights.

        Raises:
            BackboneError: the backbone has two stacks, or its states are not finite.
            DataError: answers have too many different tokens.
        """
        start = time.perf_counter()
        side, backbone, world = trainee.module, self._passes.backbone, self._world
        if not backbone.spec.one_stack:
            raise BackboneError(NO_PROBE)
        key = (blocks_read(side), reads_means(side), side.config.merge_last, side.config.normalize_taps)
        if key not in self._read:
            sample = sample_of(self._splits)
            self._read[key] = (sample, *_read(sample, self._splits, trainee, self._passes, world))
        sample, read, middle = self._read[key]

        def place() -> tuple[dict[str, Tensor], str]:
            assert middle is not None, "rank 0 has a share of all batches"
            if key not in self._fits:
                self._fits[key] = _fitted(sample, read, side, backbone.head)
            fit = self._fits[key]
            side.to(world.device).eval()
            start_as(side, fit.reading, backbone.head, select(middle, trainee.request))
            return {name: parameter.detach().cpu() for name, parameter in side.named_parameters()}, fit.sentence

        weights, sentence = distributed.on_main_rank(world, place)
        side.cpu().train()
        with torch.no_grad():
            for name, parameter in side.named_parameters():
                parameter.copy_(weights[name])
        seconds = time.perf_counter() - start
        logger.say(f"{sentence} ({seconds:.0f} s)")
        return seconds


@dataclass(frozen=True, kw_only=True)
class Fit:
    reading: Reading
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Read:
    """What one pass over a sample left of N positions: on rank 0 of all rows, elsewhere of this rank's."""

    rows_N: Tensor
    labels_N: Tensor  # numbers among the sample's tokens
    states_NF: Tensor  # own states, then means
    final_ND: Tensor  # the backbone's final states; nothing where the side state is not added to them


def _read(
    sample: Sample, splits: Sequence[EncodedSplit], trainee: LadderTrainee, passes: SharedPasses, world: World
) -> tuple[Read, Taps | None]:
    """Run the backbone on a sample's rows, each rank on its share; return also the taps of a batch in the middle.

    All ranks run as many batches, as some placements need.
    """
    batches = [(number, batch) for number, rows in enumerate(sample.rows) for batch in _shares(rows, world)]
    parts: list[Read] = []
    middle: Taps | None = None
    for place, (number, rows) in enumerate(batches):
        distributed.poll_interruption(world)
        batch = collate(splits[number], rows)
        taps = passes.all_of(batch)
        assert taps is not None
        middle = taps if place == len(batches) // 2 else middle
        parts.append(_positions(batch, number, select(taps, trainee.request), trainee.module, sample.tokens_K))
    gathered = [part for of_rank in distributed.gather_on_main(world, parts) for part in of_rank]
    every = gathered or parts
    return Read(**{name: torch.cat([vars(part)[name] for part in every]) for name in vars(every[0])}), middle


def _shares(rows: Sequence[int], world: World) -> Iterator[Sequence[int]]:
    """Yield the rows of each of this rank's batches; one filler row where others have rows left and it has none."""
    for first in range(0, len(rows), ROWS_AT_ONCE * world.size):
        start = first + world.rank * ROWS_AT_ONCE
        yield rows[start : start + ROWS_AT_ONCE] or (FILLER,)


def _positions(batch: Batch, number: int, taps: Taps, side: SideNetwork, tokens_K: Tensor) -> Read:
    """Return what a batch's positions that predict a token read, on the CPU."""
    device = taps.source_mask_BS.device
    predicts_BT = (batch.labels_BT != IGNORED).to(device)
    normalize, blocks = bool(side.config.normalize_taps), len(blocks_read(side))
    own, means = [], []
    for source, target in zip(taps.source.hidden[-blocks:] or taps.target.hidden[-blocks:], taps.target.hidden[-blocks:], strict=True):
        target_BTD = prepare_tap(target, normalize=normalize)
        own.append(target_BTD[predicts_BT])
        if reads_means(side):
            means.append(_means(prepare_tap(source, normalize=normalize), taps.source_mask_BS, target_BTD)[predicts_BT])
    labels_N = torch.searchsorted(tokens_K, batch.labels_BT[batch.labels_BT != IGNORED])
    rows_B = torch.tensor(batch.indices) * 2**20 + number  # rows of several splits are told apart
    final_BTD = taps.final_BTD if side.config.merge_last else None
    return Read(
        rows_N=rows_B[:, None].expand_as(batch.labels_BT)[batch.labels_BT != IGNORED],
        labels_N=labels_N,
        states_NF=torch.cat(own + means, -1).float().cpu(),
        final_ND=torch.empty(len(labels_N), 0) if final_BTD is None else final_BTD[predicts_BT].float().cpu(),
    )


def _means(source_BSD: Tensor, mask_BS: Tensor, target_BTD: Tensor) -> Tensor:
    """Return the mean (B, T, D) of the states of a row's tokens up to each of the target."""
    mask_BS = mask_BS[:, : source_BSD.shape[1]]
    sum_B1D = (source_BSD * mask_BS[..., None]).sum(1, keepdim=True)
    count_BT1 = mask_BS.sum(1)[:, None, None] + torch.arange(1, target_BTD.shape[1] + 1, device=target_BTD.device)[None, :, None]
    return (sum_B1D + target_BTD.cumsum(1)) / count_BT1


def _fitted(sample: Sample, read: Read, side: SideNetwork, head: FrozenHead) -> Fit:
    if not bool(torch.isfinite(read.states_NF).all() and torch.isfinite(read.final_ND).all()):
        raise BackboneError("the backbone's states are not finite: look at its weights, or write backbone.precision=fp32")
    tokens, merges = len(sample.tokens_K), read.final_ND.shape[1] > 0
    given_NK = read.final_ND @ rows_of_head(head, sample.tokens_K).cpu().T if merges else torch.zeros(len(read.labels_N), tokens)
    _, row_N = read.rows_N.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    fitted, decay, loss = cross_validated(read.states_NF, read.labels_N, given_NK, WEIGHT_DECAYS, row_N % FOLDS)
    blocks, width = len(blocks_read(side)), side.spec.d_model
    each_KLD = fitted.weight_LF.reshape(tokens, -1, width)
    reading = Reading(
        tokens_K=sample.tokens_K,
        own_KLD=each_KLD[:, :blocks],
        mean_KLD=each_KLD[:, blocks:] if reads_means(side) else None,
        bias_K=fitted.bias_L,
        states_NF=read.states_NF,
        final_ND=read.final_ND if merges else None,
    )
    sentence = (
        f"starts as a linear map of {blocks} blocks' states to {tokens} tokens, fitted to {len(read.labels_N):,} positions of "
        f"{sum(map(len, sample.rows)):,} rows with weight decay {decay:g}; cross-validated loss {loss:.4f} a token, among these"
    )
    return Fit(reading=reading, sentence=sentence)

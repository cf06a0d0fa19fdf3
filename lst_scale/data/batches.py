"""Rows to batches. What a step is made of depends on seed and epoch alone, never on the number of ranks or the micro-batch.

    epoch -> shuffle -> pools of POOL global batches, each sorted by length -> global batches, shuffled -> steps
    step  -> its rows by length, cut into micro-batches; rank k takes every world_size-th, starting at its own number

Neighbouring micro-batches go to different ranks, so ranks meet at each step with rows of like length. Short steps are filled up with
rows whose labels are all ignored, so that every rank runs the same number of forward passes.

Shapes: B rows, S source tokens, T target tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lst_scale.data.columns import Numbers
from lst_scale.data.encode import EncodedSplit
from lst_scale.inputs.images import Images
from lst_scale.inputs.keys import FILLER as FILLER
from lst_scale.inputs.keys import IGNORED, RowKeys

T = TypeVar("T")
POOL = 50  # global batches that are sorted by length together, unless a recipe says otherwise


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One forward pass of one rank. `indices` are row numbers; -1 is a filler row without labels."""

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    labels_BT: Tensor
    indices: tuple[int, ...]
    target_lengths: tuple[int, ...] | None = None  # of each row's labels, at least 1; None: all T
    keys: RowKeys | None = None  # where the split has them
    images: Images | None = None  # of each row, where rows have some
    weights_B: Tensor | None = None  # of each token's loss, by its row; None: all are 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rank's part of one global batch; the numbers of target tokens and of rows are the whole global batch's."""

    micro_batches: Sequence[Batch]
    num_target_tokens: int
    num_rows: int | None = None  # where the loss is the mean over rows

    @property
    def divisor(self) -> int:
        """What the summed loss of all ranks is divided by."""
        return self.num_target_tokens if self.num_rows is None else self.num_rows


class MicroBatches(Sequence[Batch]):
    """Batches that are padded when they are asked for, so that a resume builds none of those before it."""

    def __init__(self, split: EncodedSplit, groups: Numbers) -> None:
        self._split, self._groups = split, groups

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        return collate(self._split, self._groups[index])


class Steps(Sequence[Step]):
    """The steps of one epoch as one rank sees them. What is kept is the order of the rows, an array; a step is made when asked for."""

    def __init__(self, split: EncodedSplit, epoch: Epoch, *, micro_batches: int, rank: int, world_size: int) -> None:
        self._split, self._epoch, self._rank, self._world_size = split, epoch, rank, world_size
        self._num_groups = micro_batches * world_size

    def __len__(self) -> int:
        return len(self._epoch)

    def __getitem__(self, index: int) -> Step:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        rows = self._epoch[index]
        groups = cut(rows, self._num_groups)[self._rank :: self._world_size]
        tokens = int(self._split.labels.lengths[rows].sum(dtype=np.int64))
        counted = None if self._split.weights is None else len(rows)
        return Step(micro_batches=MicroBatches(self._split, groups), num_target_tokens=tokens, num_rows=counted)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The global batches of an epoch: which comes when, and the rows of all of them, batch after batch, each sorted by length."""

    batches: Numbers
    rows: Numbers
    size: int  # rows of each but one

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Numbers:
        first = int(self.batches[index]) * self.size
        return self.rows[first : first + self.size]


def training_steps(
    split: EncodedSplit, *, epoch: int, seed: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> Steps:
    """Return the steps of one epoch as this rank sees them. Over all ranks every row comes exactly once."""
    order = global_batches(split, epoch=epoch, seed=seed, size=global_batch_size)
    micro_batches = -(-global_batch_size // (micro_batch_size * world_size))
    return Steps(split, order, micro_batches=micro_batches, rank=rank, world_size=world_size)


class MixedSteps(Sequence[Step]):
    """The steps of one epoch of several tasks, each step on one of them: a task comes as often as it has batches, in random order."""

    def __init__(self, each: Sequence[Steps], *, epoch: int, seed: int) -> None:
        self._each = each
        tasks = np.repeat(np.arange(len(each)), [len(steps) for steps in each])
        order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).numpy()
        self._tasks = tasks[order]
        self._places = np.zeros(len(tasks), np.int64)  # which of its task's steps each is
        for task in range(len(each)):
            mine = self._tasks == task
            self._places[mine] = np.arange(mine.sum())

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int) -> Step:  # type: ignore[override]
        return self._each[int(self._tasks[index])][int(self._places[index])]


def global_batches(split: EncodedSplit, *, epoch: int, seed: int, size: int, pool: int = POOL) -> Epoch:
    """Return the rows of every global batch of an epoch, each sorted by length, the batches in random order; those of `pool` batches are
    sorted together."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order, lengths = torch.randperm(split.num_questions, generator=generator).numpy(), split.input_ids.lengths
    order = split.rows_of_epoch(epoch, seed)[order]
    for start in range(0, len(order), size * pool):
        some = order[start : start + size * pool]
        some[:] = some[by_length(lengths[some])]
    batches = torch.randperm(-(-len(order) // size), generator=generator).numpy()
    return Epoch(batches=batches, rows=order.astype(np.int32), size=size)


def evaluation_batches(split: EncodedSplit, *, batch_size: int, rank: int, world_size: int, equally_many: bool = False) -> Iterator[Batch]:
    """Yield this rank's batches: over all ranks every row exactly once, neighbours in length together.

    With `equally_many` a rank that has fewer ends with a batch of one filler row.
    """
    order = by_length(split.input_ids.lengths)
    for first in range(0, len(order), batch_size * world_size):
        start = first + rank * batch_size
        if start < len(order):
            yield collate(split, order[start : start + batch_size])
        elif equally_many:
            yield collate(split, [FILLER])


def collate(split: EncodedSplit, rows: Iterable[int]) -> Batch:
    """Pad rows to the longest among them."""
    indices = tuple(map(int, rows))
    filler_source, filler_target = np.array([split.pad_token_id]), np.array([IGNORED])
    sources = [split.input_ids[row] if row != FILLER else filler_source for row in indices]
    targets = [split.labels[row] if row != FILLER and len(split.labels) else filler_target for row in indices]
    input_ids_BS = _padded(sources, split.pad_token_id)
    # A filler row keeps one visible token: attention over nothing would be undefined.
    lengths = torch.tensor([len(source) for source in sources])
    attention_mask_BS = (torch.arange(input_ids_BS.shape[1])[None, :] < lengths[:, None]).long()
    return Batch(
        input_ids_BS=input_ids_BS,
        attention_mask_BS=attention_mask_BS,
        labels_BT=_padded(targets, IGNORED),
        indices=indices,
        target_lengths=tuple(map(len, targets)),
        keys=None if split.keys is None else split.keys.of(indices),
        images=None if split.images is None else split.images.of(indices),
        weights_B=None if split.weights is None else torch.from_numpy(split.weights[[max(row, 0) for row in indices]]),
    )


def merge_predictions(gathered: Iterable[Iterable[tuple[int, T]]], count: int) -> list[T]:
    """Return the predictions of all ranks in row order."""
    merged: dict[int, T] = {}
    for index, said in (pair for part in gathered for pair in part):
        assert index not in merged, f"row {index} was predicted twice"
        merged[index] = said
    assert len(merged) == count, f"{len(merged)} predictions for {count} rows"
    return [merged[index] for index in range(count)]


def by_length(lengths: Numbers) -> Numbers:
    """Return the places of rows by length; rows of one length stay in order."""
    return np.argsort(lengths, kind="stable")


def cut(rows: Numbers, num_groups: int) -> Numbers:
    """Cut rows into groups of equal length but for fillers in the last ones."""
    size = -(-len(rows) // num_groups)
    padded = np.full(size * num_groups, FILLER, rows.dtype)
    padded[: len(rows)] = rows
    return padded.reshape(num_groups, size)


def _padded(rows: Sequence[Numbers], fill: int) -> Tensor:
    padded = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(padded)

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

import torch
from torch import Tensor

from lst_scale.data.encode import EncodedSplit

T = TypeVar("T")
IGNORED = -100
FILLER = -1
POOL = 50  # global batches that are sorted by length together: long enough to save padding, short enough to stay random


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One forward pass of one rank. `indices` are row numbers; -1 is a filler row without labels."""

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    labels_BT: Tensor
    indices: tuple[int, ...]
    target_lengths: tuple[int, ...] | None = None  # of each row's labels, at least 1; None: all T


@dataclass(frozen=True, kw_only=True)
class Step:
    """One rank's part of one global batch; the number of target tokens is the whole global batch's."""

    micro_batches: Sequence[Batch]
    num_target_tokens: int


class MicroBatches(Sequence[Batch]):
    """Batches that are padded when they are asked for, so that a resume builds none of those before it."""

    def __init__(self, split: EncodedSplit, groups: list[list[int]]) -> None:
        self._split, self._groups = split, groups

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
        return collate(self._split, self._groups[index])


def training_steps(
    split: EncodedSplit, *, epoch: int, seed: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> list[Step]:
    """Return the steps of one epoch as this rank sees them. Over all ranks every row comes exactly once."""
    num_groups = -(-global_batch_size // (micro_batch_size * world_size)) * world_size
    steps = []
    for rows in global_batches(split, epoch=epoch, seed=seed, size=global_batch_size):
        groups = _cut(rows, num_groups)
        tokens = sum(len(split.labels[row]) for row in rows)
        steps.append(Step(micro_batches=MicroBatches(split, groups[rank::world_size]), num_target_tokens=tokens))
    return steps


def global_batches(split: EncodedSplit, *, epoch: int, seed: int, size: int) -> list[list[int]]:
    """Return the row numbers of every global batch of an epoch, each sorted by length, the batches in random order."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(split.rows), generator=generator).tolist()
    batches: list[list[int]] = []
    for start in range(0, len(order), size * POOL):
        pool = sorted(order[start : start + size * POOL], key=lambda row: len(split.input_ids[row]))
        batches += [pool[first : first + size] for first in range(0, len(pool), size)]
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def evaluation_batches(split: EncodedSplit, *, batch_size: int, rank: int, world_size: int, equally_many: bool = False) -> Iterator[Batch]:
    """Yield this rank's batches: over all ranks every row exactly once, neighbours in length together.

    With `equally_many` a rank that has fewer ends with a batch of one filler row.
    """
    order = sorted(range(len(split.rows)), key=lambda row: len(split.input_ids[row]))
    for first in range(0, len(order), batch_size * world_size):
        start = first + rank * batch_size
        if start < len(order):
            yield collate(split, order[start : start + batch_size])
        elif equally_many:
            yield collate(split, [FILLER])


def collate(split: EncodedSplit, rows: Sequence[int]) -> Batch:
    """Pad rows to the longest among them."""
    sources = [split.input_ids[row] if row != FILLER else [split.pad_token_id] for row in rows]
    targets = [split.labels[row] if row != FILLER and split.labels else [IGNORED] for row in rows]
    input_ids_BS = _padded(sources, split.pad_token_id)
    # A filler row keeps one visible token: attention over nothing would be undefined.
    lengths = torch.tensor([len(source) for source in sources])
    attention_mask_BS = (torch.arange(input_ids_BS.shape[1])[None, :] < lengths[:, None]).long()
    return Batch(
        input_ids_BS=input_ids_BS,
        attention_mask_BS=attention_mask_BS,
        labels_BT=_padded(targets, IGNORED),
        indices=tuple(rows),
        target_lengths=tuple(map(len, targets)),
    )


def merge_predictions(gathered: Iterable[Iterable[tuple[int, T]]], count: int) -> list[T]:
    """Return the predictions of all ranks in row order."""
    merged: dict[int, T] = {}
    for index, said in (pair for part in gathered for pair in part):
        assert index not in merged, f"row {index} was predicted twice"
        merged[index] = said
    assert len(merged) == count, f"{len(merged)} predictions for {count} rows"
    return [merged[index] for index in range(count)]


def _cut(rows: list[int], num_groups: int) -> list[list[int]]:
    """Cut rows into groups of equal length but for fillers in the last ones."""
    size = -(-len(rows) // num_groups)
    padded = rows + [FILLER] * (size * num_groups - len(rows))
    return [padded[start : start + size] for start in range(0, len(padded), size)]


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.long)

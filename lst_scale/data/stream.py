"""`task.streaming`: training rows read from their files as they are needed, for data that no disk of ours holds as a table.

    files of a pattern, in order -> rank r of W reads number r, r + W, ... of them, again and again
    a rank's rows -> windows of data.shuffle_buffer rows, each shuffled -> steps, a fixed number of rows each

Where a step's rows are follows from its number alone: which window, which place in it; and which file and row a window begins at, from how
many rows come before it. So a resume needs nothing but the step: it passes over the rows before, by what parquet files say they hold,
and other files by reading them. It needs the number of processes that the run was started with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lst_scale.data import files
from lst_scale.data.batches import MicroBatches, Step, by_length, cut
from lst_scale.data.chat import Writer
from lst_scale.data.encode import EncodedSplit, Encoding, encode_some
from lst_scale.data.own_rows import rows_of
from lst_scale.data.rows import Row
from lst_scale.data.tasks import unknown_label
from lst_scale.errors import DataError
from lst_scale.recipe.task import FileTask


class Stream(Sequence[Step]):
    """The steps of one rank, each made when it is asked for; asked for one after another, no row is read twice.

    Raises:
        DataError: there are fewer files than processes, or the global batch can't be divided among them.
    """

    def __init__(
        self,
        task: FileTask,
        encoding: Encoding,
        *,
        steps: int,
        global_batch_size: int,
        micro_batches: int,
        window: int,
        seed: int,
        rank: int,
        world_size: int,
        chat: Writer | None = None,
    ) -> None:
        paths = files.paths_of(task.train, "train")
        if len(paths) < world_size:
            raise DataError(
                f"task.train: {task.train} is {len(paths)} file{'s' if len(paths) > 1 else ''}, too few for {world_size} processes, "
                "each of which reads its own: divide the rows over more files, or start fewer processes"
            )
        if global_batch_size % world_size:
            raise DataError(
                f"training.global_batch_size {global_batch_size} can't be divided among {world_size} processes, as a stream needs"
            )
        self._task, self._encoding, self._paths, self._seed, self._chat = task, encoding, paths[rank::world_size], seed, chat
        self._steps, self._rows, self._micro_batches = steps, global_batch_size // world_size, micro_batches
        self._steps_a_window = max(1, window // global_batch_size)
        self._windows: dict[int, tuple[EncodedSplit, list[int]]] = {}  # this one and the one before
        self._following = -1  # the window whose rows come next from
        self._iterator: Iterator[Row] = iter(())

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, number: int) -> Step:  # type: ignore[override]
        """Return this rank's part of a step; `num_target_tokens` is that of this part alone."""
        window, place = divmod(number, self._steps_a_window)
        split, order = self._window(window)
        rows = torch.tensor(order[place * self._rows : (place + 1) * self._rows]).numpy()
        groups = cut(rows[by_length(split.input_ids.lengths[rows])], self._micro_batches)
        return Step(micro_batches=MicroBatches(split, groups), num_target_tokens=int(split.labels.lengths[rows].sum()))

    def _window(self, number: int) -> tuple[EncodedSplit, list[int]]:
        if number not in self._windows:
            size = self._steps_a_window * self._rows
            if self._following != number:
                self._iterator = self._rows_from(number * size)
            rows = list(itertools.islice(self._iterator, size))
            self._following = number + 1
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
            order = torch.randperm(size, generator=generator).tolist()
            kept = {each: window for each, window in self._windows.items() if each == number - 1}
            self._windows = kept | {number: (encode_some(rows, self._encoding), order)}
        return self._windows[number]

    def _rows_from(self, start: int) -> Iterator[Row]:
        """Yield this rank's rows for ever, from one on."""
        for path in itertools.cycle(self._paths):
            held = _rows_of_parquet(path) if start and self._chat is None else None  # a conversation is as many rows as it has answers
            if held is not None and held <= start:
                start -= held
                continue
            number = 0
            for found in files.read_records(str(path), "train"):
                if self._chat is None and number < start:
                    number += 1
                    continue
                for row in rows_of(self._task, found, self._chat):
                    number += 1
                    if number <= start:
                        continue
                    if self._task.labels is not None and row.target not in self._task.labels:
                        raise unknown_label(found.path, found.number, row.target, self._task.labels)
                    yield row
            start = max(0, start - number)


def _rows_of_parquet(path: Path) -> int | None:
    """Return how many rows a parquet file says it holds; None: it is none."""
    if files.ending(path) != ".parquet":
        return None
    from pyarrow import parquet

    return int(parquet.read_metadata(path).num_rows)

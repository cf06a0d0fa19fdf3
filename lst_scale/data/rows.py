"""Rows as text: a list where they are few, a table on disk where they are many."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from lst_scale.data.columns import CHUNK, Numbers, by_chunks, chunk_of_texts
from lst_scale.data.tables import Facts, Table, Write, digest_of, known_table, stored_table
from lst_scale.runs.logs import progress_of

COLUMNS = {"source": "texts", "target": "texts"}
# Pictures, a file a line, numbers, and what a metric compares with; only in tables whose rows have some.
BESIDE = dict.fromkeys(("images", "scores", "references", "questions"), "texts")


@dataclass(frozen=True)
class Row:
    """One example as text."""

    source: str
    target: str
    images: tuple[str, ...] = ()  # files of pictures
    score: float = 1.0  # what its answer is worth in training
    reference: str = ""  # what its answer is measured by, where that is more than the target; JSON
    question: int | None = None  # rows of one number are answers to one question, of which an epoch draws one; None: each is by itself


class StoredRows(Sequence[Row]):
    """Rows of a table, in its order or in another one. Each is made when it is asked for."""

    def __init__(self, table: Table, order: Numbers | None = None) -> None:
        self.table, self._order = table, order
        self._sources, self._targets = table.texts("source"), table.texts("target")
        self._beside = {name: table.texts(name) for name in BESIDE if name in table.kinds}

    @property
    def key(self) -> str:
        """Names the rows: equal for equal rows."""
        if self._order is None:
            return self.table.key
        return digest_of({"rows": self.table.key, "order": hashlib.sha256(self._order.astype(np.int64).tobytes()).hexdigest()})

    @property
    def is_whole(self) -> bool:
        return self._order is None

    def __len__(self) -> int:
        return len(self._targets) if self._order is None else len(self._order)

    def _place(self, row: int) -> int:
        return row if self._order is None else int(self._order[row])

    @overload
    def __getitem__(self, row: int) -> Row: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[Row]: ...
    def __getitem__(self, row: int | slice) -> Row | Sequence[Row]:
        if isinstance(row, int):
            place = self._place(row)
            return self._row(place)
        chosen = range(len(self))[row]
        if chosen == range(len(self)):
            return self
        if len(chosen) <= CHUNK:
            return [self[each] for each in chosen]
        return self.select(np.arange(chosen.start, chosen.stop, chosen.step))

    def select(self, rows: Numbers) -> StoredRows:
        """Return some rows in some order."""
        return StoredRows(self.table, rows if self._order is None else self._order[rows])

    def _row(self, place: int) -> Row:
        beside = {name: column[place] for name, column in self._beside.items()}
        return Row(
            self._sources[place],
            self._targets[place],
            tuple(beside["images"].split("\n")) if "images" in beside else (),
            float(beside.get("scores", 1.0)),
            beside.get("references", ""),
            int(beside["questions"]) if "questions" in beside else None,
        )

    def targets(self) -> Iterator[str]:
        return (self._targets[self._place(row)] for row in range(len(self)))

    def beside(self, name: str) -> Iterator[str] | None:
        """Return a column of BESIDE; None: these rows have none."""
        if name not in self._beside:
            return None
        return (self._beside[name][self._place(row)] for row in range(len(self)))


def keep_rows(
    rows: Iterable[Row], key: Callable[[], Mapping[str, Any]], *, tally: bool, likely_bytes: int, beside: Sequence[str] = ()
) -> Sequence[Row]:
    """Return rows as they come: in a list when they are CHUNK or fewer, otherwise in a table that `key` names.

    Args:
        tally: whether to note where each target came first, as the labels of a classification.
        beside: columns that a table of these rows has beside the texts, of BESIDE.
    """
    rows = iter(rows)
    first = list(itertools.islice(rows, CHUNK + 1))
    if len(first) <= CHUNK:
        return first
    everything = itertools.chain(first, rows)
    del first
    return StoredRows(
        stored_table(
            digest_of(key()),
            _columns(beside),
            lambda write: _fill(everything, write, tally=tally, beside=beside),
            likely_bytes=likely_bytes,
        )
    )


def _columns(beside: Sequence[str]) -> dict[str, str]:
    return COLUMNS | {name: BESIDE[name] for name in beside}


def known_rows(key: Mapping[str, Any], beside: Sequence[str] = ()) -> StoredRows | None:
    """Return the rows of a table that was written before; None: there is none."""
    table = known_table(digest_of(key), _columns(beside))
    return None if table is None else StoredRows(table)


def _fill(rows: Iterable[Row], write: Write, *, tally: bool, beside: Sequence[str]) -> Facts:
    first: dict[str, int] = {}
    count = 0
    with progress_of(None, 0, shown=True, what="reading row") as advance:
        for some in by_chunks(rows):
            texts = {"source": [row.source for row in some], "target": [row.target for row in some]}
            texts |= {name: [_WRITTEN[name](row) for row in some] for name in beside}
            write({name: chunk_of_texts(column) for name, column in texts.items()})
            if tally:
                for number, row in enumerate(some, start=count + 1):
                    first.setdefault(row.target, number)
            count += len(some)
            advance(len(some))
    return {"rows": count, "first": first if tally else None}


_WRITTEN: Mapping[str, Callable[[Row], str]] = {
    "images": lambda row: "\n".join(row.images),
    "scores": lambda row: repr(row.score),
    "references": lambda row: row.reference,
    "questions": lambda row: str(row.question),
}


def targets_of(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the target of every row."""
    return rows.targets() if isinstance(rows, StoredRows) else (row.target for row in rows)


def scores_of(rows: Sequence[Row]) -> Iterator[float]:
    """Yield what every row's answer is worth."""
    if isinstance(rows, StoredRows):
        stored = rows.beside("scores")
        return itertools.repeat(1.0, len(rows)) if stored is None else map(float, stored)
    return (row.score for row in rows)


def references_of(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what every row's answer is measured by: its target, where no more is known."""
    return (row.reference or row.target for row in rows)


def questions_of(rows: Sequence[Row]) -> Numbers | None:
    """Return the question of every row; None: each row is one by itself."""
    if isinstance(rows, StoredRows):
        stored = rows.beside("questions")
        return None if stored is None else np.fromiter(map(int, stored), np.int64, count=len(rows))
    return None if not rows or rows[0].question is None else np.array([row.question for row in rows])


def images_of(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Yield the files of every row's pictures."""
    stored = rows.beside("images") if isinstance(rows, StoredRows) else None
    return (row.images for row in rows) if stored is None else (tuple(files.split("\n")) for files in stored)


def first_of_each_target(rows: Sequence[Row]) -> Mapping[str, int]:
    """Return where each target comes first, counted from 1."""
    if isinstance(rows, StoredRows) and rows.is_whole and rows.table.facts["first"] is not None:
        found: dict[str, int] = rows.table.facts["first"]
        return found
    first: dict[str, int] = {}
    for number, target in enumerate(targets_of(rows), start=1):
        first.setdefault(target, number)
    return first


def select_rows(rows: Sequence[Row], order: Numbers) -> Sequence[Row]:
    """Return some rows in some order."""
    return rows.select(order) if isinstance(rows, StoredRows) else [rows[row] for row in order]

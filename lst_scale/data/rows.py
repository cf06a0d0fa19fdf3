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


@dataclass(frozen=True)
class Row:
    """One example as text."""

    source: str
    target: str


class StoredRows(Sequence[Row]):
    """Rows of a table, in its order or in another one. Each is made when it is asked for."""

    def __init__(self, table: Table, order: Numbers | None = None) -> None:
        self.table, self._order = table, order
        self._sources, self._targets = table.texts("source"), table.texts("target")

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
            return Row(self._sources[place], self._targets[place])
        chosen = range(len(self))[row]
        if chosen == range(len(self)):
            return self
        if len(chosen) <= CHUNK:
            return [self[each] for each in chosen]
        return self.select(np.arange(chosen.start, chosen.stop, chosen.step))

    def select(self, rows: Numbers) -> StoredRows:
        """Return some rows in some order."""
        return StoredRows(self.table, rows if self._order is None else self._order[rows])

    def targets(self) -> Iterator[str]:
        return (self._targets[self._place(row)] for row in range(len(self)))


def keep_rows(rows: Iterable[Row], key: Callable[[], Mapping[str, Any]], *, tally: bool, likely_bytes: int) -> Sequence[Row]:
    """Return rows as they come: in a list when they are CHUNK or fewer, otherwise in a table that `key` names.

    Args:
        tally: whether to note where each target came first, as the labels of a classification.
    """
    rows = iter(rows)
    first = list(itertools.islice(rows, CHUNK + 1))
    if len(first) <= CHUNK:
        return first
    everything = itertools.chain(first, rows)
    del first
    return StoredRows(
        stored_table(digest_of(key()), COLUMNS, lambda write: _fill(everything, write, tally=tally), likely_bytes=likely_bytes)
    )


def known_rows(key: Mapping[str, Any]) -> StoredRows | None:
    """Return the rows of a table that was written before; None: there is none."""
    table = known_table(digest_of(key), COLUMNS)
    return None if table is None else StoredRows(table)


def _fill(rows: Iterable[Row], write: Write, *, tally: bool) -> Facts:
    first: dict[str, int] = {}
    count = 0
    with progress_of(None, 0, shown=True, what="reading row") as advance:
        for some in by_chunks(rows):
            write({"source": chunk_of_texts([row.source for row in some]), "target": chunk_of_texts([row.target for row in some])})
            if tally:
                for number, row in enumerate(some, start=count + 1):
                    first.setdefault(row.target, number)
            count += len(some)
            advance(len(some))
    return {"rows": count, "first": first if tally else None}


def targets_of(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the target of every row."""
    return rows.targets() if isinstance(rows, StoredRows) else (row.target for row in rows)


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

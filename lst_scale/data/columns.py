"""Columns: one value a row, and no Python object a row. They lie in memory, or in a mapped file that all ranks of a machine share.

A column comes in chunks of CHUNK rows (the last may be shorter), so row r is place r % CHUNK of chunk r // CHUNK:

    values   | ids of row 0 | ids of row 1 | ids of row 2 ...
    ends     0              ^              ^                     one more than rows
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CHUNK = 8192
Numbers = NDArray[np.integer[Any]]


class Chunk(NamedTuple):
    """The values of some rows, one after another; row i is values[ends[i] : ends[i + 1]]."""

    ends: Numbers
    values: Numbers


class Column:
    """What all columns have: rows of unequal length.

    Args:
        let_go: gives back what a mapped file takes of this process's memory; it is read again where it is asked for.
    """

    def __init__(self, chunks: Sequence[Chunk], let_go: Callable[[], None] = lambda: None) -> None:
        self.let_go = let_go
        assert all(len(chunk.ends) == CHUNK + 1 for chunk in chunks[:-1]), [len(chunk.ends) for chunk in chunks]
        self.chunks = chunks
        self._count = sum(len(chunk.ends) - 1 for chunk in chunks)

    def __len__(self) -> int:
        return self._count

    @cached_property
    def lengths(self) -> Numbers:
        """How many values each row has."""
        return np.concatenate([np.diff(chunk.ends).astype(np.int32) for chunk in self.chunks]) if self.chunks else np.zeros(0, np.int32)

    def _values_of(self, row: int) -> Numbers:
        if row < 0:
            row += self._count
        if not 0 <= row < self._count:
            raise IndexError(row)
        chunk, place = divmod(row, CHUNK)
        ends, values = self.chunks[chunk]
        return values[ends[place] : ends[place + 1]]


class Ids(Column):
    """Token ids: an array a row."""

    @classmethod
    def of(cls, rows: Iterable[Sequence[int] | Numbers]) -> Ids:
        """Return a column in memory."""
        return cls([chunk_of(list(some)) for some in by_chunks(rows)])

    def __getitem__(self, row: int) -> Numbers:
        return self._values_of(row)

    def __iter__(self) -> Iterator[Numbers]:
        return map(self.__getitem__, range(len(self)))


class Texts(Column):
    """A text a row, kept as UTF-8."""

    def __getitem__(self, row: int) -> str:
        return self._values_of(row).tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


def chunk_of(rows: Sequence[Sequence[int] | Numbers]) -> Chunk:
    """Put the ids of some rows one after another."""
    ends = _ends([len(row) for row in rows])
    return Chunk(ends, np.fromiter((token for row in rows for token in row), np.int32, count=int(ends[-1])))


def chunk_of_arrays(rows: Sequence[Numbers]) -> Chunk:
    """Put some arrays one after another."""
    return Chunk(_ends([len(row) for row in rows]), np.concatenate(rows))


def chunk_of_texts(texts: Sequence[str]) -> Chunk:
    """Put some texts one after another."""
    encoded = [text.encode() for text in texts]
    return Chunk(_ends([len(text) for text in encoded]), np.frombuffer(b"".join(encoded), np.uint8))


def join_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """Return several chunks' rows as one chunk."""
    lengths = np.concatenate([np.diff(chunk.ends) for chunk in chunks])
    return Chunk(_ends(lengths), np.concatenate([chunk.values for chunk in chunks]))


def by_chunks(rows: Iterable[Any], size: int = CHUNK) -> Iterator[list[Any]]:
    """Yield `size` rows at a time."""
    some = []
    for row in rows:
        some.append(row)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


def _ends(lengths: Sequence[int] | Numbers) -> Numbers:
    ends = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends

"""By what a cache knows a row: a digest of its source, and one of its source and target. Imports no torch.

A digest is made of token ids without padding, so equal rows have equal digests however their batch is padded. Caches on disk are found
by them: what `source_digest` and `target_digest` return never changes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

BYTES = 16  # of a digest
FILLER = -1  # the number of a row that fills a batch up
IGNORED = -100  # a label that nobody predicts, as transformers and torch have it


class RowKey(NamedTuple):
    """One row: its digests, and how many tokens its source and target have without padding."""

    source: bytes
    target: bytes  # of the source and the target
    source_length: int
    target_length: int


@dataclass(frozen=True, kw_only=True)
class RowKeys:
    """The same of a batch."""

    sources: tuple[bytes, ...]
    targets: tuple[bytes, ...]
    source_lengths: tuple[int, ...]
    target_lengths: tuple[int, ...]

    def rows(self) -> Iterator[RowKey]:
        columns = (self.sources, self.targets, self.source_lengths, self.target_lengths)
        return (RowKey(*values) for values in zip(*columns, strict=True))


class KeyTable:
    """The same of a whole split, 40 bytes a row. The last, which is not counted, is that of FILLER."""

    _ROW = np.dtype([("digests", np.uint8, (2, BYTES)), ("lengths", np.int32, 2)])

    def __init__(self, rows: Iterable[RowKey], filler: RowKey, count: int = -1) -> None:
        """`count`: how many rows there are, if that is known."""
        self._rows = np.fromiter(map(_packed, itertools.chain(rows, [filler])), self._ROW, count=count + 1 if count >= 0 else -1)

    @classmethod
    def of_numbers(cls, numbers: NDArray[np.int32]) -> KeyTable:
        """Return the table whose `numbers` these are."""
        table = cls.__new__(cls)
        table._rows = np.ascontiguousarray(numbers).view(cls._ROW).reshape(-1)
        return table

    @property
    def numbers(self) -> NDArray[np.int32]:
        """All that is in it as an array (rows + 1, 10), to be kept on disk."""
        return self._rows.view(np.int32).reshape(len(self._rows), -1)

    def __len__(self) -> int:
        return len(self._rows) - 1

    @property
    def sources(self) -> NDArray[np.uint8]:
        """The digests of all rows' sources, an array (rows, 16)."""
        digests: NDArray[np.uint8] = self._rows["digests"][:-1, 0]
        return digests

    @property
    def targets(self) -> NDArray[np.uint8]:
        digests: NDArray[np.uint8] = self._rows["digests"][:-1, 1]
        return digests

    @property
    def lengths(self) -> NDArray[np.int32]:
        """How many tokens the source and the target of each row have, an array (rows, 2)."""
        lengths: NDArray[np.int32] = self._rows["lengths"][:-1]
        return lengths

    def distinct_tokens(self, sources: NDArray[np.bool_] | None = None, targets: NDArray[np.bool_] | None = None) -> tuple[int, int]:
        """Return the tokens of all different sources, and of all different pairs of source and target: equal ones are remembered once.

        Args:
            sources: of which rows the source counts; None: of all.
            targets: of which rows the target does.
        """
        return self._distinct_tokens(0, sources), self._distinct_tokens(1, targets)

    def _distinct_tokens(self, side: int, counted: NDArray[np.bool_] | None) -> int:
        rows = self._rows[:-1] if counted is None else self._rows[:-1][counted]
        heads = np.ascontiguousarray(rows["digests"][:, side, :8]).view(np.uint64)[:, 0]  # half a digest tells them apart well enough
        return int(rows["lengths"][np.unique(heads, return_index=True)[1], side].sum(dtype=np.int64))

    def of(self, rows: Sequence[int]) -> RowKeys:
        """Return those of a batch."""
        assert all(FILLER <= row < len(self) for row in rows), rows
        some = self._rows[list(rows)]
        digests, lengths = some["digests"].tobytes(), some["lengths"]
        each = [digests[first : first + BYTES] for first in range(0, len(digests), BYTES)]
        return RowKeys(
            sources=tuple(each[::2]),
            targets=tuple(each[1::2]),
            source_lengths=tuple(lengths[:, 0].tolist()),
            target_lengths=tuple(lengths[:, 1].tolist()),
        )

    def __getitem__(self, row: int) -> RowKey:
        (key,) = self.of([row]).rows()
        return key

    def __iter__(self) -> Iterator[RowKey]:
        return map(self.__getitem__, range(len(self)))


def joined(tables: Sequence[KeyTable]) -> KeyTable:
    """Return the rows of several splits, one after another, as one table."""
    numbers = [table.numbers[:-1] for table in tables]
    return KeyTable.of_numbers(np.concatenate([*numbers, tables[-1].numbers[-1:]]))


def source_digest(source: Any) -> bytes:
    """Return the digest of a row's source; token ids without padding, in memory."""
    return hashlib.blake2b(b"e" + _id_bytes(source), digest_size=BYTES).digest()


def target_digest(source: Any, target: Any) -> bytes:
    """Return the digest of a row's target, given its source; token ids without padding, in memory."""
    both = _id_bytes(source) + b"|" + _id_bytes(target)
    return hashlib.blake2b(b"d" + both, digest_size=BYTES).digest()


def _packed(row: RowKey) -> tuple[Any, tuple[int, int]]:
    digests = np.frombuffer(row.source + row.target, np.uint8).reshape(2, BYTES)
    return digests, (row.source_length, row.target_length)


def _id_bytes(ids: Any) -> bytes:
    return np.asarray(ids, np.int32).tobytes()

"""An index file looked up by digest where it is: many records, and no Python object for each."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RECORD = np.dtype([("digest", np.uint8, 16), ("offset", "<u8"), ("tokens", "<u4"), ("checksum", "<u4")])
Digests = NDArray[np.uint8]  # (N, 16)


class Segment:
    """The records of one index file from byte `start` to `end` whose payloads end within `size` bytes.

    In memory are 12 bytes a record: the beginning of its digest, and its place. The rest is read when it is asked for, not mapped: a file
    that is cut short behind our back lacks records, and a mapped one would end the process (SIGBUS).
    """

    def __init__(self, index: Path, start: int, end: int, *, size: int, bytes_a_token: int) -> None:
        self.path = index.with_suffix(".taps")
        self._index, self._start, self._count = os.open(index, os.O_RDONLY | os.O_CLOEXEC), start, (end - start) // RECORD.itemsize
        weakref.finalize(self, os.close, self._index)
        records = self._read(0, self._count)
        ends = records["offset"] + records["tokens"] * np.uint64(bytes_a_token)
        there = np.flatnonzero((records["offset"] <= size) & (ends <= size))  # a damaged offset may wrap round
        heads = _heads(records["digest"][there])
        order = np.argsort(heads, kind="stable")  # of equal digests the later record comes later
        self._heads, self._places = heads[order], there[order].astype(np.uint32)

    def __len__(self) -> int:
        return len(self._places)

    def _read(self, first: int, count: int) -> NDArray[np.void]:
        """Return records, fewer where the file ends before."""
        parts, offset = [], self._start + first * RECORD.itemsize
        left = count * RECORD.itemsize
        while left > 0 and (part := os.pread(self._index, left, offset)):
            parts.append(part)
            offset, left = offset + len(part), left - len(part)
        raw = b"".join(parts)
        return np.frombuffer(raw, RECORD, len(raw) // RECORD.itemsize)

    def find(self, digest: bytes) -> tuple[Path, int, int, int] | None:
        """Return where a payload is: path, offset, tokens and checksum; of several the last."""
        head = np.uint64(int.from_bytes(digest[:8], "big"))
        first, end = np.searchsorted(self._heads, head), np.searchsorted(self._heads, head, "right")
        for place in self._places[first:end][::-1]:
            for record in self._read(int(place), 1):
                if record["digest"].tobytes() == digest:
                    return self.path, int(record["offset"]), int(record["tokens"]), int(record["checksum"])
        return None

    def has_each(self, digests: Digests) -> NDArray[np.bool_]:
        """Return which of many digests are here."""
        if not len(self):
            return np.zeros(len(digests), bool)
        heads, stored = _heads(digests), self._read(0, self._count)["digest"]
        near = np.minimum(np.searchsorted(self._heads, heads), len(self) - 1)
        alike = (self._heads[near] == heads) & (self._places[near] < len(stored))
        found = alike.copy()
        found[alike] = (stored[self._places[near[alike]]] == digests[alike]).all(-1)
        for other in np.flatnonzero(alike & ~found):  # digests with one beginning: hardly ever
            found[other] = self.find(digests[other].tobytes()) is not None
        there: NDArray[np.bool_] = found
        return there


def _heads(digests: Digests) -> NDArray[np.uint64]:
    return np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0].astype(np.uint64)


def sorted_digests(digests: Digests) -> Digests:
    """Return digests in the order of their bytes."""
    halves = np.ascontiguousarray(digests).view(">u8")
    return digests[np.lexsort((halves[:, 1], halves[:, 0]))]

"""An index file as it is on disk, mapped and looked up by digest: many records, and no Python object for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECORD = np.dtype([("digest", np.uint8, 16), ("offset", "<u8"), ("tokens", "<u4"), ("checksum", "<u4")])
Digests = NDArray[np.uint8]  # (N, 16)


class Segment:
    """The records of one index file from byte `start` to `end` whose payloads end within `size` bytes."""

    def __init__(self, index: Path, start: int, end: int, *, size: int, bytes_a_token: int) -> None:
        self.path = index.with_suffix(".taps")
        self._records: Any = np.memmap(index, dtype=RECORD, mode="r", offset=start, shape=((end - start) // RECORD.itemsize,))
        ends = self._records["offset"] + self._records["tokens"] * np.uint64(bytes_a_token)
        there = np.flatnonzero((self._records["offset"] <= size) & (ends <= size))  # a damaged offset may wrap round
        heads = _heads(self._records["digest"][there])
        order = np.argsort(heads, kind="stable")  # of equal digests the later record comes later
        self._heads, self._places = heads[order], there[order].astype(np.uint32)

    def __len__(self) -> int:
        return len(self._places)

    def find(self, digest: bytes) -> tuple[Path, int, int, int] | None:
        """Return where a payload is: path, offset, tokens and checksum; of several the last."""
        head = np.uint64(int.from_bytes(digest[:8], "big"))
        first, end = np.searchsorted(self._heads, head), np.searchsorted(self._heads, head, "right")
        for place in self._places[first:end][::-1]:
            record = self._records[place]
            if record["digest"].tobytes() == digest:
                return self.path, int(record["offset"]), int(record["tokens"]), int(record["checksum"])
        return None

    def has_each(self, digests: Digests) -> NDArray[np.bool_]:
        """Return which of many digests are here."""
        if not len(self):
            return np.zeros(len(digests), bool)
        heads = _heads(digests)
        near = np.minimum(np.searchsorted(self._heads, heads), len(self) - 1)
        alike = self._heads[near] == heads
        found = alike.copy()
        found[alike] = (self._records["digest"][self._places[near[alike]]] == digests[alike]).all(-1)
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

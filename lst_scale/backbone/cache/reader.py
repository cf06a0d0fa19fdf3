"""Batches of taps from disk, by one thread of their own.

Told which batch comes next (`prefetch`), it reads that one while the present one trains: then one batch is in use and one ahead, never
more, and a step waits for the disk only when reading takes longer than training. All reads are that thread's, so none meets a write.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from lst_scale.backbone.cache.store import TapCache
from lst_scale.inputs.keys import RowKeys


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A batch as the cache knows it; equal for equal batches."""

    keys: RowKeys
    width: tuple[int, int]  # S and T


Read = tuple[list[Tensor], list[Tensor]]  # the states of source and target, each (B, S, D) or (B, T, D), on the CPU


class TapReader:
    """Reads batches from `cache`; `pinned`: into memory that a GPU copies from by itself."""

    def __init__(self, cache: TapCache, *, pinned: bool) -> None:
        self.cache, self._pinned = cache, pinned
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tap-reader")
        self._ahead: tuple[Wanted, Future[Read | None]] | None = None

    def prefetch(self, wanted: Wanted) -> None:
        """Begin to read a batch, unless that is being done."""
        if self._ahead is None or self._ahead[0] != wanted:
            self._ahead = wanted, self._thread.submit(self._read, wanted)

    def read(self, wanted: Wanted) -> Read | None:
        """Return the batch that was read ahead if it is this one; read this one otherwise. What failed in the thread is raised here.

        None: any of it is missing or damaged.
        """
        found = None
        if self._ahead is not None and self._ahead[0] == wanted:
            (_, reading), self._ahead = self._ahead, None
            found = reading.result()
        # What was missing may have been written since.
        return found or self._thread.submit(self._read, wanted).result()

    def read_beside(self, source: list[Tensor] | None, wanted: Wanted) -> Read | None:
        """Return a batch whose sources' states were read before, if they were."""
        return self._thread.submit(self._read, wanted, source).result()

    def _read(self, wanted: Wanted, source: list[Tensor] | None = None) -> Read | None:
        """Return a batch, or None when any of it is missing or damaged; nothing is read when something is known to be missing.

        `source`: its sources' states, where they were read before.
        """
        if not self._has(wanted):
            self.cache.refresh()  # another process may have written it since
            if not self._has(wanted):
                return None
        keys = wanted.keys
        if source is None:
            source = [] if self.cache.key.target_only else self._read_states(keys.sources, keys.source_lengths, wanted.width[0])
        if source is None:
            return None
        target = self._read_states(keys.targets, keys.target_lengths, wanted.width[1], of_target=True)
        return None if target is None else (source, target)

    def _has(self, wanted: Wanted) -> bool:
        sources = () if self.cache.key.target_only else wanted.keys.sources
        return all(digest in self.cache for digest in (*sources, *wanted.keys.targets))

    def _read_states(self, digests: Sequence[bytes], lengths: Sequence[int], width: int, *, of_target: bool = False) -> list[Tensor] | None:
        """Return the states of sources or of targets, read straight into batches; padding is zero, which masked attention never sees."""
        states = len(self.cache.key.layers) + (self.cache.key.decoder_final if of_target else 0)
        shape = (len(digests), width, self.cache.key.d_model)
        batches = [torch.empty(shape, dtype=self.cache.floating, pin_memory=self._pinned) for _ in range(states)]
        for row, (digest, length) in enumerate(zip(digests, lengths, strict=True)):
            if not self.cache.read_into(digest, [batch[row, :length] for batch in batches], of_target):
                return None
            for batch in batches:
                batch[row, length:] = 0
        return batches

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


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A batch as the cache knows it; equal for equal batches."""

    encoder: tuple[bytes, ...]  # digests, one a row
    decoder: tuple[bytes, ...]
    source_lengths: tuple[int, ...]
    target_lengths: tuple[int, ...]
    width: tuple[int, int]  # S and T


Read = tuple[list[Tensor], list[Tensor]]  # the states of encoder and decoder, each (B, S, D) or (B, T, D), on the CPU


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

    def read_beside(self, encoder: list[Tensor] | None, wanted: Wanted) -> Read | None:
        """Return a batch whose encoder's states were read before, if they were."""
        return self._thread.submit(self._read, wanted, encoder).result()

    def _read(self, wanted: Wanted, encoder: list[Tensor] | None = None) -> Read | None:
        """Return a batch, or None when any of it is missing or damaged; nothing is read when something is known to be missing.

        `encoder`: its encoder's states, where they were read before.
        """
        if not self._has(wanted):
            self.cache.refresh()  # another process may have written it since
            if not self._has(wanted):
                return None
        layers = len(self.cache.key.layers)
        encoder = encoder or self._read_stack(wanted.encoder, wanted.source_lengths, wanted.width[0], layers)
        if encoder is None:
            return None
        decoder = self._read_stack(wanted.decoder, wanted.target_lengths, wanted.width[1], layers + self.cache.key.decoder_final)
        return None if decoder is None else (encoder, decoder)

    def _has(self, wanted: Wanted) -> bool:
        return all(digest in self.cache for digest in (*wanted.encoder, *wanted.decoder))

    def _read_stack(self, digests: Sequence[bytes], lengths: Sequence[int], width: int, states: int) -> list[Tensor] | None:
        """Return one stack's states, read straight into batches; padding is zero, which masked attention never sees."""
        shape = (len(digests), width, self.cache.key.d_model)
        batches = [torch.empty(shape, dtype=self.cache.floating, pin_memory=self._pinned) for _ in range(states)]
        for row, (digest, length) in enumerate(zip(digests, lengths, strict=True)):
            if not self.cache.read_into(digest, [batch[row, :length] for batch in batches]):
                return None
            for batch in batches:
                batch[row, length:] = 0
        return batches

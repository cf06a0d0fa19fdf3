"""What a backbone is given: the sources of some rows and, given them, their targets; and by what a cache knows each row.

Shapes: B rows, S source tokens, T target tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RowKeys:
    """The names of a batch's rows and how long they are; equal for equal rows, however they are padded."""

    sources: tuple[bytes, ...]
    targets: tuple[bytes, ...]  # each of a source and a target
    source_lengths: tuple[int, ...]
    target_lengths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """One batch. Make it where the token ids are, on the CPU, and move it by `to`: then no id comes back from a GPU to be hashed."""

    source_BS: Tensor
    source_mask_BS: Tensor  # 1 = token, 0 = padding
    target_BT: Tensor
    target_lengths: tuple[int, ...] | None = None  # without padding; None: all T
    made_from: Inputs | None = None  # the same on the device where it was made

    def to(self, device: torch.device) -> Inputs:
        """Return the same on a device."""
        return dataclasses.replace(
            self,
            source_BS=self.source_BS.to(device),
            source_mask_BS=self.source_mask_BS.to(device),
            target_BT=self.target_BT.to(device),
            made_from=self.made_from or self,
        )

    def with_target(self, target_T: Tensor) -> Inputs:
        """Return the same sources, each with this one target, given on the device where they were made."""
        origin, rows = self.made_from or self, len(self.source_BS)
        other = dataclasses.replace(origin, target_BT=target_T.expand(rows, -1), target_lengths=None)
        if self.made_from is None:
            return other
        moved = target_T.to(self.source_BS.device).expand(rows, -1)
        return dataclasses.replace(self, target_BT=moved, target_lengths=None, made_from=other)

    @functools.cached_property
    def keys(self) -> RowKeys:
        """Made once, of the ids where they were made."""
        if self.made_from is not None:
            return self.made_from.keys
        source_BS, mask_BS, target_BT = self.source_BS.cpu(), self.source_mask_BS.cpu().bool(), self.target_BT.cpu()
        lengths = self.target_lengths or (target_BT.shape[1],) * len(target_BT)
        sources = [row[mask] for row, mask in zip(source_BS, mask_BS, strict=True)]
        targets = [row[:length] for row, length in zip(target_BT, lengths, strict=True)]
        return RowKeys(
            sources=tuple(source_digest(source) for source in sources),
            targets=tuple(target_digest(source, target) for source, target in zip(sources, targets, strict=True)),
            source_lengths=tuple(map(len, sources)),
            target_lengths=tuple(lengths),
        )


def source_digest(source: Tensor) -> bytes:
    """Return the name of a row's source; token ids without padding."""
    return hashlib.blake2b(b"e" + _id_bytes(source), digest_size=16).digest()


def target_digest(source: Tensor, target: Tensor) -> bytes:
    """Return the name of a row's target, given its source; token ids without padding."""
    both = _id_bytes(source) + b"|" + _id_bytes(target)
    return hashlib.blake2b(b"d" + both, digest_size=16).digest()


def _id_bytes(ids: Tensor) -> bytes:
    return bytes(ids.to("cpu", torch.int32).contiguous().numpy().data)

"""What a backbone is given: the sources of some rows and, given them, their targets.

Shapes: B rows, S source tokens, T target tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lst_scale.inputs.keys import RowKeys, source_digest, target_digest


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. It goes to a GPU by way of pinned memory: a plain copy waits for all that the GPU was asked before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """One batch. Make it where the token ids are, on the CPU, and move it by `to`: then no id comes back from a GPU to be hashed."""

    source_BS: Tensor
    source_mask_BS: Tensor  # 1 = token, 0 = padding
    target_BT: Tensor
    target_lengths: tuple[int, ...] | None = None  # without padding; None: all T
    encoded_keys: RowKeys | None = None  # made when the rows were encoded; None: they are made of these ids, when a cache asks
    made_from: Inputs | None = None  # the same on the device where it was made
    beside: Inputs | None = None  # the same sources with another target

    def to(self, device: torch.device) -> Inputs:
        """Return the same on a device."""
        return dataclasses.replace(
            self,
            source_BS=moved(self.source_BS, device),
            source_mask_BS=moved(self.source_mask_BS, device),
            target_BT=moved(self.target_BT, device),
            made_from=self.made_from or self,
        )

    def with_target(self, target_T: Tensor) -> Inputs:
        """Return the same sources, each with this one target, given on the device where they were made."""
        origin, rows = self.made_from or self, len(self.source_BS)
        other = dataclasses.replace(origin, target_BT=target_T.expand(rows, -1), target_lengths=None, encoded_keys=None, beside=origin)
        if self.made_from is None:
            return other
        there = moved(target_T, self.source_BS.device).expand(rows, -1)
        return dataclasses.replace(self, target_BT=there, target_lengths=None, encoded_keys=None, made_from=other)

    @functools.cached_property
    def keys(self) -> RowKeys:
        """By what a cache knows the rows: made once, when they were encoded or else here, of the ids where they were made."""
        if self.encoded_keys is not None:
            return self.encoded_keys
        return self._hashed() if self.made_from is None else self.made_from.keys

    def _hashed(self) -> RowKeys:
        lengths = self.target_lengths or (self.target_BT.shape[1],) * len(self.target_BT)
        source_BS, target_BT = (ids.to("cpu", torch.int32).numpy() for ids in (self.source_BS, self.target_BT))
        sources = [row[mask] for row, mask in zip(source_BS, self.source_mask_BS.cpu().bool().numpy(), strict=True)]
        targets = [row[:length] for row, length in zip(target_BT, lengths, strict=True)]
        return RowKeys(
            sources=tuple(map(source_digest, sources)) if self.beside is None else self.beside.keys.sources,
            targets=tuple(map(target_digest, sources, targets)),
            source_lengths=tuple(map(len, sources)),
            target_lengths=lengths,
        )

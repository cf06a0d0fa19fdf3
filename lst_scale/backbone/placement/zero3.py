"""The source for blocks that are divided over all ranks and gathered just before they run (placement `zero3`).

ZeRO-3's idea for weights that never change: each rank keeps 1/n of a block's bytes, and an all-gather, started one block ahead, fills
a slot. DeepSpeed's own ZeRO-3 does this for parameters that train; it knows nothing of int8 and NF4 buffers, and its trace of modules
is upset by generation. Gathering bytes serves all precisions, and shares nothing with the side network's engine, not even a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone.placement.prefetch import Layout, Pending, named_tensors
from lst_scale.system.distributed import Group


class PartitionedSource:
    """Each block's bytes in equal parts, one a rank of `group`. All ranks must run the same blocks in the same order."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.layouts: list[Layout] = []
        self._parts: list[Tensor] = []
        self._group, self._device = group, device

    def add(self, block: nn.Module) -> None:
        """Keep this rank's part of the next block."""
        tensors = named_tensors(block)
        layout = Layout.of(tensors)
        size = -(-layout.nbytes // self._group.size)
        whole = layout.pack(tensors, torch.zeros(size * self._group.size, dtype=torch.uint8, device=self._device))
        self.layouts.append(layout)
        self._parts.append(whole[size * self._group.rank : size * (self._group.rank + 1)].clone())

    @property
    def slot_bytes(self) -> int:
        return max(part.numel() for part in self._parts) * self._group.size

    @property
    def device_bytes(self) -> int:
        return sum(part.numel() for part in self._parts)

    def start(self, index: int, slot: Tensor, free: Any | None) -> Pending:
        # The collective waits for what this rank has queued so far, so for the computation that used the slot: `free` is not needed.
        part = self._parts[index]
        pending: Pending = self._group.start_all_gather(slot[: part.numel() * self._group.size], part)
        return pending

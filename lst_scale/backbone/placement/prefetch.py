"""Blocks that are on the device only while they run: two slots of memory, and the next block on its way while one computes.

    block i enters    wait for its bytes in slot a;  start those of the next block into slot b
    block i runs      its tensors are views into slot a
    block i leaves    its tensors are empty; slot a may be overwritten once its computation is done

Where the bytes come from is a `Source`: host memory, a file (`streamed.py`), or the other ranks (`partitioned.py`). Blocks travel as
one buffer of bytes, so int8 and NF4 travel quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes; what CUDA's allocator gives, and more than any dtype needs


@dataclass(frozen=True, kw_only=True)
class _Field:
    dtype: torch.dtype
    shape: torch.Size
    offset: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a block's tensors lie in one buffer of bytes."""

    fields: Mapping[str, _Field]
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        fields, offset = {}, 0
        for name, tensor in tensors.items():
            nbytes = tensor.numel() * tensor.element_size()
            fields[name] = _Field(dtype=tensor.dtype, shape=tensor.shape, offset=offset, nbytes=nbytes)
            offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return cls(fields=fields, nbytes=offset)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the tensors that lie in `buffer` (uint8, at least `nbytes` long)."""
        return {name: buffer[f.offset : f.offset + f.nbytes].view(f.dtype).view(f.shape) for name, f in self.fields.items()}

    def pack(self, tensors: Mapping[str, Tensor], buffer: Tensor) -> Tensor:
        """Copy `tensors` into `buffer` and return it."""
        for name, view in self.views(buffer).items():
            view.copy_(tensors[name])
        return buffer


class Pending(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Return when work queued from now on will see the bytes."""


class Done:
    """A copy that was over at once."""

    def wait(self) -> None:
        return


class Source(Protocol):
    """Where the bytes of blocks come from."""

    @property
    def layouts(self) -> list[Layout]: ...
    @property
    def slot_bytes(self) -> int:
        """The size of a slot that can take any block."""
        ...

    @property
    def device_bytes(self) -> int:
        """What the source itself keeps on the device."""
        ...

    def start(self, index: int, slot: Tensor, free: Any | None) -> Pending:
        """Begin to fill `slot` with block `index`; `free` is the CUDA event after which it may be overwritten."""
        ...


class Prefetcher:
    """Brings blocks to the device and takes them away again, by hooks on their forward pass."""

    SLOTS = 2

    def __init__(self, blocks: list[nn.Module], source: Source, device: torch.device) -> None:
        self.blocks, self.source = blocks, source
        self.slots = [torch.empty(source.slot_bytes, dtype=torch.uint8, device=device) for _ in range(self.SLOTS)]
        self.on_copy: Callable[[int, int, int], None] | None = None  # (block, slot, bytes), when a copy starts
        self._holds: list[int | None] = [None] * self.SLOTS
        self._pending: dict[int, Pending] = {}
        self._free: list[Any | None] = [None] * self.SLOTS
        self._successor = {i: i + 1 for i in range(len(blocks) - 1)}  # learned: after the last block comes what came last time
        self._last: int | None = None
        for index, block in enumerate(blocks):
            empty(block)
            block.register_forward_pre_hook(lambda _module, _inputs, i=index: self._enter(i))
            block.register_forward_hook(lambda _module, _inputs, _output, i=index: self._leave(i))

    @property
    def resident_bytes(self) -> int:
        """Bytes of device memory that blocks take: the slots, and what the source keeps there."""
        return sum(slot.numel() for slot in self.slots) + self.source.device_bytes

    def _enter(self, index: int) -> None:
        if index not in self._holds:
            self._begin(index, self._other_than(self._last))
        if index in self._pending:
            self._pending.pop(index).wait()
        slot = self._holds.index(index)
        assign(self.blocks[index], self.source.layouts[index].views(self.slots[slot]))
        if self._last is not None:
            self._successor[self._last] = index
        self._last = index
        following = self._successor.get(index)
        if following is not None and following not in self._holds:
            self._begin(following, 1 - slot)

    def _leave(self, index: int) -> None:
        empty(self.blocks[index])
        slot = self._holds.index(index)
        if self.slots[slot].is_cuda:
            self._free[slot] = torch.cuda.current_stream().record_event()

    def _other_than(self, index: int | None) -> int:
        return 1 - self._holds.index(index) if index is not None and index in self._holds else 0

    def _begin(self, index: int, slot: int) -> None:
        held = self._holds[slot]
        if held in self._pending:  # brought for nothing: a guess was wrong
            self._pending.pop(held).wait()
        self._holds[slot] = index
        if self.on_copy is not None:
            self.on_copy(index, slot, self.source.layouts[index].nbytes)
        self._pending[index] = self.source.start(index, self.slots[slot], self._free[slot])


def named_tensors(block: nn.Module) -> dict[str, Tensor]:
    """Return all that a block holds, by dotted name."""
    return {name: p.detach() for name, p in block.named_parameters()} | dict(block.named_buffers())


def assign(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let the block's parameters and buffers be `tensors`, without a copy."""
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        module = block.get_submodule(path)
        if last in module._parameters:
            module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[last] = tensor


def empty(block: nn.Module) -> None:
    """Take the block's tensors away: what is left has a dtype and no elements, and can't be used by mistake."""
    assign(block, {name: torch.empty(0, dtype=tensor.dtype) for name, tensor in named_tensors(block).items()})

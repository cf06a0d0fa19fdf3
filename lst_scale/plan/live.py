"""Count the bytes of every tensor storage that is alive, from its first appearance to its end. Real tensors or fake ones.

Views share a storage and count once. What a kernel allocates inside itself and frees again is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Life:
    """One storage: its size, the phase that made it, and between which events it lived."""

    bytes: int
    phase: str
    born: int
    died: int | None = None


@dataclass
class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, keeps account of storages that operations return.

    Call `enter_phase` between the parts of a step; what a phase made and left alive may be renamed with `survivors`.
    """

    phase: str = ""
    lives: list[Life] = field(default_factory=list)
    now: int = 0
    peak: int = 0
    peak_at: int = 0  # the event at which it was reached
    peak_phase: str = ""

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: set[int] = set()
        self._events = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return result

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it was seen before."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        self._known.add(address)
        self._events += 1
        life = Life(bytes=storage.nbytes(), phase=self.phase, born=self._events)
        self.lives.append(life)
        self.now += life.bytes
        if self.now > self.peak:
            self.peak, self.peak_at, self.peak_phase = self.now, self._events, self.phase
        weakref.finalize(storage, self._gone, address, life).atexit = False

    def _gone(self, address: int, life: Life) -> None:
        self._known.discard(address)
        self._events += 1
        life.died = self._events
        self.now -= life.bytes

    def enter_phase(self, phase: str, *, survivors: str | None = None) -> None:
        """Begin a phase; what the one before made and is still alive belongs to `survivors` from now on."""
        if survivors is not None:
            for life in self.lives:
                if life.phase == self.phase and life.died is None:
                    life.phase = survivors
        self.phase = phase

    def at_peak(self) -> dict[str, int]:
        """Return the bytes of each phase at the moment of the peak."""
        parts: Counter[str] = Counter()
        for life in self.lives:
            if life.born <= self.peak_at and (life.died is None or life.died > self.peak_at):
                parts[life.phase] += life.bytes
        return dict(parts)

    def alive(self, phase: str) -> int:
        """Return the bytes of a phase that are alive now."""
        return sum(life.bytes for life in self.lives if life.phase == phase and life.died is None)


def nbytes(tensors: Any) -> int:
    """Return the bytes behind some tensors, shared storages once."""
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors if isinstance(tensor, torch.Tensor)
    }
    return sum(storages.values())

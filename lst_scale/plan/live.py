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
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lst_scale.plan import memo

_DEVICE_OF = torch.ops.prim.device.default


@dataclass
class Life:
    """One storage: its size, the phase that made it, and between which events it lived."""

    bytes: int
    phase: str | None
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
    peaks: dict[str, tuple[int, int]] = field(default_factory=dict)  # of each phase: bytes, and the event at which they were reached
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)  # of each phase that ended: its first event, and the next phase's

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: set[int] = set()
        self._events = self._mark = self._began = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked oftener than anything is computed
        result = memo.run(func, args, kwargs or {})
        if isinstance(result, Tensor):
            self.see(result)
        else:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.see(leaf)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and keeping the compiler away costs more than many an operation

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
        if self.now > self.peaks.get(self.phase, (0, 0))[0]:
            self.peaks[self.phase] = self.now, self._events
        weakref.finalize(storage, self._gone, address, life).atexit = False

    def _gone(self, address: int, life: Life) -> None:
        self._known.discard(address)
        self._events += 1
        life.died = self._events
        if life.phase is not None:
            self.now -= life.bytes

    def forget(self) -> None:
        """Count nothing of what was seen so far."""
        for life in self.lives:
            life.phase = None
        self.lives, self.now, self.peaks = [], 0, {}

    def enter_phase(self, phase: str, *, survivors: str | None = None) -> None:
        """Begin a phase; what the one before made and is still alive belongs to `survivors` from now on."""
        if survivors is not None:
            for life in self.lives:
                if life.phase == self.phase and life.died is None:
                    life.phase = survivors
        self.spans[self.phase] = self._began, self._events + 1
        self.phase, self._began = phase, self._events + 1

    def at_peak(self, phase: str) -> dict[str, int]:
        """Return what was alive at the worst point of a phase, in bytes by the phase that made it."""
        return self._alive_at(self.peaks.get(phase, (0, 0))[1])

    def at_worst(self, span: tuple[int, int], *, without: str | None) -> dict[str, int]:
        """Return what was alive at the worst of some events, by the phase that made it, but for what belongs to one of them."""
        counted = [life for life in self.lives if life.phase is not None and life.phase != without]
        changes = [(life.born, life.bytes) for life in counted] + [(life.died, -life.bytes) for life in counted if life.died is not None]
        now, most, worst = 0, -1, span[0]
        for event, change in sorted(changes):
            if event >= span[1]:
                break
            now += change
            if event >= span[0] and now > most:
                most, worst = now, event
        return {phase: size for phase, size in self._alive_at(worst).items() if phase != without}

    def first(self, phase: str) -> int | None:
        """Return the event that made the first of what belongs to a phase now; None: nothing does."""
        return min((life.born for life in self.lives if life.phase == phase), default=None)

    def mark(self) -> None:
        """Remember this point for `at_mark`."""
        self._mark = self._events

    def at_mark(self) -> dict[str, int]:
        """Return what was alive at the mark."""
        return self._alive_at(self._mark)

    def _alive_at(self, event: int) -> dict[str, int]:
        parts: Counter[str] = Counter()
        for life in self.lives:
            if life.phase is not None and life.born <= event and (life.died is None or life.died > event):
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

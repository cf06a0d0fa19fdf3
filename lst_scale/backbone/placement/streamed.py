"""Sources for blocks that wait in host memory or on disk (placement `streamed`).

Block files are gigabytes, so a start looks at sizes and headers alone, and writes all again where one is wrong. A file that somebody has
touched since it was written, by what the system says of it, is compared with its digest when it is first read. One that can't be used
ends the run, and the next start writes all again. What a disk changes by itself is not noticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lst_scale.backbone.placement.prefetch import Done, Layout, Pending, named_tensors
from lst_scale.errors import BackboneError
from lst_scale.system.durable import alone, last_touched, sha256_of, write_directory

INDEX, FORMAT = "blocks.json", 2
SETTING = "backbone.placement.folder"  # what to change for another place


class CopyStream:
    """Copies to the device beside the computation: on a CUDA stream of its own; on the CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def copy(self, target: Tensor, host: Tensor, free: Any | None) -> Pending:
        """Begin to copy `host` (pinned where there is CUDA) into `target` once the event `free` has passed."""
        if self._stream is None:
            target.copy_(host)
            return Done()
        with torch.cuda.stream(self._stream):
            if free is not None:
                self._stream.wait_event(free)
            target.copy_(host, non_blocking=True)
            return _Arrival(self._stream.record_event())


class _Arrival:
    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self.event)

    def synchronize(self) -> None:
        """Return when the copy is over."""
        self.event.synchronize()


class _Waiting:
    """Blocks that take no memory of the device but the slots."""

    layouts: list[Layout]

    @property
    def device_bytes(self) -> int:
        return 0

    @property
    def slot_bytes(self) -> int:
        return max(layout.nbytes for layout in self.layouts)


class HostSource(_Waiting):
    """All blocks in host memory, pinned where the device is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.layouts = []
        self._buffers: list[Tensor] = []
        self._pinned = device.type == "cuda"
        self._copies = CopyStream(device)

    def add(self, block: nn.Module) -> None:
        """Take a copy of the next block."""
        tensors = named_tensors(block)
        layout = Layout.of(tensors)
        self.layouts.append(layout)
        self._buffers.append(layout.pack(tensors, torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=self._pinned)))

    def start(self, index: int, slot: Tensor, free: Any | None) -> Pending:
        buffer = self._buffers[index]
        return self._copies.copy(slot[: buffer.numel()], buffer, free)


class DiskSource(_Waiting):
    """Each block in a safetensors file of its own, mapped while it is read: no block stays in host memory."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        index = _read_index(folder)
        self._files = [folder / name for name in index["sha256"]]
        self._digests = list(index["sha256"].values())
        self._unsure = {place for place, file in enumerate(self._files) if last_touched(file) != index["touched"][file.name]}
        self.layouts = [Layout.of(_open_meta(file)) for file in self._files]
        # One thread: reads stay in order. Staging memory is pinned, one for each slot; without CUDA reads go to the slot itself.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="block-reader")
        self._copies = CopyStream(device)
        self._staging: dict[int, tuple[Tensor, Any]] = {}

    def start(self, index: int, slot: Tensor, free: Any | None) -> Pending:
        return _Read(self._worker.submit(self._read, index, slot, free))

    def _read(self, index: int, slot: Tensor, free: Any | None) -> Pending:
        layout = self.layouts[index]
        if not slot.is_cuda:
            self._load(index, slot)
            return Done()
        if slot.data_ptr() in self._staging:
            staging, earlier = self._staging[slot.data_ptr()]
            earlier.synchronize()
        else:
            staging = torch.empty(self.slot_bytes, dtype=torch.uint8, pin_memory=True)
        self._load(index, staging)
        arrival = self._copies.copy(slot[: layout.nbytes], staging[: layout.nbytes], free)
        self._staging[slot.data_ptr()] = (staging, arrival)
        return arrival

    def _load(self, index: int, buffer: Tensor) -> None:
        path = self._files[index]
        try:
            if index in self._unsure and sha256_of(path) != self._digests[index]:
                raise self._unusable(path, "it has changed since it was written")
            self._unsure.discard(index)
            with safe_open(path, framework="pt") as file:
                for name, view in self.layouts[index].views(buffer).items():
                    view.copy_(file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise self._unusable(path, error) from error

    def _unusable(self, file: Path, why: object) -> BackboneError:
        """Take away what says that the files are whole, so that the next start writes them again, and return what to say."""
        try:
            (self.folder / INDEX).unlink(missing_ok=True)
        except OSError:
            return BackboneError(f"{file} can't be used ({why}): remove {self.folder} and start again")
        return BackboneError(f"{file} can't be used ({why}): start again, and all blocks are written anew")


class _Read:
    def __init__(self, future: Future[Pending]) -> None:
        self.future = future

    def wait(self) -> None:
        self.future.result().wait()


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds block files that were written to the end and have their sizes still, and headers that can be read."""
    try:
        index = _read_index(folder)
        return index["format"] == FORMAT and all(
            (folder / name).stat().st_size == size and bool(_open_meta(folder / name)) for name, size in index["bytes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False


def write_missing(folder: Path, names: Sequence[str], build: Callable[[int], nn.Module]) -> None:
    """Write block files unless they are there: the first process that asks does, others wait for it."""
    if is_whole(folder):
        return
    with alone(folder, SETTING):
        if not is_whole(folder):
            write_blocks(folder, names, build)


def write_blocks(folder: Path, names: Sequence[str], build: Callable[[int], nn.Module]) -> None:
    """Write one file a block, made by `build(index)` one at a time, and read them back."""

    def fill(partial: Path) -> None:
        digests, sizes, touched = {}, {}, {}
        for index, name in enumerate(names):
            file = partial / f"{name}.safetensors"
            save_file({key: tensor.cpu().contiguous() for key, tensor in named_tensors(build(index)).items()}, file)
            digests[file.name], sizes[file.name], touched[file.name] = sha256_of(file), file.stat().st_size, last_touched(file)
        known = {"format": FORMAT, "sha256": digests, "bytes": sizes, "touched": touched}
        (partial / INDEX).write_text(json.dumps(known, indent=2) + "\n")

    def check(whole: Path) -> None:
        for name, digest in _read_index(whole)["sha256"].items():
            if sha256_of(whole / name) != digest:
                raise BackboneError(f"{whole / name} reads back different from what was written: check the disk")

    write_directory(folder, fill, check, SETTING)


def _read_index(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return index


def _open_meta(file: Path) -> dict[str, Tensor]:
    """Return the file's tensors on the meta device, in the order of the file."""
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8}
    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, not a mapping
        return {name: torch.empty(s.get_shape(), dtype=dtypes[s.get_dtype()], device="meta") for name, s in slices.items()}

"""Taps on disk, found by what they were computed from: the same text on the same backbone is never run twice.

    FOLDER/KEY/key.json          the backbone's fingerprint, precision, kept layers, storage dtype
    FOLDER/KEY/WRITER.taps       payloads, one after another, no padding
    FOLDER/KEY/WRITER.index      32 bytes a payload: digest of its token ids, offset, tokens, CRC-32

A row's source taps are found by its source ids, its target taps by source and target ids, so a change of tokenizer, text format or
truncation finds nothing, and a change of weights or precision looks in another folder: there is nothing that could be stale. Each
process appends to files of its own, data before index; a killed writer leaves whole payloads behind, and any number of processes and
ranks read them, while it writes too. A payload whose checksum is wrong counts as missing and is made again. Which of several runs on
the same rows writes is settled in `claim.py`.

Shapes: L tokens (source or target), K states, D = d_model.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import uuid
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lst_scale.backbone.cache.key import KEY, CacheKey, read_key
from lst_scale.backbone.cache.segment import Digests, Segment
from lst_scale.errors import BackboneError, reason_of
from lst_scale.system.durable import write_file

RECORD = struct.Struct("<16sQII")  # digest, offset, tokens, CRC-32 of the payload
MANY = 4096  # records that are left in their file (segment.py); of fewer, each is an object in memory
STORAGE = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}


class Elsewhere(Protocol):
    """Payloads of another folder that serve this one's readers; nothing is written there."""

    @property
    def damaged(self) -> list[str]: ...
    def __contains__(self, digest: bytes) -> bool: ...
    def has_each(self, digests: Digests) -> NDArray[np.bool_]: ...
    def refresh(self) -> None: ...
    def read_into(self, digest: bytes, into: Sequence[Tensor], of_target: bool = False) -> bool: ...
    def close(self) -> None: ...


class TapCache:
    """One key's payloads: what all writers have left, and what this process adds. What it lacks may be `elsewhere`."""

    def __init__(self, root: Path, key: CacheKey, elsewhere: Sequence[Elsewhere] = ()) -> None:
        self.key, self.folder, self._elsewhere = key, root / key.folder, elsewhere
        self._damaged: list[str] = []  # payloads that were passed over, named for the log
        self._where: dict[bytes, tuple[Path, int, int, int]] = {}  # what is new
        self._segments: list[Segment] = []  # what was there, the newest first
        self._dropped: set[bytes] = set()  # damaged there
        self._files: dict[Path, int] = {}  # open for reading
        self._seen: dict[Path, int] = {}  # how much of each index was read
        self._data: Any = None
        self._index: Any = None
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._path = self.folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.taps"
        self._make()
        self.refresh()

    def _make(self) -> None:
        """Make the folder and its mark, unless they are there: a cache that is there may be read-only.

        Raises:
            BackboneError: it can't be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / KEY).exists():
                write_file(self.folder / KEY, json.dumps(self.key.as_json(), indent=2) + "\n")
        except OSError as error:
            raise BackboneError(
                f"cache.folder: {self.folder} can't be made ({reason_of(error)}): write another folder, or cache.enabled=false"
            ) from error

    @property
    def damaged(self) -> list[str]:
        """The places of payloads that were passed over."""
        return self._damaged + [place for other in self._elsewhere for place in other.damaged]

    @property
    def floating(self) -> torch.dtype:
        """What taps are when they have been read."""
        return torch.bfloat16 if self.key.dtype == "int8" else STORAGE[self.key.dtype]

    def __contains__(self, digest: bytes) -> bool:
        return self._find(digest) is not None or any(digest in other for other in self._elsewhere)

    def __len__(self) -> int:
        return len(self._where) + sum(map(len, self._segments))

    def has_each(self, digests: Digests) -> NDArray[np.bool_]:
        """Return which of many digests are here."""
        found = np.zeros(len(digests), bool)
        for segment in self._segments:
            missing = np.flatnonzero(~found)
            found[missing] = segment.has_each(digests[missing])
        if self._dropped:
            found &= np.fromiter((row.tobytes() not in self._dropped for row in digests), bool, len(digests))
        if self._where:
            missing = np.flatnonzero(~found)
            found[missing] = np.fromiter((digests[row].tobytes() in self._where for row in missing), bool, len(missing))
        for other in self._elsewhere:
            missing = np.flatnonzero(~found)
            found[missing] = other.has_each(digests[missing])
        return found

    def _find(self, digest: bytes) -> tuple[Path, int, int, int] | None:
        if (found := self._where.get(digest)) is not None or digest in self._dropped:
            return found
        return next((found for segment in self._segments if (found := segment.find(digest)) is not None), None)

    def refresh(self) -> None:
        """Look for what was written since, by any process. What can't be read counts as missing."""
        for index in sorted(self.folder.glob("*.index"), key=_time_of):  # what was made again comes later
            try:
                self._read_index(index)
            except OSError:
                continue
        for other in self._elsewhere:
            other.refresh()

    def _read_index(self, index: Path) -> None:
        seen = self._seen.get(index, 0)
        path = index.with_suffix(".taps")
        if index.stat().st_size - seen < RECORD.size or not path.exists():
            return
        written = index.stat().st_size - seen
        whole = written - written % RECORD.size  # a record cut short by a kill is left out
        if whole >= MANY * RECORD.size:
            token = self.key.bytes_a_token() * len(self.key.layers)
            segment = Segment(index, seen, seen + whole, size=path.stat().st_size, bytes_a_token=token)
            self._segments.insert(0, segment)
            self._dropped = {digest for digest in self._dropped if segment.find(digest) is None}
            self._seen[index] = seen + whole
            return
        with index.open("rb") as file:
            file.seek(seen)
            raw = file.read(whole)
        size = path.stat().st_size  # asked last: the data of a record is there before the record
        for start in range(0, whole, RECORD.size):
            digest, offset, tokens, checksum = RECORD.unpack_from(raw, start)
            if offset + tokens * self.key.bytes_a_token() * len(self.key.layers) <= size:
                self._where[digest] = (path, offset, tokens, checksum)
        self._seen[index] = seen + whole

    def read(self, digest: bytes, states: int) -> list[Tensor] | None:
        """Return `states` tensors (L, D) in the storage's floating dtype, or None when they are missing or damaged."""
        found = self._find(digest)
        if found is None:
            return None
        into = [torch.empty(found[2], self.key.d_model, dtype=self.floating) for _ in range(states)]
        return into if self.read_into(digest, into) else None

    def read_into(self, digest: bytes, into: Sequence[Tensor], of_target: bool = False) -> bool:
        """Fill contiguous tensors (L, D) on the CPU, in the storage's floating dtype; false when a payload is missing or damaged.

        `of_target`: or of a source; where caches of more states serve this one, a target's may have one more.

        Floating storage is read straight into place, and what has arrived there is what the checksum is taken of.
        """
        found = self._find(digest)
        if found is None:
            return any(digest in other and other.read_into(digest, into, of_target) for other in self._elsewhere)
        path, offset, tokens, checksum = found
        states, width = len(into), self.key.d_model
        packed = torch.empty(states * tokens * self.key.bytes_a_token() if self.key.dtype == "int8" else 0, dtype=torch.uint8)
        places = [packed] if self.key.dtype == "int8" else [state.view(torch.uint8) for state in into]
        if tokens != len(into[0]) or not self._fill(path, offset, [place.numpy().reshape(-1).data for place in places], checksum):
            self._drop(digest, path, offset)
            return False
        if self.key.dtype == "int8":
            values = packed[: states * tokens * width].view(torch.int8).view(states, tokens, width)
            scales = packed[states * tokens * width :].view(torch.float32).view(states, tokens, 1)
            for state, value, scale in zip(into, values, scales, strict=True):
                state.copy_(value.float() * scale)
        return True

    def _fill(self, path: Path, offset: int, places: list[memoryview], checksum: int) -> bool:
        """Read one payload into several places. Read and not mapped: a file cut short behind our back is detected, without a SIGBUS."""
        try:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            count = _read_all(self._files[path], places, offset)
        except OSError:
            return False
        found = 0
        for place in places:
            found = zlib.crc32(place, found)
        return count == sum(place.nbytes for place in places) and found == checksum

    def write(self, digest: bytes, states: list[Tensor]) -> None:
        """Append one row's states, each (L, D)."""
        if digest in self:
            return
        payload = self._payload(states)
        try:
            if self._data is None:
                # Unbuffered: data is with the system before its index record is, and nothing is left to write when the disk is full.
                self._data = self._path.open("ab", buffering=0)
                self._index = self._path.with_suffix(".index").open("ab", buffering=0)
            assert self._index is not None
            offset = self._data.tell()
            checksum = zlib.crc32(payload)
            _write_all(self._data, payload)
            _write_all(self._index, RECORD.pack(digest, offset, states[0].shape[0], checksum))
        except OSError as error:
            raise BackboneError(
                f"could not write taps to {self.folder}: {error.strerror or error}; free space, choose another cache.folder, "
                "or write cache.dtype=int8"
            ) from error
        self._where[digest] = (self._path, offset, states[0].shape[0], checksum)

    def flush(self) -> None:
        """Force what was written to the disk."""
        for file in (self._data, self._index):
            if file is not None:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        for file in (self._data, self._index):
            if file is not None:
                file.close()
        self._data = self._index = None
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        for other in self._elsewhere:
            other.close()

    __del__ = close

    def refuse_if_too_large(self, source_tokens: int, target_tokens: int) -> None:
        """Stop before the first payload when the disk can't take so many tokens.

        Raises:
            BackboneError: says what is needed and what is free.
        """
        needed, free = self.key.bytes_of(source_tokens, target_tokens), shutil.disk_usage(self.folder).free
        if needed > free:
            raise BackboneError(
                f"taps need {needed / 1e9:.2f} GB in {self.folder}, where {free / 1e9:.2f} GB are free: free space, choose another "
                "cache.folder, write cache.dtype=int8, or cache.enabled=false"
            )

    def _payload(self, states: list[Tensor]) -> memoryview:
        """Return one row's states as they are stored; good until the next call, which uses the same memory."""
        if self.key.dtype != "int8":
            dtype = STORAGE[self.key.dtype]
            stored_KLD = self._scratch_of(len(states) * states[0].numel() * dtype.itemsize).view(dtype).view(len(states), *states[0].shape)
            for place, state in zip(stored_KLD, states, strict=True):
                place.copy_(state)
            return _bytes_of(stored_KLD)
        values = torch.stack([state.detach().to("cpu") for state in states]).float()
        scales = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        packed = (values / scales).round().clamp(-127, 127).to(torch.int8)
        return memoryview(bytes(_bytes_of(packed)) + bytes(_bytes_of(scales)))

    def _scratch_of(self, size: int) -> Tensor:
        """Return `size` bytes of memory that is there already: fresh pages would cost more than what is done with them."""
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return self._scratch[:size]

    def _drop(self, digest: bytes, path: Path, offset: int) -> None:
        """Forget a payload that can't be used, and remember where it was."""
        self._damaged.append(f"{path} at byte {offset}")
        self._where.pop(digest, None)
        self._dropped.add(digest)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's own memory on the CPU."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _read_all(descriptor: int, places: Sequence[memoryview], offset: int) -> int:
    """Fill places, each of one dimension, one after another; return how many bytes there were. One call reads 2 GiB at most."""
    left, count = list(places), 0
    while left and (some := os.preadv(descriptor, left, offset + count)):
        count += some
        while left and some >= len(left[0]):
            some -= len(left.pop(0))
        if some:
            left[0] = left[0][some:]
    return count


def _write_all(file: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):  # a disk that fills up takes a part first
        view = view[file.write(view) :]


def damaged_payloads(folder: Path) -> Iterator[str]:
    """Yield the place of every payload of one cache whose checksum is wrong, or which is not there.

    Raises:
        BackboneError: `folder` is no tap cache of ours.
    """
    key = read_key(folder)
    token, layers, finals = key.bytes_a_token(), len(key.layers), int(key.decoder_final)
    for index in sorted(folder.glob("*.index")):
        path, raw = index.with_suffix(".taps"), index.read_bytes()
        data = np.memmap(path, dtype=np.uint8, mode="r") if path.exists() and path.stat().st_size else np.zeros(0, np.uint8)
        for start in range(0, len(raw) - RECORD.size + 1, RECORD.size):
            _, offset, tokens, checksum = RECORD.unpack_from(raw, start)
            # A record does not say whether it is of a source or of a target, which may have one state more.
            sizes = {states * tokens * token for states in (layers, layers + finals)}
            if all(zlib.crc32(data[offset : offset + size].tobytes()) != checksum for size in sizes):
                yield f"{path} at byte {offset}"


def _time_of(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0

"""Fingerprints of checkpoints that this machine has read before, so that a start does not hash gigabytes again (T5-11B: 45 GB in float32).

A fingerprint is kept under what the system says of the files: device, inode, size, times of the last write and the last change of any
attribute, to the nanosecond. Replaced, rewritten and touched files are hashed anew. So are files that were written less than two
seconds before: two writes within one tick of the system's clock look alike (git's "racy" files).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from lst_scale.system.assets import cache_folder

LEAST_BYTES = 1 << 28  # less is hashed in a moment
SETTLED = 2.0  # seconds


def remembered(files: Iterable[Path], described: str, make: Callable[[], str]) -> str:
    """Return the fingerprint of these files, made when this machine does not know it. A cache that can't be written costs time alone.

    Args:
        described: what a fingerprint depends on besides the files.
    """
    states = [_state(file) for file in sorted(files)]
    if sum(size for _, _, size, *_ in states) < LEAST_BYTES:
        return make()
    path = cache_folder("fingerprints") / hashlib.sha256(json.dumps([described, states]).encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        known = path.read_text()
        if re.fullmatch("[0-9a-f]{64}", known):
            return known
    asked = time.time()
    fingerprint = make()
    if all(max(written, changed) < (asked - SETTLED) * 1e9 for *_, written, changed in states):
        _keep(path, fingerprint)
    return fingerprint


def _state(file: Path) -> tuple[int, int, int, int, int]:
    """Return what tells one state of a file from another. Opened first: network file systems ask their server then."""
    with file.open("rb") as stream:
        found = os.fstat(stream.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _keep(path: Path, fingerprint: str) -> None:
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(fingerprint)
        os.replace(partial, path)

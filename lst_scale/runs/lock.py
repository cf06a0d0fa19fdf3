"""One process at a time works in a run's folder: a lock that the system lets go of when its holder ends, however it ends.

The file stays when the lock is gone: removing it would let two processes hold locks on two files of one name. It is opened without
following a link and without emptying it, since others may have put anything there. Imports no torch.

On NFS the server keeps the lock, and lets go of one whose machine is gone only when its lease ends (90 s by default): hence the longer
patience with another machine. On a file system without locks everybody gets in, as before there were any.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lst_scale.errors import ArgumentError
from lst_scale.system.durable import writing

LOCK = ".lock"
PATIENCE, PATIENCE_ELSEWHERE = 2.0, 100.0  # seconds; a killed holder is a moment in ending
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, made first where there is none. Rank 0 only.

    Raises:
        ArgumentError: another process works in it; says which.
        StorageError: the folder can't be made or written to.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / LOCK):
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    try:
        _wait_for(descriptor, folder)
        _sign(descriptor)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, folder: Path) -> None:
    start, told = time.monotonic(), False
    while not _try(descriptor):
        holder = _holder(descriptor)
        host = holder.get("host", socket.gethostname())
        elsewhere = host != socket.gethostname()
        if time.monotonic() - start > (PATIENCE_ELSEWHERE if elsewhere else PATIENCE):
            who = f"process {holder['pid']} on {host}" if "pid" in holder else "another process"
            raise ArgumentError(f"{folder} is in use by {who}: wait for its end, stop it, or change name=")
        if elsewhere and not told:
            print(f"{folder} is in use on {host}: waiting, in case that machine is gone", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.1)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _BUSY  # otherwise: no locks here
    return True


def _sign(descriptor: int) -> None:
    """Write who holds the lock, unless the file is none of ours."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or (found.st_size and not _holder(descriptor)):
        return
    record = json.dumps({"lst_scale": "lock", "host": socket.gethostname(), "pid": os.getpid()}) + "\n"
    with contextlib.suppress(OSError):  # a full disk does not hinder the lock
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, record.encode(), 0)


def _holder(descriptor: int) -> dict[str, Any]:
    """Return what the holder wrote; nothing when it wrote nothing, or something else stands there."""
    try:
        record = json.loads(os.pread(descriptor, 1000, 0))
        ours = record["lst_scale"] == "lock" and isinstance(record["pid"], int) and str(record["host"]).isprintable()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return record if ours else {}

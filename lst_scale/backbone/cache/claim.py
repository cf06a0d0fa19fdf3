"""Of several runs that would write down the same rows, one does; the others read what it has written so far, and run the rest.

A claim is a lock on a file beside the taps. The system lets go of it when its process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from lst_scale.backbone.cache.segment import Digests, sorted_digests
from lst_scale.errors import reason_of

ENDING = ".claim"


class Claim:
    """The right to write down certain rows; `name` says which. `refused` says why nobody can have it here, where that is so."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name}{ENDING}"
        self._descriptor: int | None = None
        self.refused: str | None = None

    def take(self) -> bool:
        """Return whether this process has the claim, taking it if it is free. None is given where nothing can be written."""
        if self._descriptor is not None:
            return True
        self.refused = None
        if not os.access(self._path.parent, os.W_OK | os.X_OK, effective_ids=True):
            self.refused = f"{self._path.parent} is read-only"
            return False
        try:
            descriptor = _open(self._path)
        except OSError as error:
            self.refused = f"{self._path}: {'is a symbolic link' if self._path.is_symlink() else reason_of(error)}"
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:
            pass  # a file system without locks: everybody writes, and what is there twice is read once
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    __del__ = release


def _open(path: Path) -> int:
    """Open a claim in a folder that others may write to: its name can be guessed, so no link is followed and nothing is emptied."""
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return os.open(path, flags | os.O_RDONLY)  # somebody else's: a lock asks for no more


def name_of(digests: Digests) -> str:
    """Return the same short name for the same rows, in whatever order."""
    return hashlib.blake2b(sorted_digests(digests).tobytes(), digest_size=10).hexdigest()


def is_claimed(folder: Path) -> bool:
    """Whether a process is writing in `folder` now."""
    for path in folder.glob(f"*{ENDING}"):
        claim = Claim(folder, path.name.removesuffix(ENDING))
        free = claim.take()
        claim.release()
        if not free and claim.refused is None:
            return True
    return False

"""Of several runs that would write down the same rows, one does; the others read what it has written so far, and run the rest.

A claim is a lock on a file beside the taps. The system lets go of it when its process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ENDING = ".claim"


class Claim:
    """The right to write down certain rows; `name` says which."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name}{ENDING}"
        self._file: Any = None

    def take(self) -> bool:
        """Return whether this process has the claim, taking it if it is free."""
        if self._file is None:
            file = self._path.open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return False
            except OSError:
                pass  # a file system without locks: everybody writes, and what is there twice is read once
            self._file = file
        return True

    def let_go(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def name_of(digests: Iterable[bytes]) -> str:
    """Return the same short name for the same rows, in whatever order."""
    return hashlib.blake2b(b"".join(sorted(digests)), digest_size=10).hexdigest()


def is_claimed(folder: Path) -> bool:
    """Whether a process is writing in `folder` now."""
    for path in folder.glob(f"*{ENDING}"):
        claim = Claim(folder, path.name.removesuffix(ENDING))
        if not claim.take():
            return True
        claim.let_go()
    return False

"""What is written appears at once and whole: filled under a temporary name, flushed, renamed, read back.

A disk that refuses is one line, and what stood there before stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lst_scale.errors import StorageError, reason_of


@contextlib.contextmanager
def writing(path: Path, setting: str = "output_dir") -> Iterator[None]:
    """Turn what a disk refuses inside (it is full, read-only, gone, a folder is where a file should be) into one line that names `path`.

    Args:
        setting: what to change for another place.

    Raises:
        StorageError: the disk refused.
    """
    try:
        yield
    except OSError as error:
        raise _refused(path, error, setting) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # whose class for everything hides what the system said
            raise
        raise _refused(path, error, setting) from error


def _refused(path: Path, error: Exception, setting: str) -> StorageError:
    system = re.search(r"\(os error (\d+)\)", str(error))
    reason = os.strerror(int(system[1])) if system else reason_of(error)
    return StorageError(f"could not write {path}: {reason}; free space, mend that path, or choose another {setting}")


def write_directory(path: Path, fill: Callable[[Path], None], check: Callable[[Path], Any], setting: str = "output_dir") -> None:
    """Make the directory `path` with what `fill` writes into the folder it is given; `check` reads the result back.

    Raises:
        StorageError: the disk refused; what stood at `path` before is still there.
    """
    partial = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    with writing(path, setting):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            fill(partial)
            for file in sorted(partial.rglob("*")):
                flush(file)
            flush(partial)
            shutil.rmtree(replaced, ignore_errors=True)
            if path.exists():
                os.replace(path, replaced)  # a kill here leaves the old contents under this name
            os.replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        flush(path.parent)
    check(path)
    _keep_what_others_added(replaced, path)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def alone(path: Path, setting: str = "output_dir") -> Iterator[None]:
    """Wait until no other process makes `path`, and keep others waiting: it may be there by then. The system lets go when a process ends.

    Raises:
        StorageError: nothing can be written beside it.
    """
    with writing(path, setting):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: each writes, and the last one's stays
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _keep_what_others_added(replaced: Path, path: Path) -> None:
    """Move into the new directory what stood in the old one and has no successor: somebody put it there."""
    with contextlib.suppress(OSError):
        for entry in replaced.iterdir() if replaced.is_dir() else ():
            if not os.path.lexists(path / entry.name):
                os.replace(entry, path / entry.name)


def write_file(path: Path, text: str, setting: str = "output_dir") -> None:
    """Replace the file `path` by `text` in one move; of several writers at once the last one's stays.

    Raises:
        StorageError: the disk refused; what stood at `path` before is still there.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with writing(path, setting):
        try:
            with partial.open("x", encoding="utf-8") as file:
                file.write(text)
            flush(partial)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        flush(path.parent)


def append_line(path: Path, line: str, *, flushed: bool = False, setting: str = "output_dir") -> None:
    """Add a line to a file; `flushed`: it is on the disk before this returns.

    Raises:
        StorageError: the disk refused.
    """
    with writing(path, setting), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(line + "\n")
        if flushed:
            file.flush()
            os.fsync(file.fileno())


def sha256_of(file: Path) -> str:
    """Return a file's digest, for a `check` that compares what was written with what is there."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def last_touched(file: Path) -> list[int]:
    """Return what changes when a file is written to, or replaced, or any attribute of it is changed."""
    state = file.stat()
    return [state.st_dev, state.st_ino, state.st_mtime_ns, state.st_ctime_ns]


def flush(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Directories that appear at once and whole: filled under a temporary name, flushed, renamed, read back."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lst_scale.errors import CheckpointError


def write_directory(path: Path, fill: Callable[[Path], None], check: Callable[[Path], Any]) -> None:
    """Make the directory `path` with what `fill` writes into the folder it is given; `check` reads the result back.

    Raises:
        CheckpointError: the disk refused; what stood at `path` before is still there.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        fill(partial)
        for file in sorted(partial.rglob("*")):
            flush(file)
        flush(partial)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"could not write {path}: {error.strerror or error}; free space or choose another output_dir") from error
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        os.replace(path, replaced)  # a kill here leaves the old contents under this name
    os.replace(partial, path)
    flush(path.parent)
    check(path)
    shutil.rmtree(replaced, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Replace the file `path` by `text` in one move; of several writers at once the last one's stays."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.write_text(text)
    flush(partial)
    os.replace(partial, path)
    flush(path.parent)


def sha256_of(file: Path) -> str:
    """Return a file's digest, for a `check` that compares what was written with what is there."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Force a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

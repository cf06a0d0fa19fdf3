"""Tables of rows on disk: written once a machine, whole or not at all, and mapped into memory by every process that reads them.

    ~/.cache/lst_scale/rows/KEY/rows.arrow    record batches of CHUNK rows; KEY is the digest of all that the rows depend on
    ~/.cache/lst_scale/rows/KEY/facts.json    what is known of all rows together, and the size, the CRC-32 and the times of rows.arrow

A table that is not as it was written counts as missing, and is written again. A file that nobody has touched since, by what the system says
of it, is not read through to see that: a start does not grow with its rows.

One process writes, under a lock that the system lets go of when it ends, however it ends; others wait for it. Imports pyarrow where it
is used: few rows need no table.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lst_scale.data.columns import Chunk, Ids, Texts
from lst_scale.errors import StorageError
from lst_scale.system.assets import cache_folder
from lst_scale.system.durable import alone, last_touched, write_directory

FORMAT = 4
ROWS, FACTS = "rows.arrow", "facts.json"
SETTING = "XDG_CACHE_HOME"  # what to change for another place
KINDS = {"texts": ("uint8", Texts), "ids": ("int32", Ids)}

Facts = dict[str, Any]
Write = Callable[[Mapping[str, Chunk]], None]


@dataclass(frozen=True)
class Table:
    """One table, mapped."""

    folder: Path
    kinds: Mapping[str, str]  # texts or ids, by the column's name

    @property
    def key(self) -> str:
        return self.folder.name

    @cached_property
    def facts(self) -> Facts:
        found: Facts = json.loads((self.folder / FACTS).read_text(encoding="utf-8"))["facts"]
        return found

    def texts(self, name: str) -> Texts:
        return Texts(self._chunks[name], self._let_go)

    def ids(self, name: str) -> Ids:
        return Ids(self._chunks[name], self._let_go)

    def _let_go(self) -> None:
        self._mapped.madvise(mmap.MADV_DONTNEED)

    @cached_property
    def _mapped(self) -> mmap.mmap:
        with (self.folder / ROWS).open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def _chunks(self) -> dict[str, list[Chunk]]:
        import pyarrow

        reader = pyarrow.ipc.open_file(pyarrow.py_buffer(self._mapped))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        return {name: [_chunk(batch.column(name), KINDS[kind][0]) for batch in batches] for name, kind in self.kinds.items()}


def digest_of(what: Mapping[str, Any]) -> str:
    """Return a table's key, given all that its rows depend on."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **what}, sort_keys=True).encode()).hexdigest()[:32]


def known_table(key: str, kinds: Mapping[str, str]) -> Table | None:
    """Return a table that was written before; None: there is none."""
    folder = cache_folder("rows") / key
    return Table(folder, kinds) if _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    """Whether a table is there and as it was written."""
    try:
        known = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if not isinstance(known["facts"], dict) or (folder / ROWS).stat().st_size != known["bytes"]:
            return False
        return bool(known["touched"] == last_touched(folder / ROWS) or known["crc32"] == _checksum_of(folder / ROWS))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _checksum_of(path: Path) -> int:
    checksum = 0
    with path.open("rb", buffering=0) as file:  # read, not mapped: it would count as memory of this process
        while some := file.read(1 << 22):
            checksum = zlib.crc32(some, checksum)
    return checksum


def tables(root: Path) -> list[Path]:
    """Return the folders below `root` that are tables of ours, whole or not: a link, or a folder without our facts, is none."""
    found = []
    for facts in sorted(root.glob(f"*/{FACTS}")):
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            if not facts.parent.is_symlink() and {"facts", "bytes", "crc32"} <= set(json.loads(facts.read_text(encoding="utf-8"))):
                found.append(facts.parent)
    return found


def remove_table(folder: Path) -> None:
    """Remove a table's own files; what else is there stays. Who has it mapped reads on."""
    for file in (folder / FACTS, folder / ROWS, folder.with_name(f".{folder.name}.lock")):
        file.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def stored_table(key: str, kinds: Mapping[str, str], fill: Callable[[Write], Facts], *, likely_bytes: int) -> Table:
    """Return a table, written first by `fill` where nobody did. `fill` is given a function that takes a chunk of each column.

    Raises:
        StorageError: the disk is full, or nothing can be written there; nothing is left behind.
        LstScaleError: what `fill` raises.
    """
    folder = cache_folder("rows") / key
    if (found := known_table(key, kinds)) is not None:
        return found
    with alone(folder, SETTING):
        if (found := known_table(key, kinds)) is not None:  # another process wrote it meanwhile
            return found
        _refuse_full_disk(folder.parent, likely_bytes)

        def write(partial: Path) -> None:
            facts = _write_rows(partial / ROWS, kinds, fill)
            rows = partial / ROWS
            state = {"bytes": rows.stat().st_size, "crc32": _checksum_of(rows), "touched": last_touched(rows)}
            (partial / FACTS).write_text(json.dumps({"facts": facts, **state}), encoding="utf-8")

        write_directory(folder, write, lambda whole: Table(whole, kinds).facts, SETTING)
    return Table(folder, kinds)


def _write_rows(path: Path, kinds: Mapping[str, str], fill: Callable[[Write], Facts]) -> Facts:
    import pyarrow

    schema = pyarrow.schema([(name, pyarrow.large_list(getattr(pyarrow, KINDS[kind][0])())) for name, kind in kinds.items()])
    with path.open("wb") as file, pyarrow.ipc.new_file(file, schema) as writer:

        def write(chunks: Mapping[str, Chunk]) -> None:
            arrays = [pyarrow.LargeListArray.from_arrays(chunks[name].ends, chunks[name].values) for name in kinds]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))

        return fill(write)


def _chunk(column: Any, dtype: str) -> Chunk:
    """Return a column of a record batch as arrays on the mapped file itself."""
    _, ends, _, values = column.buffers()
    return Chunk(np.frombuffer(ends, np.int64)[: len(column) + 1], np.frombuffer(values, dtype) if values else np.zeros(0, dtype))


def _refuse_full_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            f"the rows' table needs about {needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free: free space, "
            f"or choose another {SETTING}"
        )

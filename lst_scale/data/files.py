"""Read records out of one's own files (.csv, .jsonl, .parquet) or the hub. No pickle, no remote code.

Whatever a file holds, reading it ends in records or in one line that names the file and where in it: see `errors.fence`.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import itertools
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lst_scale.errors import DataError, did_you_mean, fence, printable
from lst_scale.system.assets import resolve

HUB = "hub:"
Record = Mapping[str, Any]
Records = Sequence[Record]


class _Zstandard(io.RawIOBase):
    """What a file holds that zstd compressed, as Arrow reads it; it can be gone back to its start."""

    def __init__(self, path: Path) -> None:
        self._path, self._place = path, 0
        self._stream = self._open()

    def _open(self) -> Any:
        import pyarrow

        return pyarrow.input_stream(str(self._path), compression="zstd")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = 0) -> int:
        if (offset, whence) != (0, 0):
            raise io.UnsupportedOperation("seek")
        self._stream.close()
        self._stream, self._place = self._open(), 0
        return 0

    def readinto(self, buffer: Any) -> int:
        some = self._stream.read(len(buffer))
        buffer[: len(some)] = some
        self._place += len(some)
        return len(some)

    def close(self) -> None:
        self._stream.close()
        super().close()


OPENERS: Mapping[str, Callable[[Path, str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path, mode: io.BufferedReader(_Zstandard(path), 1 << 16),
}
UTF_16_AND_32 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
OTHER_DELIMITERS = ";\t|"  # than the comma: what Excel writes where the comma is the decimal point, and what databases do


@dataclass(frozen=True)
class Found:
    """One record and where it is."""

    record: Record
    path: str
    number: int  # of the row in its file, from 1


def load_records(name: str, split: str, at_most: int | None = None, *, where: str | None = None) -> Records:
    """Return the records of "embedded:...", local files, or "hub:owner/name[:config][:split]"; the first `at_most` of them.

    Args:
        where: what a message calls the place of `name`; None: task.SPLIT.

    Raises:
        DataError: it is not there, not readable, or empty.
    """
    return [found.record for found in itertools.islice(read_records(name, split, where=where), at_most)]


def read_records(name: str, split: str, *, where: str | None = None) -> Iterator[Found]:
    """Yield records one by one, as `load_records` finds them.

    Raises:
        DataError: it is not there, not readable, or empty.
    """
    if name.startswith(HUB):
        for number, record in enumerate(hub_split(name, split), start=1):
            yield Found(record, name, number)
        return
    for path in paths_of(name, split, where=where):
        called = str(path) if _is_pattern(name) else name
        what = f"{where or f'task.{split}'}: {printable(called)}"
        number = 0
        with fence(DataError, what):
            for number, record in enumerate(READERS[ending(path)](path), start=1):
                yield Found(record, called, number)
        if not number:
            raise DataError(f"{what} has no rows")


def hub_split(name: str, split: str) -> Any:
    """Return the data set that "hub:..." names."""
    dataset, config, wanted = _hub_parts(name, split)
    return load_hub_splits(dataset, config, (wanted,))[wanted]


def paths_of(name: str, split: str, *, where: str | None = None) -> list[Path]:
    """Return the files that a name stands for: one, or in order those that a pattern such as data/train-*.parquet matches.

    Raises:
        DataError: one is not there, or is no file of rows.
    """
    what = f"{where or f'task.{split}'}: {printable(name)}"
    with fence(DataError, what):
        if not _is_pattern(name):
            return [_path_of(name, what)]
        found = sorted(glob.glob(str(Path(name).expanduser()), recursive=True))
        if not found:
            raise DataError(f"{what} matches no file; write a pattern of files that are there, relative to {Path.cwd()}")
        return [_path_of(path, f"{where or f'task.{split}'}: {printable(path)}") for path in found]


def states_of(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return what changes when files do: where they are, their sizes and when they were written."""
    with fence(DataError, str(paths[0])):
        states = [(path.resolve(), path.stat()) for path in paths]
    return [(str(path), state.st_size, state.st_mtime_ns) for path, state in states]


def _is_pattern(name: str) -> bool:
    return glob.has_magic(name) and not Path(resolve(name)).exists()


def ending(path: Path) -> str:
    """Return the ending that says how a file's rows are written, without that of its compression."""
    name = path.name.lower()
    for compression in OPENERS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def _open(path: Path) -> IO[bytes]:
    """Open a file to read what it holds when it is not compressed."""
    opener = OPENERS.get(path.suffix.lower())
    file: IO[bytes] = path.open("rb") if opener is None else opener(path, "rb")
    return file


def load_hub_splits(dataset: str, config: str | None, splits: Sequence[str]) -> dict[str, Any]:
    """Return splits of a data set on the hub, mapped from the local cache, which is filled first where there is a network."""
    from datasets import load_dataset

    try:
        return {split: load_dataset(dataset, config, split=split) for split in splits}
    except Exception as error:  # datasets raises a dozen kinds; all mean the same to a user
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"data set {dataset}{f' ({config})' if config else ''} could not be loaded ({type(error).__name__}: {reason}): download it "
            "where there is a network and copy the cache, or describe local files under task:"
        ) from error


def missing_field(path: str, number: int, field: str, record: Mapping[str, Any]) -> str:
    """Return the message for a field that a row lacks."""
    return f"{path}: row {number} has no field {field!r}.{did_you_mean(field, map(str, record))}"


def _path_of(name: str, what: str) -> Path:
    path = Path(resolve(name))
    if ending(path) not in READERS or (path.suffix.lower() in OPENERS and ending(path) == ".parquet"):
        raise DataError(f"{what} must end in {', '.join(READERS)}; convert it to one of them")
    if path.is_dir():
        raise DataError(f"{what} is a folder; write the path of a file in it")
    if not path.exists():
        raise DataError(f"{what} is not there; write the path of a file, relative to {Path.cwd()}")
    if not path.is_file():  # a FIFO would be waited for, a device read without end
        raise DataError(f"{what} is no ordinary file; write its rows into one")
    return path


def _hub_parts(name: str, split: str) -> tuple[str, str | None, str]:
    parts = name.removeprefix(HUB).split(":")
    if parts[0].startswith((".", "/", "~")) or Path(parts[0]).suffix in READERS:
        raise DataError(f"task.{split}: {name!r} names a file: write its path without {HUB}")
    if len(parts) > 3 or not parts[0]:
        raise DataError(f"task.{split}: {name!r} should be hub:owner/name, hub:owner/name:config or hub:owner/name:config:split")
    return parts[0], (parts[1] or None) if len(parts) > 1 else None, parts[2] if len(parts) > 2 else split


def _read_csv(path: Path) -> Iterator[Record]:
    """Yield the rows of a CSV file as spreadsheets write it: with or without a byte order mark, divided by commas, semicolons or tabs."""
    _refuse_utf_16(path, "in a spreadsheet, save it as 'CSV UTF-8'")
    previous = csv.field_size_limit(sys.maxsize)  # Python's own limit is 131,072 characters a cell
    try:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as file:
            yield from _csv_rows(file, path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not a UTF-8 CSV file (byte {error.object[error.start]:#x} can't be read): save it as 'CSV UTF-8'"
        ) from error
    finally:
        csv.field_size_limit(previous)


def _csv_rows(file: Any, path: Path) -> Iterator[Record]:
    delimiter = _delimiter(file)
    reader = csv.reader(file, strict=True, delimiter=delimiter)
    number = 0
    try:
        header = next((names for names in reader if names), [])
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise DataError(f"{path}: the header names {twice[0]!r} twice; rename one of the two columns")
        for values in reader:
            if not values:
                continue  # an empty line
            number += 1
            if len(values) > len(header):
                raise DataError(
                    f"{path}: row {number} has more values than the header has names; quote values that hold {_spoken(delimiter)}"
                )
            yield dict(itertools.zip_longest(header, values))
    except csv.Error as error:
        raise DataError(f"{path} is not a UTF-8 CSV file: {error} in line {reader.line_num}; quote values that hold quotes") from error


def _delimiter(file: Any) -> str:
    """Return what divides the header's names, and leave the file at the header. A first line such as "sep=;" is Excel's own."""
    first = file.readline()
    if declared := re.fullmatch(r"sep=(.)\r?\n?", first, re.IGNORECASE):
        return declared[1]
    while first and not first.strip():
        first = file.readline()
    file.seek(0)
    unquoted = re.sub(r'"[^"]*"', "", first)
    if "," in unquoted or not any(each in unquoted for each in OTHER_DELIMITERS):
        return ","
    return max(OTHER_DELIMITERS, key=unquoted.count)


def _spoken(delimiter: str) -> str:
    return {",": "commas", ";": "semicolons", "\t": "tabs"}.get(delimiter, delimiter)


def _read_jsonl(path: Path) -> Iterator[Record]:
    _refuse_utf_16(path, "save it as UTF-8")
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_object(line, path, number)


def _json_object(line: bytes, path: Path, number: int) -> Record:
    with fence(DataError, f"{path}: line {number} is not valid JSON"):
        record = json.loads(line.strip())
    if not isinstance(record, dict):
        raise DataError(f'{path}: line {number} is not an object; write {{"field": value, ...}}')
    return record


def _read_parquet(path: Path) -> Iterator[Record]:
    from pyarrow import parquet

    with fence(DataError, f"{path} is not a whole parquet file"), parquet.ParquetFile(path) as file:
        twice = sorted({name for name in file.schema_arrow.names if file.schema_arrow.names.count(name) > 1})
        if twice:
            raise DataError(f"{path} has two columns {twice[0]!r}; rename one of the two")
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _refuse_utf_16(path: Path, remedy: str) -> None:
    """UTF-16 is what Windows calls Unicode; read as UTF-8 it makes no sense."""
    with _open(path) as file:
        start = file.read(4)
    if start.startswith(UTF_16_AND_32) or (len(start) == 4 and b"\0" in start[:2] and start[:2] != b"\0\0"):
        raise DataError(f"{path} is UTF-16 text: {remedy}")


READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}

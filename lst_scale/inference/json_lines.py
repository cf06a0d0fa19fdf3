"""Records of a user's files as lines of valid JSON, in a file that appears whole or not at all.

JSON has no dates, decimals, bytes or NaN: dates, times and decimals become text, bytes base64, NaN null, infinity the text "Infinity".
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import decimal
import fcntl
import itertools
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lst_scale.errors import ArgumentError, DataError, LstScaleError, fence, printable, reason_of
from lst_scale.system.durable import flush

AS_TEXT = (decimal.Decimal, datetime.timedelta, uuid.UUID)
AS_ISO = (datetime.date, datetime.time)


def as_json(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a record in which every cell is what JSON has.

    Raises:
        DataError: a cell can't be written; names `where`, which says the row, and the field.
    """
    plain = {}
    for field, value in record.items():
        with fence(DataError, f"{where}: field {printable(repr(field))} can't be written as JSON"):
            plain[field] = _plain(value)
            line({field: plain[field]}).encode()
    return plain


def line(record: Mapping[str, Any]) -> str:
    """Return one line of JSON with its end."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value if math.isfinite(value) else f"{'-' if value < 0 else ''}Infinity"
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, AS_ISO):
        return value.isoformat()
    if isinstance(value, AS_TEXT):
        return str(value)
    raise TypeError(f"it holds a {type(value).__name__}")


class LinesFile:
    """Lines that are written as they come, under a temporary name beside the file that they become at the end."""

    def __init__(self, stream: TextIO, partial: Path, path: Path) -> None:
        self._stream, self._partial, self._path = stream, partial, path
        self._count = 0

    def earlier(self) -> Iterator[dict[str, Any]]:
        """Yield the records of whole lines that an earlier process left under the temporary name."""
        with self._fence(), self._partial.open("rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    return  # cut off by a kill
                try:
                    record = json.loads(raw)
                except ValueError:
                    record = None
                if not isinstance(record, dict):
                    raise ArgumentError(f"{self._partial} is damaged at line {self._count + 1}: leave --resume out to begin again")
                yield record

    def keep(self, count: int) -> None:
        """Leave the first `count` of those lines, to go on after them."""
        with self._fence(), self._partial.open("rb") as file:
            self._stream.truncate(sum(len(raw) for raw in itertools.islice(file, count)))
        self._count = count

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records and hand them to the system, so that they outlive this process."""
        lines = [line(record) for record in records]
        with self._fence():
            self._stream.writelines(lines)
            self._stream.flush()
        self._count += len(lines)

    def finish(self) -> None:
        """Give the file its name."""
        with self._fence():
            self._stream.flush()
            os.fsync(self._stream.fileno())
            os.replace(self._partial, self._path)
            _maker_of(self._partial).unlink(missing_ok=True)
            flush(self._path.parent)

    def give_up(self) -> str:
        """Keep what was written under the temporary name, or remove an empty file; return what to say of it."""
        if self._count:
            return f"; the first {self._count:,} lines are in {self._partial}"
        if self._partial.stat().st_size == 0:  # or it is what was to be gone on with
            self._partial.unlink(missing_ok=True)
            _maker_of(self._partial).unlink(missing_ok=True)
        return ""

    @contextlib.contextmanager
    def _fence(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArgumentError(f"{self._path} can't be written: {reason_of(error)}") from error


@contextlib.contextmanager
def lines_file(path: Path, made_by: str = "", *, resume: bool = False) -> Iterator[LinesFile]:
    """Open a file of lines at once, so that a place that can't be written is known before any work; `finish` puts it in place of `path`.

    Args:
        made_by: a digest of all that lines depend on beside the inputs.
        resume: leave the lines that are there under the temporary name, for `earlier` and `keep`.

    Raises:
        ArgumentError: it is no place for a file, another process writes there, or what is to be gone on with was made otherwise.
    """
    with fence(ArgumentError, f"{path} can't be written"):
        target = path.resolve()  # a link stays one
        if target.exists() and not target.is_file():
            raise ArgumentError(f"{path} is {'a folder' if target.is_dir() else 'no plain file'}: write the name of a file")
        made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        stream = partial.open("a", encoding="utf-8")
    file = LinesFile(stream, partial, target)
    try:
        _lock(stream, path)
        with file._fence():
            if resume:
                _refuse_another_maker(partial, made_by)
            else:
                stream.truncate(0)
            _maker_of(partial).write_text(made_by, encoding="utf-8")
        try:
            yield file
        except LstScaleError as error:
            error.args = (f"{error}{file.give_up()}",)
            raise
        except BaseException:
            file.give_up()
            raise
    finally:
        with contextlib.suppress(OSError):  # what a full disk did not take is told already
            stream.close()
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # of what was made here, what stayed empty


def _maker_of(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.made-by")


def _refuse_another_maker(partial: Path, made_by: str) -> None:
    maker = _maker_of(partial)
    if partial.stat().st_size and (not maker.is_file() or maker.read_text(encoding="utf-8", errors="replace") != made_by):
        raise ArgumentError(
            f"{partial} holds answers that another run or other settings made: repeat the command that began them, "
            "or leave --resume out to begin again"
        )


def _lock(stream: TextIO, path: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ArgumentError(f"{path} is being written by another process: write another name, or wait for its end") from None
    except OSError:
        pass  # a file system without locks

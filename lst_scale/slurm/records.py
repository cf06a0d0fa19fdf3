"""Files of JSON lines in run folders, read as what they are: written by many processes, cut short by kills, perhaps by somebody else.

A line that is not what its reader needs is left out and named in `odd`; the others stand. The last line may be cut short: a kill does that.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lst_scale.errors import LstScaleError, fence, reason_of

Check = Callable[[Any], bool]
Fields = Mapping[str, Check]


def text(value: Any) -> bool:
    return isinstance(value, str)


def job_id(value: Any) -> bool:
    """Slurm's own: 12, 13_4. It is handed to squeue and sacct."""
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.+-]{1,100}", value) is not None


def number(value: Any) -> bool:
    """A number that floats hold; NaN and infinity are some."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e300)


def finite(value: Any) -> bool:
    return number(value) and math.isfinite(value) and value >= 0


def count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def mapping(value: Any) -> bool:
    return isinstance(value, dict)


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a file of JSON lines, on disk before this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, fields: Fields, odd: list[str] | None = None, *, kinds: Mapping[str, Fields] | None = None) -> list[dict[str, Any]]:
    """Return the lines that have `fields`, and those of their kind; none when there is no file. The others are named in `odd`."""
    odd = [] if odd is None else odd
    lines = _lines(path, odd)
    records = []
    for line_number, line in enumerate(lines, start=1):
        try:
            records.append(_record(line, fields, kinds or {}))
        except (ValueError, RecursionError) as error:
            if line_number < len(lines) or line.endswith(b"}"):
                odd.append(f"{path}: line {line_number} left out: {reason_of(error)}")
    return records


def read_one(path: Path, fields: Fields) -> dict[str, Any]:
    """Return the one JSON object of a file.

    Raises:
        LstScaleError: the file can't be read, or does not have `fields`; names it.
    """
    with fence(LstScaleError, str(path)):
        return _record(path.read_bytes(), fields, {})


def _lines(path: Path, odd: list[str]) -> Sequence[bytes]:
    if not os.path.lexists(path):
        return []
    try:
        with fence(LstScaleError, f"{path} left out"):
            if not path.is_file():
                raise ValueError("it is no file")
            return [line for line in path.read_bytes().splitlines() if line.strip()]
    except LstScaleError as error:
        odd.append(str(error))
        return []


def _record(line: bytes, fields: Fields, kinds: Mapping[str, Fields]) -> dict[str, Any]:
    found = json.loads(line.decode("utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    kind = found.get("kind")
    wanted = dict(fields) | dict(kinds.get(kind, {}) if isinstance(kind, str) else {})
    for name, check in wanted.items():
        if name not in found or not check(found[name]):
            raise ValueError(f"{name!r} is {'not what belongs there' if name in found else 'missing'}")
    return found

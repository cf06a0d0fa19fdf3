"""Read records out of one's own files (.csv, .jsonl, .parquet) or the hub. No pickle, no remote code."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lst_scale.assets import resolve
from lst_scale.errors import DataError, did_you_mean

HUB = "hub:"
SUFFIXES = (".csv", ".jsonl", ".parquet")
Record = Mapping[str, Any]
Records = Sequence[Record]


def load_records(name: str, split: str) -> Records:
    """Return the records of "embedded:...", a local file, or "hub:owner/name[:config][:split]".

    Raises:
        DataError: it is not there, not readable, or empty.
    """
    if name.startswith(HUB):
        dataset, config, wanted = _hub_parts(name, split)
        return load_hub_splits(dataset, config, (wanted,))[wanted]
    path = Path(resolve(name))
    if path.suffix not in SUFFIXES:
        raise DataError(f"task.{split}: {name} must end in {', '.join(SUFFIXES)}; convert it to one of them")
    if not path.is_file():
        raise DataError(f"task.{split}: {name} is not there; write the path of a file, relative to {Path.cwd()}")
    records = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[path.suffix](path)
    if not records:
        raise DataError(f"task.{split}: {name} has no rows")
    return records


def load_hub_splits(dataset: str, config: str | None, splits: Sequence[str]) -> dict[str, Records]:
    """Return splits of a data set on the hub, from the local cache when there is no network."""
    from datasets import load_dataset

    try:
        return {split: list(load_dataset(dataset, config, split=split)) for split in splits}
    except Exception as error:  # datasets raises a dozen kinds; all mean the same to a user
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"data set {dataset}{f' ({config})' if config else ''} could not be loaded ({type(error).__name__}: {reason}): download it "
            "where there is a network and copy the cache, or describe local files under task:"
        ) from error


def missing_field(path: str, number: int, field: str, record: Mapping[str, Any]) -> str:
    """Return the message for a field that a row lacks."""
    return f"{path}: row {number} has no field {field!r}.{did_you_mean(field, map(str, record))}"


def _hub_parts(name: str, split: str) -> tuple[str, str | None, str]:
    parts = name.removeprefix(HUB).split(":")
    if len(parts) > 3 or not parts[0]:
        raise DataError(f"task.{split}: {name!r} should be hub:owner/name, hub:owner/name:config or hub:owner/name:config:split")
    return parts[0], (parts[1] or None) if len(parts) > 1 else None, parts[2] if len(parts) > 2 else split


def _read_csv(path: Path) -> Records:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            records = list(csv.DictReader(file, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a UTF-8 CSV file: {error}") from error
    for number, record in enumerate(records, start=1):
        if None in record:
            raise DataError(f"{path}: row {number} has more values than the header has names; quote values that hold commas")
    return records


def _read_jsonl(path: Path) -> Records:
    records = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{path}: line {number} is not valid JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f'{path}: line {number} is not an object; write {{"field": value, ...}}')
            records.append(record)
    return records


def _read_parquet(path: Path) -> Records:
    import pyarrow
    from pyarrow import parquet

    try:
        records: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole parquet file: {error}") from error
    return records

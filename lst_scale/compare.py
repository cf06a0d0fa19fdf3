"""Finished runs as the table people know: score, trainable share, memory, time. Reads result.json files, nothing else."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lst_scale.errors import ArgumentError

STYLES = ("text", "markdown", "csv")
COLUMNS = ("run", "task", "seeds", "score", "deviation", "trainable", "trainable_percent", "peak_gb", "seconds_per_step", "train_seconds")


def compare(folders: Sequence[Path], style: str = "text") -> str:
    """Return one row for each name and task, over its seeds; `style` is text, markdown or csv.

    Raises:
        ArgumentError: no folder holds a result, or the style is unknown.
    """
    if style not in STYLES:
        raise ArgumentError(f"format {style!r} is unknown: write {', '.join(STYLES)}")
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    if not results:
        raise ArgumentError("no finished run: none of the folders holds a result.json")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["name"], result["task"]), []).append(result)
    rows = [_row(name, task, group) for (name, task), group in groups.items()]
    return {"text": _text, "markdown": _markdown, "csv": _csv}[style](rows)


def _row(name: str, task: str, group: Sequence[dict[str, Any]]) -> dict[str, str]:
    def mean(key: str) -> float:
        return statistics.mean(result[key] or 0 for result in group)

    scores = [result["scores"]["score"] for result in group]
    return {
        "run": name,
        "task": task,
        "seeds": str(len(group)),
        "score": f"{statistics.mean(scores):.2f}",
        "deviation": f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "",
        "trainable": str(group[0]["trainable_parameters"]),
        "trainable_percent": f"{group[0]['trainable_share_percent']:.3f}",
        "peak_gb": f"{max(result['peak_memory_bytes'] for result in group) / 1e9:.2f}",
        "seconds_per_step": f"{mean('seconds_per_step'):.4f}",
        "train_seconds": f"{mean('train_seconds'):.1f}",
    }


def _text(rows: Sequence[dict[str, str]]) -> str:
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in COLUMNS}
    lines = ["  ".join(column.ljust(widths[column]) for column in COLUMNS)]
    lines += ["  ".join(row[column].ljust(widths[column]) for column in COLUMNS) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _markdown(rows: Sequence[dict[str, str]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row[column] for column in COLUMNS) + " |" for row in rows])


def _csv(rows: Sequence[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")

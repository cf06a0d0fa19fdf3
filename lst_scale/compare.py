"""Finished runs as the table people know, and a plot of score against memory. Reads result.json files, nothing else.

The columns are those of peft's method comparison (score, time, peak memory, file size, trainable and total parameters), with the
deviation over seeds.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lst_scale.errors import ArgumentError
from lst_scale.extras import require
from lst_scale.folder import RESULT

COLUMNS = (
    "run",
    "method",
    "task",
    "seeds",
    "score",
    "deviation",
    "trainable_percent",
    "peak_gb",
    "seconds_per_step",
    "train_seconds",
    "saved_mb",
    "trainable",
    "total",
)


def find_results(paths: Sequence[Path]) -> list[Path]:
    """Return the folders at or below `paths` that hold a result.json.

    Raises:
        ArgumentError: there is none.
    """
    found = sorted({file.parent for path in paths for file in path.rglob(RESULT)})
    if not found:
        raise ArgumentError(f"no finished run in {', '.join(map(str, paths))}: none of the folders holds a result.json")
    return found


def compare(folders: Sequence[Path], style: str = "text") -> str:
    """Return one row for each name and task, over its seeds; `style` is text, markdown or csv.

    Raises:
        ArgumentError: the style is unknown, or there is nothing to compare.
    """
    if style not in STYLES:
        raise ArgumentError(f"format {style!r} is unknown: write {', '.join(STYLES)}")
    if not folders:
        raise ArgumentError("no finished run: none of the folders holds a result.json")
    return STYLES[style](rows(folders))


def rows(folders: Sequence[Path]) -> list[dict[str, str]]:
    """Return the table's rows, best score first within a task."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for folder in folders:
        result = json.loads((folder / RESULT).read_text())
        groups.setdefault((result["task"], result["name"]), []).append(result)
    found = [_row(name, task, group) for (task, name), group in groups.items()]
    return sorted(found, key=lambda row: (row["task"], -float(row["score"]), row["run"]))


def plot(folders: Sequence[Path], path: Path) -> None:
    """Draw every row's score against its peak memory, one panel a task, into a .png or .svg file.

    Raises:
        ArgumentError: the file's ending is another, or matplotlib is missing.
    """
    if path.suffix not in (".png", ".svg"):
        raise ArgumentError(f"--plot {path}: write a file that ends in .png or .svg")
    require("matplotlib", "plot", asked_by="--plot")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = rows(folders)
    tasks = sorted({row["task"] for row in found})
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for row in (row for row in found if row["task"] == task):
            memory, score = float(row["peak_gb"]), float(row["score"])
            axis.errorbar(memory, score, yerr=float(row["deviation"] or 0), fmt="o", capsize=3)
            axis.annotate(row["run"], (memory, score), textcoords="offset points", xytext=(6, 4), fontsize=8)
        axis.set(title=task, xlabel="peak memory of a process, GB", ylabel="score")
        axis.margins(x=0.25, y=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _row(name: str, task: str, group: Sequence[dict[str, Any]]) -> dict[str, str]:
    def mean(key: str) -> float:
        return statistics.mean(result[key] or 0 for result in group)

    scores = [result["scores"]["score"] for result in group]
    return {
        "run": name,
        "method": group[0].get("method", "lst"),
        "task": task,
        "seeds": str(len(group)),
        "score": f"{statistics.mean(scores):.2f}",
        "deviation": f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "",
        "trainable_percent": f"{group[0]['trainable_share_percent']:.3f}",
        "peak_gb": f"{max(result['peak_memory_bytes'] for result in group) / 1e9:.2f}",
        "seconds_per_step": f"{mean('seconds_per_step'):.4f}",
        "train_seconds": f"{mean('train_seconds'):.1f}",
        "saved_mb": f"{group[0].get('saved_bytes', 0) / 1e6:.2f}",
        "trainable": str(group[0]["trainable_parameters"]),
        "total": str(group[0]["backbone_parameters"]),
    }


def _text(found: Sequence[dict[str, str]]) -> str:
    widths = {column: max(len(column), *(len(row[column]) for row in found)) for column in COLUMNS}
    lines = ["  ".join(column.ljust(widths[column]) for column in COLUMNS)]
    lines += ["  ".join(row[column].ljust(widths[column]) for column in COLUMNS) for row in found]
    return "\n".join(line.rstrip() for line in lines)


def _markdown(found: Sequence[dict[str, str]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row[column] for column in COLUMNS) + " |" for row in found])


def _csv(found: Sequence[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue().rstrip("\n")


STYLES: dict[str, Callable[[Sequence[dict[str, str]]], str]] = {"text": _text, "markdown": _markdown, "csv": _csv}

"""Finished runs as the table people know, and a plot of score against memory. Reads result.json files, nothing else.

The columns are those of peft's method comparison (score, time, peak memory, file size, trainable and total parameters), with the
deviation over seeds.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lst_scale.errors import ArgumentError
from lst_scale.recipe.task import ERRORS
from lst_scale.runs.finished import Finished, read_all
from lst_scale.runs.folder import RESULT
from lst_scale.runs.pictures import METHODS, OTHER, check_picture, figure, label_points, save

COLUMNS = (
    "run",
    "method",
    "task",
    "seeds",
    "score",
    "deviation",
    "metric",
    "trainable_percent",
    "peak_gb",
    "seconds_per_step",
    "train_seconds",
    "saved_mb",
    "trainable",
    "total",
)


PANELS_ACROSS = 3


def find_results(paths: Sequence[Path]) -> list[Path]:
    """Return the folders at or below `paths` that hold a result.json.

    Raises:
        ArgumentError: there is none.
    """
    found = sorted({file.parent for path in paths for file in path.rglob(RESULT)})
    if not found:
        raise ArgumentError(f"no finished run in {', '.join(map(str, paths))}: none of the folders holds a result.json")
    return found


def compare(folders: Sequence[Path], style: str = "text", odd: list[str] | None = None) -> str:
    """Return one row for each name and task, over its seeds; `style` is text, markdown or csv. What can't be read is named in `odd`.

    Raises:
        ArgumentError: the style is unknown, or there is nothing to compare.
    """
    if style not in STYLES:
        raise ArgumentError(f"format {style!r} is unknown: write {', '.join(STYLES)}")
    if not folders:
        raise ArgumentError("no finished run: none of the folders holds a result.json")
    return STYLES[style](rows(folders, odd))


def rows(folders: Sequence[Path], odd: list[str] | None = None) -> list[dict[str, str]]:
    """Return the table's rows, best score first within a task."""
    return [_row(found) for found in values(folders, odd)]


def values(folders: Sequence[Path], odd: list[str] | None = None) -> list[dict[str, Any]]:
    """Return the same rows with numbers as they are; None: there is none."""
    return [_values(name, task, group) for (task, name), group in _groups(read_all(folders, odd))]


def plot(folders: Sequence[Path], path: Path) -> None:
    """Draw every row's score, with its deviation over seeds, against its peak memory, one panel a task, into a .png or .svg file.

    Raises:
        ArgumentError: the file's ending is another, its folder is missing, or matplotlib is.
    """
    check_picture(path)
    groups = _groups(read_all(folders))
    tasks = sorted({task for (task, _), _ in groups})
    across = min(len(tasks), PANELS_ACROSS)
    down = -(-len(tasks) // across)
    drawn = figure(1.5 + 5.5 * across, 4.4 * down)
    panels = list(drawn.subplots(down, across, squeeze=False).flat)
    methods: dict[str, Any] = {}
    for panel in panels[len(tasks) :]:
        panel.remove()
    for panel, task in zip(panels, tasks, strict=False):
        methods |= _panel(panel, task, {name: group for (of, name), group in groups if of == task})
    order = sorted(methods, key=lambda method: (list(METHODS).index(method) if method in METHODS else len(METHODS), method))
    heading = "bars: deviation\nover seeds" if any(len(group) > 1 for _, group in groups) else None
    drawn.legend([methods[name] for name in order], order, title=heading, fontsize=8, title_fontsize=8, loc="outside right upper")
    for panel in panels[: len(tasks)]:
        label_points(panel, *_labels(panel))
    save(drawn, path)


def _panel(panel: Any, task: str, groups: dict[str, list[Finished]]) -> dict[str, Any]:
    """Draw one task's rows and return what stands for each method in the legend."""
    methods: dict[str, Any] = {}
    ends: list[float] = []
    for name, group in groups.items():
        score, spread = _mean([run.score for run in group]), _deviation(group) or 0.0
        look = {"fmt": "o", "capsize": 3, "markersize": 6, "color": METHODS.get(group[0].method, OTHER)}
        methods[group[0].method] = panel.errorbar(_peak_gb(group), score, yerr=spread, label=name, **look)
        ends += [score - spread, score + spread]
    everyone = [run for group in groups.values() for run in group]
    room = max(max(ends) - min(ends), 1.0) * 0.25
    panel.set(xlim=(0, max(map(_peak_gb, groups.values())) * 1.35 or 1.0), ylim=(min(ends) - room, max(ends) + room))
    panel.set(xlabel="peak memory of a process, GB", ylabel=_score_name(everyone))
    panel.set_title(f"{task}: {_circumstances(everyone)}", fontsize=10)
    panel.grid(alpha=0.3)
    panel.set_axisbelow(True)
    return methods


def _labels(panel: Any) -> tuple[list[tuple[float, float]], list[str]]:
    """Return where a panel's points are, and their names."""
    bars = panel.containers
    return [tuple(bar.lines[0].get_xydata()[0]) for bar in bars], [bar.get_label() for bar in bars]


def _score_name(found: Sequence[Finished]) -> str:
    """Return what the score of these runs is, with its unit where it has one: `data/scores.py` makes it."""
    ways = {_measured(run.metrics or ("score",)) for run in found}
    if len(ways) == 1:
        return ways.pop()
    return "score, %" if all(way.endswith(", %") for way in ways) else "score"


def _measured(metrics: Sequence[str]) -> str:
    counted = [name for name in metrics if name not in ERRORS] or metrics
    text = counted[0] if len(counted) == 1 else f"mean of {' and '.join(counted)}"
    if counted[0] in ERRORS:
        return f"minus {text}"
    return text if any(":" in name for name in counted) else f"{text}, %"  # one's own has its own unit


def _circumstances(found: Sequence[Finished]) -> str:
    """Return the model and the batch, where all runs have the same."""
    models, batches = {run.model for run in found}, {run.batch for run in found}
    model = "several models" if len(models) > 1 else next(iter(models))
    batch = "several batch sizes" if len(batches) > 1 else f"{next(iter(batches))} rows a step" if None not in batches else None
    return ", ".join(part for part in (model, batch) if part)


def _groups(found: Sequence[Finished]) -> list[tuple[tuple[str, str], list[Finished]]]:
    """Return the seeds of each task and name together, best score first within a task."""
    groups: dict[tuple[str, str], list[Finished]] = {}
    for run in found:
        groups.setdefault((run.task, run.name), []).append(run)
    return sorted(groups.items(), key=lambda item: (item[0][0], -round(_mean([run.score for run in item[1]]), 2), item[0][1]))


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values)


def _deviation(group: Sequence[Finished]) -> float | None:
    return statistics.stdev([run.score for run in group]) if len(group) > 1 else None


def _peak_gb(group: Sequence[Finished]) -> float:
    return max(run.peak_memory_bytes for run in group) / 1e9


def _values(name: str, task: str, group: Sequence[Finished]) -> dict[str, Any]:
    first = group[0]
    a_step = [run.seconds_per_step for run in group if run.seconds_per_step is not None]
    return {
        "run": name,
        "method": first.method,
        "task": task,
        "seeds": len(group),
        "score": _mean([run.score for run in group]),
        "deviation": _deviation(group),
        "metric": "+".join(first.metrics) or "score",
        "trainable_percent": first.trainable_share_percent,
        "peak_gb": _peak_gb(group),
        "seconds_per_step": _mean(a_step) if a_step else None,
        "train_seconds": _mean([run.train_seconds for run in group]),
        "saved_mb": first.saved_bytes / 1e6,
        "trainable": first.trainable_parameters,
        "total": first.backbone_parameters,
    }


_DIGITS = {"trainable_percent": 3, "seconds_per_step": 4, "train_seconds": 1}  # after the point; of other numbers 2


def _row(found: dict[str, Any]) -> dict[str, str]:
    def cell(column: str, value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.{_DIGITS.get(column, 2)}f}" if isinstance(value, float) else str(value)

    return {column: cell(column, value) for column, value in found.items()}


def _text(found: Sequence[dict[str, str]]) -> str:
    widths = {column: max(len(column), *(len(row[column]) for row in found)) for column in COLUMNS}
    lines = ["  ".join(column.ljust(widths[column]) for column in COLUMNS)]
    lines += ["  ".join(row[column].ljust(widths[column]) for column in COLUMNS) for row in found]
    return "\n".join(line.rstrip() for line in lines)


def _markdown(found: Sequence[dict[str, str]]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row[column].replace("|", "\\|") for column in COLUMNS) + " |" for row in found])


def _csv(found: Sequence[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue().rstrip("\n")


STYLES: dict[str, Callable[[Sequence[dict[str, str]]], str]] = {"text": _text, "markdown": _markdown, "csv": _csv}

"""Finished runs as tables and pictures read them: what they need of a result.json, checked, or one line that says why it can't be read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lst_scale.errors import ArgumentError, LstScaleError, fence
from lst_scale.runs.folder import RESULT


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One finished run."""

    name: str
    method: str
    task: str
    score: float
    metrics: tuple[str, ...]  # of which the score is the mean
    model: str | None
    batch: int | None  # rows an optimizer step
    peak_memory_bytes: float
    seconds_per_step: float | None  # None: an ensemble, which takes no steps
    train_seconds: float
    saved_bytes: float
    trainable_parameters: int
    backbone_parameters: int
    trainable_share_percent: float


def read_all(folders: Iterable[Path], odd: list[str] | None = None) -> list[Finished]:
    """Return the results that can be read; the others are named in `odd`.

    Raises:
        ArgumentError: none can.
    """
    found: list[Finished] = []
    left_out: list[str] = []
    for folder in folders:
        try:
            found.append(read_finished(folder))
        except LstScaleError as error:
            left_out.append(f"left out: {error}")
    if odd is not None:
        odd += left_out
    if not found:
        raise ArgumentError(
            f"no finished run can be read; {left_out[0]}" if left_out else "no finished run: give folders with a result.json"
        )
    return found


def read_finished(folder: Path) -> Finished:
    """Return what a run's result.json says.

    Raises:
        ArgumentError: it can't be read, or says something that no run writes; names it.
    """
    path = folder / RESULT
    with fence(ArgumentError, str(path)):
        tree = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("it is no JSON object")
        scores = tree["scores"]
        if not isinstance(scores, dict):
            raise ValueError("'scores' is no JSON object")
        recipe = tree.get("recipe") if isinstance(tree.get("recipe"), dict) else {}
        return Finished(
            name=_text(tree, "name"),
            method=_text({"method": "lst"} | tree, "method"),
            task=_text(tree, "task"),
            score=_number(scores, "score", least=-math.inf),
            metrics=tuple(str(name) for name in scores if name != "score"),
            model=_inner(recipe, "backbone", "checkpoint", str),
            batch=_inner(recipe, "training", "global_batch_size", int),
            peak_memory_bytes=_number(tree, "peak_memory_bytes"),
            seconds_per_step=None if tree["seconds_per_step"] is None else _number(tree, "seconds_per_step"),
            train_seconds=_number(tree, "train_seconds", empty=0.0),
            saved_bytes=_number({"saved_bytes": 0} | tree, "saved_bytes"),
            trainable_parameters=int(_number(tree, "trainable_parameters")),
            backbone_parameters=int(_number(tree, "backbone_parameters")),
            trainable_share_percent=_number(tree, "trainable_share_percent"),
        )


def _text(tree: dict[str, Any], key: str) -> str:
    value = tree[key]
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{key!r} is no line of text")
    return value


def _number(tree: dict[str, Any], key: str, *, least: float = 0.0, empty: float | None = None) -> float:
    value = tree[key]
    if value is None and empty is not None:
        return empty
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not least <= value < 1e30:
        raise ValueError(f"{key!r} is no number that a run writes")
    return float(value)


def _inner(recipe: Any, section: str, key: str, kind: type) -> Any:
    """Return a value of the recipe that only headings need; None where it is not there."""
    inside = recipe.get(section)
    value = inside.get(key) if isinstance(inside, dict) else None
    return value if isinstance(value, kind) and not isinstance(value, bool) else None

"""What answers are worth: each of a task's metrics, and one score of them that is the larger the better.

Metrics are in percent, as the paper reports them, but for errors (mae, rmse), which are in the targets' own unit, and one's own
functions, which are as they return. "score", by which the best checkpoint is chosen and runs are compared, is the mean of all metrics
that are no errors; where there are only errors, minus their mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from lst_scale.data import own_metric
from lst_scale.data.measures import MEASURES
from lst_scale.data.rows import Row, targets_of
from lst_scale.data.tasks import TaskData


def score(task: TaskData, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return each of the task's metrics, and their "score".

    Raises:
        RecipeError: a metric of one's own fails, or returns no finite number.
    """
    scores = {own_metric.short_name(name): _measured(name, predictions, references) for name in task.metrics}
    errors = [own_metric.short_name(name) for name in task.metrics if name in MEASURES and MEASURES[name].is_error]
    shares = [value for name, value in scores.items() if name not in errors]
    return scores | {"score": float(np.mean(shares)) if shares else -float(np.mean(list(scores.values())))}


def majority_score(task: TaskData, rows: Sequence[Row]) -> dict[str, float]:
    """Return the scores of always giving the commonest training target (the median, for a regression)."""
    targets = targets_of(task.train)
    constant = sorted(targets, key=float)[len(task.train) // 2] if task.kind == "regression" else _commonest(targets)
    return score(task, [constant] * len(rows), list(targets_of(rows)))


def try_own_metrics(task: TaskData) -> None:
    """Try metrics of one's own on the validation targets, before anything is loaded for the task.

    Raises:
        RecipeError: one is not there, fails, or returns no finite number.
    """
    own = [name for name in task.metrics if name not in MEASURES]
    targets = list(targets_of(task.validation)) if own else []
    for name in own:
        own_metric.measured(name, targets, targets)


def only_answer(predictions: Sequence[str], references: Sequence[str]) -> str | None:
    """Return the answer that every row got although not every row expects the same one; None: answers differ, as they should."""
    return predictions[0] if len(set(predictions)) == 1 < len(set(references)) else None


def _measured(name: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    if name not in MEASURES:
        return own_metric.measured(name, predictions, references)
    measure = MEASURES[name]
    return measure(predictions, references) * (1 if measure.is_error else 100)


def _commonest(targets: Iterable[str]) -> str:
    """Return the target that comes most often; of several the first in the alphabet."""
    counts = Counter(targets)
    return min(counts, key=lambda target: (-counts[target], target))

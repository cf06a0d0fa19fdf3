"""What answers are worth: each of a task's metrics, and one score of them that is the larger the better.

Metrics are in percent, as the paper reports them, but for errors (mae, rmse), which are in the targets' own unit, and one's own
functions, which are as they return. "score", by which the best checkpoint is chosen and runs are compared, is the mean of all metrics
that are no errors; where there are only errors, minus their mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lst_scale.data import own_metric
from lst_scale.data.measures import MEASURES, Measure
from lst_scale.data.release_measures import RELEASE_MEASURES
from lst_scale.data.rows import Row, references_of, targets_of
from lst_scale.data.tasks import TaskData


def score_rows(task: TaskData, predictions: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    """Return each of the task's metrics on the answers to some rows, and their "score"; blanks around answers do not count.

    Raises:
        RecipeError: a metric of one's own fails, or returns no finite number.
    """
    more = list(references_of(rows)) if any(name in RELEASE_MEASURES for name in task.metrics) else None
    return score(task, [text.strip() for text in predictions], [target.strip() for target in targets_of(rows)], more)


def score(task: TaskData, predictions: Sequence[str], references: Sequence[str], more: Sequence[str] | None = None) -> dict[str, float]:
    """Return each of the task's metrics, and their "score".

    Args:
        more: what metrics of the release compare answers with, in place of one reference a row.

    Raises:
        RecipeError: a metric of one's own fails, or returns no finite number.
    """
    scores, errors, beside = {}, [], []
    for name in task.metrics:
        measure = known_measures().get(name)
        called = own_metric.short_name(name) if measure is None else f"{name}{measure.suffix()}"
        compared = more if name in RELEASE_MEASURES and more is not None else references
        scores[called] = own_metric.measured(name, predictions, compared) if measure is None else _told(measure, predictions, compared)
        errors += [called] if measure is not None and measure.is_error else []
        beside += [called] if measure is not None and measure.is_beside else []
    shares = [value for name, value in scores.items() if name not in (*errors, *beside)]
    return scores | {"score": float(np.mean(shares)) if shares else -float(np.mean([scores[name] for name in errors]))}


def together(names: Sequence[str], each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the scores of tasks as those of a run: of several, each by its task's name, and as "score" the mean of the tasks'."""
    if len(each) == 1:
        return dict(each[0])
    named = {f"{task}/{name}": value for task, scores in zip(names, each, strict=True) for name, value in scores.items()}
    return named | {"score": float(np.mean([scores["score"] for scores in each]))}


def known_measures() -> Mapping[str, Measure]:
    """Return all metrics but one's own, by name."""
    return {**MEASURES, **RELEASE_MEASURES}


def majority_score(task: TaskData, rows: Sequence[Row]) -> dict[str, float]:
    """Return the scores of always giving the commonest training target (the median, for a regression)."""
    targets = targets_of(task.train)
    constant = sorted(targets, key=float)[len(task.train) // 2] if task.kind == "regression" else _commonest(targets)
    return score_rows(task, [constant] * len(rows), rows)


def try_own_metrics(task: TaskData) -> None:
    """Try metrics of one's own on the validation targets, before anything is loaded for the task.

    Raises:
        RecipeError: one is not there, fails, or returns no finite number.
    """
    own = [name for name in task.metrics if name not in known_measures()]
    targets = [target.strip() for target in targets_of(task.validation)] if own else []
    for name in own:
        own_metric.measured(name, targets, targets)


def only_answer(predictions: Sequence[str], references: Sequence[str]) -> str | None:
    """Return the answer that every row got although not every row expects the same one; None: answers differ, as they should."""
    return predictions[0] if len(set(predictions)) == 1 < len(set(references)) else None


def _told(measure: Measure, predictions: Sequence[str], references: Sequence[str]) -> float:
    return measure(predictions, references) * (1 if measure.is_error else 100)


def _commonest(targets: Iterable[str]) -> str:
    """Return the target that comes most often; of several the first in the alphabet."""
    counts = Counter(targets)
    return min(counts, key=lambda target: (-counts[target], target))

"""Metrics as `evaluate.Metric` subclasses inside the package: the same interface as the hub's, without a network.

Answers are texts. One that can't be parsed counts as wrong: for a classification it is no label, for a regression it is -1, as in the
original release. Scores are in percent, as the paper reports them; "score" is the mean of a task's metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn import metrics as sklearn_metrics

from lst_scale.data.tasks import Row, TaskData

UNPARSABLE = -1.0
POSITIVE = "1"  # the label that F1 looks for, when it is among the labels


class TextMetric(evaluate.Metric):  # type: ignore[misc]
    """A metric over predicted and expected texts. Subclasses give the function."""

    function: Callable[[list[str], list[str]], float]
    name_in_results: str

    def __init__(self) -> None:
        # In memory: no cache file, no lock, nothing shared between processes.
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions and references are lists of texts",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return {self.name_in_results: float(type(self).function(predictions, references))}


def _accuracy(predictions: list[str], references: list[str]) -> float:
    return float(np.mean([p == r for p, r in zip(predictions, references, strict=True)]))


def _f1(predictions: list[str], references: list[str]) -> float:
    """F1 of the label "1"; an answer that is neither counts as the wrong label of its row."""
    known = set(references) | {"0", "1"}
    wrong = {"0": "1", "1": "0"}
    parsed = [p if p in known else wrong.get(r, "0") for p, r in zip(predictions, references, strict=True)]
    return float(sklearn_metrics.f1_score([r == POSITIVE for r in references], [p == POSITIVE for p in parsed], zero_division=0.0))


def _matthews(predictions: list[str], references: list[str]) -> float:
    known = sorted(set(references))
    others = {r: next((k for k in known if k != r), r) for r in known}
    parsed = [p if p in known else others[r] for p, r in zip(predictions, references, strict=True)]
    return float(sklearn_metrics.matthews_corrcoef(references, parsed))


def _numbers(texts: list[str]) -> np.ndarray:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            return UNPARSABLE
        return value if math.isfinite(value) else UNPARSABLE

    return np.array([parse(text) for text in texts])


def _correlation(kind: str) -> Callable[[list[str], list[str]], float]:
    def compute(predictions: list[str], references: list[str]) -> float:
        from scipy import stats

        p, r = _numbers(predictions), _numbers(references)
        if len(p) < 2 or np.all(p == p[0]) or np.all(r == r[0]):
            return 0.0  # undefined; the release writes 0
        function = stats.pearsonr if kind == "pearson" else stats.spearmanr
        return float(function(p, r)[0])

    return compute


def _rouge_l(predictions: list[str], references: list[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return float(np.mean([scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]))


def _chrf(predictions: list[str], references: list[str]) -> float:
    from sacrebleu import corpus_chrf

    return float(corpus_chrf(predictions, [references]).score) / 100


def _metric(name: str, function: Callable[[list[str], list[str]], float], description: str) -> type[TextMetric]:
    return type(name, (TextMetric,), {"function": staticmethod(function), "name_in_results": name, "__doc__": description})


METRICS: dict[str, type[TextMetric]] = {
    "accuracy": _metric("accuracy", _accuracy, "Share of answers equal to the reference."),
    "f1": _metric("f1", _f1, 'F1 of the label "1".'),
    "matthews": _metric("matthews", _matthews, "Matthews correlation coefficient."),
    "pearson": _metric("pearson", _correlation("pearson"), "Pearson correlation of numbers."),
    "spearman": _metric("spearman", _correlation("spearman"), "Spearman rank correlation of numbers."),
    "exact_match": _metric("exact_match", _accuracy, "Share of texts equal to the reference."),
    "rouge_l": _metric("rouge_l", _rouge_l, "ROUGE-L F-measure, with stemming (rouge-score)."),
    "chrf": _metric("chrf", _chrf, "chrF (sacrebleu)."),
}


def score(task: TaskData, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return each of the task's metrics in percent, and their mean as "score"."""
    scores: dict[str, float] = {}
    for name in task.metrics:
        computed: dict[str, Any] = METRICS[name]().compute(predictions=list(predictions), references=list(references))
        scores[name] = 100 * computed[name]
    return scores | {"score": float(np.mean(list(scores.values())))}


def majority_score(task: TaskData, rows: Sequence[Row]) -> dict[str, float]:
    """Return the scores of always giving the commonest training target (the median, for a regression)."""
    targets = [row.target for row in task.train]
    constant = sorted(targets, key=float)[len(targets) // 2] if task.kind == "regression" else max(sorted(set(targets)), key=targets.count)
    return score(task, [constant] * len(rows), [row.target for row in rows])

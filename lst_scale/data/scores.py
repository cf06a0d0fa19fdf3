"""What answers are worth: texts in, one number a metric out.

An answer that can't be parsed counts as wrong: for a classification it is no label, for a regression it is -1, as in the original
release. Scores are in percent, as the paper reports them; "score" is the mean of a task's metrics. `metrics.py` offers the same
functions to whoever works with the `evaluate` package. What is heavy is imported by the metric that needs it, after training.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lst_scale.data.tasks import Row, TaskData
from lst_scale.recipe_task import POSITIVE

UNPARSABLE = -1.0


@dataclass(frozen=True)
class Measure:
    """A function of predicted and expected texts, 1 at best, and what it is called."""

    function: Callable[[list[str], list[str]], float]
    description: str

    def __call__(self, predictions: Sequence[str], references: Sequence[str]) -> float:
        return float(self.function(list(predictions), list(references)))


def _accuracy(predictions: list[str], references: list[str]) -> float:
    return float(np.mean([p == r for p, r in zip(predictions, references, strict=True)]))


def _f1(predictions: list[str], references: list[str]) -> float:
    """F1 of the label "1"; an answer that is neither counts as the wrong label of its row."""
    from sklearn.metrics import f1_score

    known = set(references) | {"0", "1"}
    wrong = {"0": "1", "1": "0"}
    parsed = [p if p in known else wrong.get(r, "0") for p, r in zip(predictions, references, strict=True)]
    return float(f1_score([r == POSITIVE for r in references], [p == POSITIVE for p in parsed], zero_division=0.0))


def _matthews(predictions: list[str], references: list[str]) -> float:
    from sklearn.metrics import matthews_corrcoef

    known = sorted(set(references))
    others = {r: next((k for k in known if k != r), r) for r in known}
    parsed = [p if p in known else others[r] for p, r in zip(predictions, references, strict=True)]
    return float(matthews_corrcoef(references, parsed))


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


MEASURES: dict[str, Measure] = {
    "accuracy": Measure(_accuracy, "Share of answers equal to the reference."),
    "f1": Measure(_f1, 'F1 of the label "1".'),
    "matthews": Measure(_matthews, "Matthews correlation coefficient."),
    "pearson": Measure(_correlation("pearson"), "Pearson correlation of numbers."),
    "spearman": Measure(_correlation("spearman"), "Spearman rank correlation of numbers."),
    "exact_match": Measure(_accuracy, "Share of texts equal to the reference."),
    "rouge_l": Measure(_rouge_l, "ROUGE-L F-measure, with stemming (rouge-score)."),
    "chrf": Measure(_chrf, "chrF (sacrebleu)."),
}


def score(task: TaskData, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return each of the task's metrics in percent, and their mean as "score"."""
    scores = {name: 100 * MEASURES[name](predictions, references) for name in task.metrics}
    return scores | {"score": float(np.mean(list(scores.values())))}


def majority_score(task: TaskData, rows: Sequence[Row]) -> dict[str, float]:
    """Return the scores of always giving the commonest training target (the median, for a regression)."""
    targets = [row.target for row in task.train]
    counts = Counter(targets)
    constant = sorted(targets, key=float)[len(targets) // 2] if task.kind == "regression" else max(sorted(counts), key=counts.__getitem__)
    return score(task, [constant] * len(rows), [row.target for row in rows])

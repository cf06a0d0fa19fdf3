"""What a metric measures: texts in, one number out.

An answer that can't be parsed counts as wrong and is never worth giving: for a classification it is no label; for a correlation it is
-1, as in the original release; for an error it is as far off as the worst answer. `metrics.py` offers the same functions to whoever
works with the `evaluate` package. What is heavy is imported by the metric that needs it, after training.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lst_scale.recipe.task import POSITIVE

UNPARSABLE = -1.0
LARGEST = 1e100  # what larger numbers count as, so that their squares stay finite


@dataclass(frozen=True)
class Measure:
    """A function of predicted and expected texts: a share, 1 at best, told in percent; or an error, told in the targets' own unit."""

    function: Callable[[list[str], list[str]], float]
    description: str
    is_error: bool = False  # less is better
    is_beside: bool = False  # told beside others, and no part of the score
    suffix: Callable[[], str] = str  # of its name in results, where how it is measured depends on what is installed

    def __call__(self, predictions: Sequence[str], references: Sequence[str]) -> float:
        return float(self.function(list(predictions), list(references)))


def _accuracy(predictions: list[str], references: list[str]) -> float:
    return float(np.mean([p == r for p, r in zip(predictions, references, strict=True)]))


def _f1(predictions: list[str], references: list[str]) -> float:
    """F1 of the label "1"; an answer that is no label counts as the wrong one of its row."""
    from sklearn.metrics import f1_score

    known = set(references) | {"0", "1"}
    found = [p == POSITIVE if p in known else r != POSITIVE for p, r in zip(predictions, references, strict=True)]
    return float(f1_score([r == POSITIVE for r in references], found, zero_division=0.0))


def _macro_f1(predictions: list[str], references: list[str]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, labels=sorted(set(references)), average="macro", zero_division=0.0))


def _matthews(predictions: list[str], references: list[str]) -> float:
    from sklearn.metrics import matthews_corrcoef

    known = sorted(set(references))
    others = {r: next((k for k in known if k != r), r) for r in known}
    parsed = [p if p in known else others[r] for p, r in zip(predictions, references, strict=True)]
    return float(matthews_corrcoef(references, parsed))


def number_in(text: str) -> float | None:
    """Return the finite number that a text is, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _numbers(texts: list[str], otherwise: float) -> np.ndarray:
    found = (number_in(text) for text in texts)
    return np.array([otherwise if value is None else min(max(value, -LARGEST), LARGEST) for value in found])


def _correlation(kind: str) -> Callable[[list[str], list[str]], float]:
    def compute(predictions: list[str], references: list[str]) -> float:
        from scipy import stats

        p, r = _numbers(predictions, UNPARSABLE), _numbers(references, UNPARSABLE)
        if len(p) < 2 or np.all(p == p[0]) or np.all(r == r[0]):
            return 0.0  # undefined; the release writes 0
        function = stats.pearsonr if kind == "pearson" else stats.spearmanr
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of numbers that hardly differ
            found = float(function(p, r)[0])
        return found if math.isfinite(found) else 0.0

    return compute


def _errors(predictions: list[str], references: list[str]) -> np.ndarray:
    """Return how far off each answer is; one that is no number is as far off as the worst answer, and as the targets are apart or large."""
    p, r = _numbers(predictions, math.nan), _numbers(references, UNPARSABLE)
    errors = np.abs(p - r)
    parsed = errors[~np.isnan(errors)]
    worst = max(parsed.max(initial=0.0), np.ptp(r), np.abs(r).max()) or 1.0
    return np.where(np.isnan(errors), worst, errors)


def _mae(predictions: list[str], references: list[str]) -> float:
    return float(_errors(predictions, references).mean())


def _rmse(predictions: list[str], references: list[str]) -> float:
    return float(np.sqrt(np.square(_errors(predictions, references)).mean()))


def _rouge(kind: str) -> Callable[[list[str], list[str]], float]:
    def compute(predictions: list[str], references: list[str]) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=True)
        return float(np.mean([scorer.score(r, p)[kind].fmeasure for p, r in zip(predictions, references, strict=True)]))

    return compute


def _bleu(predictions: list[str], references: list[str]) -> float:
    from sacrebleu import corpus_bleu

    return float(corpus_bleu(predictions, [references], force=True).score) / 100  # force: texts may end in " ."


def _chrf(predictions: list[str], references: list[str]) -> float:
    from sacrebleu import corpus_chrf

    return float(corpus_chrf(predictions, [references]).score) / 100


MEASURES: dict[str, Measure] = {
    "accuracy": Measure(_accuracy, "Share of answers equal to the reference."),
    "f1": Measure(_f1, 'F1 of the label "1".'),
    "macro_f1": Measure(_macro_f1, "F1 of each label, their mean."),
    "matthews": Measure(_matthews, "Matthews correlation coefficient."),
    "pearson": Measure(_correlation("pearson"), "Pearson correlation of numbers."),
    "spearman": Measure(_correlation("spearman"), "Spearman rank correlation of numbers."),
    "mae": Measure(_mae, "Mean absolute error of numbers.", is_error=True),
    "rmse": Measure(_rmse, "Root of the mean squared error of numbers.", is_error=True),
    "exact_match": Measure(_accuracy, "Share of texts equal to the reference."),
    "rouge1": Measure(_rouge("rouge1"), "ROUGE-1 F-measure, with stemming (rouge-score)."),
    "rouge2": Measure(_rouge("rouge2"), "ROUGE-2 F-measure, with stemming (rouge-score)."),
    "rougeL": Measure(_rouge("rougeL"), "ROUGE-L F-measure, with stemming (rouge-score)."),
    "rouge_l": Measure(_rouge("rougeL"), "The same as rougeL."),
    "bleu": Measure(_bleu, "BLEU of the whole set (sacrebleu)."),
    "chrf": Measure(_chrf, "chrF of the whole set (sacrebleu)."),
}

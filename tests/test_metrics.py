"""What answers are worth: more metrics, errors of which less is better, one's own, and metrics that can't measure the task."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lst_scale.data.measures import MEASURES
from lst_scale.data.metrics import METRICS as EVALUATE_METRICS
from lst_scale.data.scores import majority_score, only_answer, score, try_own_metrics
from lst_scale.data.tasks import Row, TaskData
from lst_scale.errors import LstScaleError, RecipeError
from lst_scale.recipe.schema import Recipe, load_recipe
from lst_scale.recipe.task import METRICS, metrics_misfit
from lst_scale.runs.logs import Logger
from lst_scale.system.distributed import connect
from lst_scale.training import shared

TEXTS = ["the cat sat on the mat", "a dog barks .", "all of them ran home quickly"]


def task_of(*metrics: str, kind: str = "classification", targets: list[str] | None = None, **changes: Any) -> TaskData:
    targets = targets or ["0", "1", "1"]
    rows = [Row("", target) for target in targets]
    labels = tuple(sorted(set(targets))) if kind == "classification" else None
    options: dict[str, Any] = {"labels": labels, "epochs": 1, "train": rows, "validation": rows, "test": None} | changes
    return TaskData(name="t", kind=kind, metrics=metrics, **options)


def test_every_metric_that_a_recipe_may_name_is_there_and_in_evaluate_s_form_too() -> None:
    assert set(METRICS) == set(MEASURES) == set(EVALUATE_METRICS)


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL", "rouge_l", "bleu", "chrf", "exact_match"])
def test_a_text_metric_is_1_for_equal_texts_and_less_for_others_and_survives_empty_answers(name: str) -> None:
    assert MEASURES[name](TEXTS, TEXTS) == pytest.approx(1.0)
    assert 0 <= MEASURES[name](["the cat", "a dog barks .", "none"], TEXTS) < 1
    assert MEASURES[name]([""] * 3, TEXTS) == 0


def test_rouge_counts_words_pairs_and_the_longest_common_run() -> None:
    answer, expected = ["cat the sat on the mat"], ["the cat sat on the mat"]
    assert MEASURES["rouge1"](answer, expected) == pytest.approx(1)
    assert MEASURES["rouge2"](answer, expected) == pytest.approx(3 / 5)
    assert MEASURES["rougeL"](answer, expected) == MEASURES["rouge_l"](answer, expected) == pytest.approx(5 / 6)


def test_errors_are_in_the_targets_unit() -> None:
    assert MEASURES["mae"](["1", "2.5"], ["2", "2"]) == pytest.approx(0.75)
    assert MEASURES["rmse"](["1", "2.5"], ["2", "2"]) == pytest.approx(math.sqrt((1 + 0.25) / 2))


@pytest.mark.parametrize("name", ["mae", "rmse"])
@pytest.mark.parametrize("nonsense", ["", "many", "nan", "-inf", "1e999", "1,5", "(1)"])
def test_an_answer_that_is_no_number_is_never_better_than_any_number_that_could_be_given(name: str, nonsense: str) -> None:
    expected = ["-1", "0.5", "4"]
    silent = MEASURES[name]([nonsense, "0.5", "9"], expected)
    assert all(MEASURES[name]([other, "0.5", "9"], expected) <= silent for other in ("-1", "0.5", "4", "2"))
    assert MEASURES[name]([nonsense] * 3, expected) >= MEASURES[name](["0.5"] * 3, expected) > 0
    assert MEASURES[name]([nonsense], ["0"]) > 0, "one row, whose target is 0"


@pytest.mark.parametrize("name", ["mae", "rmse", "pearson", "spearman"])
def test_numbers_of_any_size_give_a_finite_value(name: str) -> None:
    for answer in ("1e308", "-1e308", "1e-320", "9" * 400):
        assert math.isfinite(MEASURES[name]([answer, "1", "2"], ["0", "1", "2"]))
    assert math.isfinite(MEASURES[name](["1.0000000000001", "1", "1"], ["0", "1", "2"]))


def test_f1_of_labels_that_are_words_or_more_than_two() -> None:
    assert MEASURES["macro_f1"](["a", "b", "b"], ["a", "b", "c"]) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert MEASURES["macro_f1"](["?", "b"], ["a", "b"]) == pytest.approx(0.5)
    assert MEASURES["f1"](["what", "1"], ["2", "1"]) == pytest.approx(2 / 3), "no answer at all is no true negative"


def test_the_score_is_larger_for_the_better_whatever_is_measured() -> None:
    good, bad, expected = ["1", "2", "2.9"], ["3", "1", "1"], ["1", "2", "3"]
    for metrics in (("mae",), ("rmse", "mae"), ("pearson", "mae"), ("pearson",)):
        task = task_of(*metrics, kind="regression", targets=expected)
        assert score(task, good, expected)["score"] > score(task, bad, expected)["score"]
    both = score(task_of("pearson", "mae", kind="regression", targets=expected), bad, expected)
    assert both["score"] == both["pearson"] and both["mae"] == pytest.approx(5 / 3)
    assert score(task_of("mae", kind="regression", targets=expected), bad, expected)["score"] == pytest.approx(-5 / 3)


def test_the_majority_of_many_different_texts_needs_one_look_at_each() -> None:
    rows = [Row("", f"text {number}") for number in range(300_000)] + [Row("", "text 7")]  # ten minutes when each is counted by itself
    task = task_of("exact_match", kind="text", train=rows)
    assert majority_score(task, [Row("", "text 7")])["score"] == 100


def test_all_answers_alike_are_noticed_unless_they_should_be() -> None:
    assert only_answer(["a", "a"], ["a", "b"]) == "a"
    assert only_answer(["a", "b"], ["a", "b"]) is None
    assert only_answer(["a", "a"], ["a", "a"]) is None


@pytest.mark.parametrize(
    ("kind", "metric", "labels", "message"),
    [
        (
            "classification",
            "f1",
            ["act", "food"],
            "f1 is of two classes, of which '1' is the positive one: call the labels '0' and '1', or",
        ),
        (
            "classification",
            "pearson",
            ["act", "food"],
            "pearson compares numbers, and labels such as 'act' are none: write accuracy, macro_f1",
        ),
        ("classification", "rmse", ["1", "x"], "rmse compares numbers, and labels such as 'x' are none"),
        ("text", "mae", None, "mae compares numbers, which kind text lacks: write kind: regression, or exact_match, rougeL, bleu or chrf"),
        ("text", "macro_f1", None, "macro_f1 compares classes, which kind text lacks"),
        ("regression", "macro_f1", None, "macro_f1 compares classes, which kind regression lacks: write pearson, spearman, mae or rmse"),
        ("regression", "bleu", None, "bleu compares texts, and 0.20 is another text than 0.2"),
    ],
)
def test_a_metric_that_can_not_measure_the_task_is_refused(kind: str, metric: str, labels: list[str] | None, message: str) -> None:
    assert str(metrics_misfit(kind, [metric], labels)).startswith(f"metrics: {message}")


def test_metrics_that_fit_pass() -> None:
    assert metrics_misfit("classification", ["f1", "matthews", "macro_f1", "accuracy", "pearson", "mae", "a.b:c"], ["0", "1"]) is None
    assert metrics_misfit("regression", ["pearson", "spearman", "mae", "rmse", "mine.py:f"], None) is None
    assert metrics_misfit("text", ["rouge1", "rouge2", "rougeL", "rouge_l", "bleu", "chrf", "exact_match", "mine:f"], None) is None


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("statistics:median_", "statistics has no function 'median_'. Did you mean 'median'?"),
        ("nowhere.at_all:f", "nowhere.at_all can't be imported: No module named 'nowhere'"),
    ],
)
def test_a_metric_that_is_nowhere_is_named(metric: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"task.metrics: {message}")):
        try_own_metrics(task_of("accuracy", metric))


OWN = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Count:
    right: int

def closeness(predictions: list[str], references: list[str]) -> float:
    found = Count(sum(p == r for p, r in zip(predictions, references)))
    return found.right / len(references)

def none(predictions, references): return None
def nan(predictions, references): return float("nan")
def one(predictions): return 1.0
def breaks(predictions, references): return 1 / 0
def leaves(predictions, references): predictions.clear(); return 1
number = 3
"""


@pytest.fixture
def own_recipe(write_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    def load(*metrics: str, module: str = OWN) -> Recipe:
        (tmp_path / "mine.py").write_text(module)
        path = write_recipe("own", task__metrics=list(metrics))
        return load_recipe(str(path))

    return load


def test_a_metric_beside_the_recipe_is_found_by_the_run_s_own_recipe_too(own_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = own_recipe("mine:closeness", "accuracy")
    assert recipe.task.metrics == (f"{tmp_path}/mine.py:closeness", "accuracy")  # type: ignore[union-attr]
    (tmp_path / "elsewhere").mkdir()
    again = tmp_path / "elsewhere" / "recipe.yaml"
    again.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(str(again)) == recipe
    task = task_of(*recipe.task.metrics)  # type: ignore[union-attr]
    try_own_metrics(task)
    assert score(task, ["0", "1", "0"], ["0", "1", "1"]) == pytest.approx(
        {"mine:closeness": 2 / 3, "accuracy": 200 / 3, "score": (2 / 3 + 200 / 3) / 2}
    )


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("mine:closenes", "has no function 'closenes'. Did you mean 'closeness'?"),
        ("mine:number", "has no function 'number'."),
        ("mine:none", "mine:none must return a number"),
        ("mine:nan", "mine:nan returned nan, which nothing can be compared with: return a finite number"),
        ("mine:one", "mine:one failed: one() takes 1 positional argument but 2 were given"),
        ("mine:breaks", "mine:breaks failed: division by zero"),
    ],
)
def test_a_wrong_metric_of_one_s_own_is_told_before_any_weight_is_read(
    metric: str, message: str, own_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "load_placed", None)  # not to be reached
    with pytest.raises(RecipeError, match=re.escape(message)):
        shared.load_shared([own_recipe(metric)], connect(), Logger(None))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("def f(:", "mine.py can't be imported: "),
        ("import sys; sys.exit(3)", "can't be imported: it ends the process when it is imported"),
        ("raise OSError('a\\nb')", "can't be imported: a"),
        ("\0", "can't be imported: "),
    ],
)
def test_a_module_that_can_not_be_imported_is_one_line(
    module: str, message: str, own_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = own_recipe("mine:f", module=module)
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        try_own_metrics(task_of(*recipe.task.metrics))  # type: ignore[union-attr]
    assert "\n" not in str(caught.value)


def test_a_metric_can_not_change_what_others_measure(own_recipe: Callable[..., Recipe]) -> None:
    recipe, answers = own_recipe("mine:leaves", "accuracy"), ["0", "1", "1"]
    assert score(task_of(*recipe.task.metrics), answers, answers)["accuracy"] == 100  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["acuracy"], "task.metrics.0: 'acuracy' is not valid. Did you mean 'accuracy'?"),
        (["mine:"], "task.metrics.0: 'mine:' is not valid. One's own is written module:function."),
        ([":f"], "':f' is not valid. One's own is written module:function."),
        (["a b:f"], "'a b:f' is not valid. One's own is written"),
        (["mine:f()"], "'mine:f()' is not valid. One's own is written"),
        ([3], "task.metrics.0: 3 should be string"),
        (["f1", "f1"], "metrics names f1 twice: remove one"),
        ([], "task.metrics: needs at least 1 value"),
    ],
)
def test_a_metric_s_name_is_checked_with_the_recipe(metrics: list[Any], message: str, write_recipe: Callable[..., Path]) -> None:
    with pytest.raises(LstScaleError, match=re.escape(message)):
        load_recipe(str(write_recipe("wrong", task__metrics=metrics)))

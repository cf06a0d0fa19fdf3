"""Rows, splits, batches and scores."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sklearn_metrics

from lst_scale.data.batches import FILLER, IGNORED, evaluation_batches, merge_predictions, training_steps
from lst_scale.data.columns import Ids
from lst_scale.data.encode import EncodedSplit, answer_in, encode
from lst_scale.data.metrics import METRICS
from lst_scale.data.own_rows import file_source
from lst_scale.data.scores import majority_score, score
from lst_scale.data.tasks import GLUE, Row, TaskData, glue_row, split_glue
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.recipe.task import FileTask


def split_of(count: int) -> EncodedSplit:
    draw = random.Random(count)
    ids = [[3 + row] * draw.randint(1, 30) for row in range(count)]
    return EncodedSplit(
        rows=[Row("", "")] * count, input_ids=Ids.of(ids), labels=Ids.of([row + 3, 1] for row in range(count)), pad_token_id=0
    )


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("rte", {"sentence1": "A", "sentence2": "B", "label": 1}, Row("rte sentence1: A sentence2: B", "1")),
        ("mnli", {"premise": "A", "hypothesis": "B", "label": 2}, Row("mnli premise: A hypothesis B", "2")),
        ("cola", {"sentence": "A", "label": 0}, Row("cola sentence: A", "0")),
        ("qqp", {"question1": "A", "question2": "B", "label": 0}, Row("qqp question1: A question2: B", "0")),
        ("qnli", {"question": "A", "sentence": "B", "label": 0}, Row("qnli question: A sentence: B", "0")),
        ("stsb", {"sentence1": "A", "sentence2": "B", "label": 3.7999999}, Row("stsb sentence1: A sentence2: B", "3.8")),
    ],
)
def test_glue_text_is_the_papers(name: str, record: dict[str, Any], expected: Row) -> None:
    assert glue_row(name, record) == expected


@pytest.mark.parametrize("name", GLUE)
def test_glue_splits_are_the_papers_and_share_no_row(name: str) -> None:
    def rows(prefix: str, count: int) -> list[Row]:
        return [Row(f"{prefix}{i}", "0") for i in range(count)]

    sets = {
        "train": rows("t", 3000),
        "validation": rows("v", 277),
        "validation_matched": rows("m", 90),
        "validation_mismatched": rows("n", 95),
    }
    found = split_glue(name, sets)
    sizes = {
        "halve": (3000, 138, 139),
        "hold out": (2000, 1000, 277),
        "mnli": (3000, 95, 90),
    }[GLUE[name].splitting]
    assert tuple(len(found[part]) for part in ("train", "validation", "test")) == sizes
    assert len({row for part in found.values() for row in part}) == sum(sizes)
    assert found == split_glue(name, sets)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 23, 64])
def test_every_row_is_trained_on_once_an_epoch_in_steps_that_no_world_changes(world_size: int, micro_batch_size: int, count: int) -> None:
    split = split_of(count)
    common = {"epoch": 1, "seed": 3, "global_batch_size": 8}
    one = training_steps(split, **common, micro_batch_size=8, rank=0, world_size=1)
    ranks = [training_steps(split, **common, micro_batch_size=micro_batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    seen = []
    for step, parts in zip(one, zip(*ranks, strict=True), strict=True):
        assert len({len(part.micro_batches) for part in parts}) == 1
        rows = [i for part in parts for batch in part.micro_batches for i in batch.indices if i != FILLER]
        assert sorted(rows) == sorted(i for batch in step.micro_batches for i in batch.indices if i != FILLER)
        assert all(len(batch.indices) <= micro_batch_size for part in parts for batch in part.micro_batches)
        labelled = sum(int((batch.labels_BT != IGNORED).sum()) for part in parts for batch in part.micro_batches)
        assert labelled == step.num_target_tokens == parts[0].num_target_tokens
        seen += rows
    assert sorted(seen) == list(range(count))


def test_epochs_and_seeds_differ_and_repeat_themselves() -> None:
    def order(epoch: int, seed: int) -> list[int]:
        steps = training_steps(split_of(64), epoch=epoch, seed=seed, global_batch_size=8, micro_batch_size=8, rank=0, world_size=1)
        return [i for step in steps for batch in step.micro_batches for i in batch.indices]

    assert order(0, 0) == order(0, 0) != order(1, 0) != order(0, 1)


def test_buckets_save_padding() -> None:
    steps = training_steps(split_of(400), epoch=0, seed=0, global_batch_size=8, micro_batch_size=8, rank=0, world_size=1)
    masks = [batch.attention_mask_BS for step in steps for batch in step.micro_batches]
    padding = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert padding < 0.05  # unsorted batches of 8 with lengths 1 to 30 waste about 45 %


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_is_evaluated_once_over_all_ranks(world_size: int) -> None:
    split = split_of(17)
    gathered = [
        [(i, str(i)) for batch in evaluation_batches(split, batch_size=4, rank=rank, world_size=world_size) for i in batch.indices]
        for rank in range(world_size)
    ]
    assert merge_predictions(gathered, 17) == [str(i) for i in range(17)]


def test_a_row_predicted_twice_or_never_is_noticed() -> None:
    with pytest.raises(AssertionError, match="row 0 was predicted twice"):
        merge_predictions([[(0, "a")], [(0, "b")]], 1)
    with pytest.raises(AssertionError, match="1 predictions for 2 rows"):
        merge_predictions([[(0, "a")]], 2)


def compute(name: str, predictions: list[str], references: list[str]) -> float:
    return METRICS[name]().compute(predictions=predictions, references=references)[name]


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_scikit_learn_and_scipy(seed: int) -> None:
    draw = np.random.default_rng(seed)
    p, r = (draw.integers(0, 2, 50) for _ in range(2))
    texts = [list(map(str, p)), list(map(str, r))]
    assert compute("accuracy", *texts) == pytest.approx(sklearn_metrics.accuracy_score(r, p))
    assert compute("f1", *texts) == pytest.approx(sklearn_metrics.f1_score(r, p))
    assert compute("matthews", *texts) == pytest.approx(sklearn_metrics.matthews_corrcoef(r, p))
    a, b = draw.normal(size=50).round(1), draw.normal(size=50).round(1)
    numbers = [list(map(str, a)), list(map(str, b))]
    assert compute("pearson", *numbers) == pytest.approx(stats.pearsonr(a, b)[0])
    assert compute("spearman", *numbers) == pytest.approx(stats.spearmanr(a, b)[0])


def test_an_answer_that_can_not_be_parsed_counts_as_wrong() -> None:
    assert compute("accuracy", ["1", "what"], ["1", "1"]) == 0.5
    assert compute("f1", ["1", "what"], ["1", "1"]) == pytest.approx(2 / 3)
    assert compute("f1", ["1", "what"], ["1", "0"]) == pytest.approx(2 / 3)  # a false positive
    assert compute("matthews", ["1", "0", "?", "?"], ["1", "0", "1", "0"]) == 0
    expected = stats.pearsonr([1.0, 2.0, -1.0], [1.0, 2.0, 3.0])[0]
    assert compute("pearson", ["1.0", "2.0", "abc"], ["1.0", "2.0", "3.0"]) == pytest.approx(expected)
    assert compute("pearson", ["nan", "inf", "abc"], ["1.0", "2.0", "3.0"]) == 0


def test_free_text_metrics_are_1_for_equal_texts_and_less_otherwise() -> None:
    text = ["the cat sat on the mat", "a dog barks"]
    for name in ("exact_match", "rouge_l", "chrf"):
        assert compute(name, text, text) == pytest.approx(1.0)
        assert compute(name, ["the cat", "a dog barks"], text) < 1.0


def test_a_tasks_score_is_the_mean_of_its_metrics_in_percent_and_the_majority_is_the_commonest_target() -> None:
    rows = [Row("", label) for label in "110"]
    task = TaskData(
        name="t", kind="classification", labels=("0", "1"), metrics=("accuracy", "f1"), epochs=1, train=rows, validation=rows, test=None
    )
    scores = score(task, ["1", "0", "0"], ["1", "1", "0"])
    assert scores == pytest.approx({"accuracy": 200 / 3, "f1": 200 / 3, "score": 200 / 3})
    assert majority_score(task, rows)["accuracy"] == pytest.approx(200 / 3)


def test_filler_rows_leave_the_loss_and_its_gradient_alone() -> None:
    from lst_scale.backbone.taps import FrozenHead
    from lst_scale.side.loss import cross_entropy_sum

    head = FrozenHead(weight_VD=torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), scale=1.0)
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss, count = cross_entropy_sum(head, hidden, torch.full((2, 3), IGNORED))
    loss.backward()
    assert (float(loss.detach()), count) == (0.0, 0)
    assert hidden.grad is not None and not hidden.grad.any()


def file_task(**changes: Any) -> FileTask:
    files = {"train": "embedded:wordnet/train.jsonl", "validation": "embedded:wordnet/validation.jsonl"}
    return FileTask.model_validate({"kind": "classification", "source": ("word", "definition"), "target": "kind"} | files | changes)


def test_a_template_writes_the_source_and_a_prefix_the_target() -> None:
    task = file_task(template="{word} is a kind of <extra_id_0> : {definition}", target_prefix="<extra_id_0>")
    assert file_source(task, {"word": "cat", "definition": "a feline"}) == "cat is a kind of <extra_id_0> : a feline"
    tokenizer = load_tokenizer("embedded:tiny-t5", None)
    split = encode([Row("a", "animal")], tokenizer, 8, None, "<extra_id_0>")
    assert split.labels[0][0] == tokenizer.convert_tokens_to_ids("<extra_id_0>")
    generated = tokenizer.decode(split.labels[0], skip_special_tokens=True)
    assert answer_in(generated, "<extra_id_0>") == "animal" == answer_in("Kind: animal", "Kind:")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "{word} {meaning} {definition}"}, "template and source must name the same fields, but 'meaning' is only in one"),
        ({"template": "{word}"}, "but 'definition' is only in one of them"),
        ({"template": "{word} {definition"}, "for a brace that stands for itself"),
        ({"template": "{word} {definition}", "prefix": "kind"}, "prefix has no effect beside template"),
    ],
)
def test_a_wrong_template_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        file_task(**changes)

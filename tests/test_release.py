"""Tasks in the file formats of the release's CLIP-T5: rows, draws, features, metrics, and what can be wrong with the files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from helpers.release import CHANNELS, FEATURES, GRID, make_datasets, make_features, write
from lst_scale.data import columns, release_measures, rows
from lst_scale.data.batches import MixedSteps, Steps, global_batches
from lst_scale.data.draws import Draws
from lst_scale.data.release import release_rows
from lst_scale.data.release_measures import RELEASE_MEASURES, words_of
from lst_scale.data.rows import Row
from lst_scale.data.scores import score, together
from lst_scale.data.tasks import TaskData, load_tasks
from lst_scale.data.vqa_accuracy import accuracy, cleaned
from lst_scale.errors import DataError, LadderError, LstScaleError, RecipeError
from lst_scale.images.features import image_reader
from lst_scale.recipe.release import ReleaseTask
from lst_scale.recipe.schema import Recipe, parse_recipe, to_yaml
from lst_scale.recipe.vision import VisionRecipe
from lst_scale.training.shared import load_data

FOUR = ("vqa", "gqa", "nlvr2", "caption")
VISION = VisionRecipe(image_model="hdf5", feature_dim=CHANNELS, pooled_grid=2)


def recipe_of(datasets: Path, *overrides: str, tasks: tuple[str, ...] = FOUR) -> Recipe:
    each = ", ".join(f"{{format: {name}, folder: {datasets}}}" for name in tasks)
    text = f"name: t\ntasks: [{each}]\nbackbone: {{checkpoint: 'embedded:tiny-t5', precision: fp32}}\nmethod: {{name: lst}}\n"
    return parse_recipe(f"{text}vision: {{image_model: hdf5, feature_dim: {CHANNELS}, pooled_grid: 2}}\n", "t.yaml", overrides)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_datasets(tmp_path_factory.mktemp("release") / "datasets")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return make_datasets(tmp_path / "datasets")


def rows_of(datasets: Path, name: str, split: str, **changes: Any) -> list[Row]:
    found = release_rows(ReleaseTask(format=name, folder=str(datasets), **changes), split, (".h5",))  # type: ignore[arg-type]
    assert found is not None
    return list(found)


def test_a_question_s_answers_are_rows_of_one_question_with_their_scores(datasets: Path) -> None:
    found = rows_of(datasets, "vqa", "train")
    features = datasets / "COCO" / FEATURES
    assert found[0] == Row("vqa: what color is it 0?", "", (str(features / "COCO_train2014_0.h5"),), 0.0, question=0)  # nobody agreed
    assert [(row.target, row.score, row.question) for row in found[1:3]] == [("green", 1.0, 1), ("dark green", 0.3, 1)]
    assert len({row.question for row in found}) == 12


def test_a_row_to_be_scored_is_one_with_what_it_is_measured_by(datasets: Path) -> None:
    vqa, gqa = rows_of(datasets, "vqa", "test")[1], rows_of(datasets, "gqa", "validation")[0]
    assert vqa.target == "green" and json.loads(vqa.reference) == ["green"] * 7 + ["a colour"] * 3 and vqa.question is None
    assert gqa.source == "gpa: is it red?" and json.loads(gqa.reference) == {"yes": 1.0}
    assert gqa.images == (str(datasets / "GQA" / FEATURES / "testdev0.h5"),)


def test_gqa_trains_on_two_files_and_scores_on_one(datasets: Path) -> None:
    train = rows_of(datasets, "gqa", "train")
    assert len(train) == 24 and [row.question for row in train] == list(range(24))
    assert train[12].images == (str(datasets / "VG" / FEATURES / "valid0.h5"),)
    assert release_rows(ReleaseTask(format="gqa", folder=str(datasets)), "test", (".h5",)) is None


def test_a_statement_has_two_images_and_is_true_or_false(datasets: Path) -> None:
    row = rows_of(datasets, "nlvr2", "validation")[1]
    names = [Path(file).name for file in row.images]
    assert (row.source, row.target, names) == ("nlvr: both are green.", "true", ["valid-1-img0.h5", "valid-1-img1.h5"])
    assert json.loads(row.reference) == ["valid-0--0", "true"]


def test_captions_are_a_row_each_to_learn_from_and_a_row_an_image_to_be_scored(datasets: Path) -> None:
    train, validation = rows_of(datasets, "caption", "train"), rows_of(datasets, "caption", "validation")
    assert len(train) == 6 * 5 and train[0].target == "A red thing number 0." and train[0].source == "caption: "
    assert len(validation) == 3 and len(json.loads(validation[0].reference)) == 5


def test_a_prompt_may_be_written_and_the_release_s_is_the_default(datasets: Path) -> None:
    assert rows_of(datasets, "gqa", "train", prompt="gqa: ")[0].source == "gqa: is it red?"


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("name", FOUR)
def test_rows_in_a_table_are_those_of_a_list(
    name: str, split: str, datasets: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = rows_of(datasets, name, split)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("lst_scale.data.release.LEAST_BYTES", 0)
    for _ in range(2):  # written, and read again
        with monkeypatch.context() as patch:
            for module in (rows, columns):
                patch.setattr(module, "CHUNK", 2)
            patch.setattr("lst_scale.data.rows.by_chunks", lambda some: columns.by_chunks(some, 2))
            found = release_rows(ReleaseTask(format=name, folder=str(datasets)), split, (".h5",))  # type: ignore[arg-type]
            assert isinstance(found, rows.StoredRows)
            measured = split != "train"  # nothing is measured on training rows
            assert list(found) == [row if measured else replace(row, reference="") for row in expected]


def test_the_first_questions_are_whole(datasets: Path) -> None:
    (task,) = load_tasks(recipe_of(datasets, "data.max_train_rows=3", tasks=("vqa",)))
    assert [row.question for row in task.train] == [0, 1, 1, 2, 2]


def test_an_epoch_draws_one_answer_a_question_in_proportion_to_its_score() -> None:
    draws = Draws.of(np.array([7, 7, 7, 9, 9, 11, 11]), np.array([0.3, 1.0, 0.0, 0.6, 0.6, 0.0, 0.0]))
    found = np.stack([draws.of_epoch(epoch, 0) for epoch in range(4000)])
    assert len(draws) == 3 and set(np.unique(found[:, 0])) == {0, 1} and set(np.unique(found[:, 1])) == {3, 4}
    assert set(found[:, 2]) <= {5, 6}  # worth nothing, whichever
    assert np.mean(found[:, 0] == 1) == pytest.approx(1 / 1.3, abs=0.03)  # four times the standard error of 4,000 draws
    assert np.array_equal(draws.of_epoch(3, 5), draws.of_epoch(3, 5)) and not np.array_equal(found[0], found[1:40].T[:, 0])


def test_each_task_has_the_release_s_batch_and_way_of_answering(datasets: Path) -> None:
    recipe = recipe_of(datasets, "training.global_batch_size=300")
    assert [recipe.rows_a_step(task) for task in recipe.each_task] == [300, 500, 100, 250]
    ways = [recipe.evaluation_of(task) for task in recipe.each_task]
    assert [(way.method, way.num_beams) for way in ways] == [("generation", 1), ("generation", 1), ("likelihood", 1), ("generation", 5)]
    assert recipe.image_counts == (1, 2) and recipe.task_name == "vqa-gqa-nlvr2-caption"
    assert parse_recipe(to_yaml(recipe), "again.yaml") == recipe
    losses = [(task.loss, task.scored) for task in load_tasks(recipe)]
    assert losses == [("example_mean", True), ("example_mean", False), ("example_mean", False), ("token_mean", False)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=vqq"], "task: 'vqq' is not valid. Did you mean 'vqa'?"),
        (["tasks=[]"], "tasks: needs at least 1 value"),
        (["tasks=[vqa, vqa]"], "tasks: two are called vqa: write another name for one"),
        (["tasks=[vqa, rte]"], "tasks: rte has no pictures and others have: give all of them some, or none"),
        (["evaluation.num_beams=3"], "evaluation.num_beams has no effect on tasks of the release, which say it themselves: remove it"),
        (["vision.image_size=64"], "image_size has no effect on image_model hdf5, whose features are made: remove it"),
        (["training.patience=2", "training.result=last"], "patience has no effect on result last: remove it or write result: best"),
        (["backbone.context={text: hello}"], "backbone.context stands before the rows of one task: remove it, or write one task"),
    ],
    ids=str,
)
def test_a_recipe_of_several_tasks_that_can_not_be_meant_is_refused(overrides: list[str], message: str, datasets: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_of(datasets, *overrides)
    assert message in str(caught.value)


def test_one_task_may_take_the_place_of_several(datasets: Path) -> None:
    assert recipe_of(datasets, f"task={{format: gqa, folder: {datasets}}}").task_name == "gqa"


@pytest.mark.parametrize(
    ("file", "change", "name", "split", "message"),
    [
        ("vqa/karpathy_train.json", {"label": "red"}, "vqa", "train", "row 3: label is 'red', no answers with their scores"),
        ("vqa/karpathy_train.json", {"img_id": "gone"}, "vqa", "train", "holds no file gone.h5: put it there"),
        ("vqa/karpathy_train.json", {"sent": None}, "vqa", "train", "row 3: sent is None, no text"),
        ("vqa/karpathy_val.json", {"question_id": 7777}, "vqa", "validation", "row 3: no human answers to question 7777"),
        ("nlvr/valid.json", {"label": 2}, "nlvr2", "validation", "row 3: label is 2, neither 0 (false) nor 1 (true)"),
        ("nlvr/valid.json", {"identifier": "odd"}, "nlvr2", "validation", "row 3: identifier is 'odd'"),
        ("GQA/testdev.json", {"label": {"yes": "much"}}, "gqa", "validation", "row 3: label is {'yes': 'much'}, no answers"),
    ],
)
def test_a_wrong_row_is_named_in_one_line(file: str, change: dict[str, Any], name: str, split: str, message: str, own: Path) -> None:
    found = json.loads((own / file).read_text())
    found[2] |= change
    write(own / file, found)
    with pytest.raises(DataError) as caught:
        rows_of(own, name, split)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_broken_files_are_named(own: Path) -> None:
    (own / "nlvr/train.json").write_text("[{")
    with pytest.raises(DataError, match=r"nlvr/train.json is not valid JSON"):
        rows_of(own, "nlvr2", "train")
    (own / "GQA/valid.json").unlink()
    with pytest.raises(DataError, match=r"task gqa: .*GQA/valid.json is not there: put the release's file there, or write task.folder"):
        rows_of(own, "gqa", "train")
    for file in (own / "vqa").glob("v2_*"):
        file.unlink()
    with pytest.raises(DataError, match="answers are scored on what people said"):
        rows_of(own, "vqa", "test")


def test_stored_features_are_those_of_the_files_row_by_row(datasets: Path) -> None:
    files = [row.images for row in rows_of(datasets, "nlvr2", "train")]
    images = image_reader(VISION).read(files).of([4, -1])
    assert images.features_BIGF.shape == (2, 2, GRID**2, CHANNELS)
    with h5py.File(files[4][1]) as file:
        expected = file[f"{Path(files[4][1]).stem}/features"][...]
    assert torch.equal(images.features_BIGF[0, 1], torch.from_numpy(expected))
    assert torch.equal(images.features_BIGF[1], image_reader(VISION).read([files[0]]).of([0]).features_BIGF[0])  # a filler row


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, CHANNELS), "row 2: the features in {file} are (4, 8), and those of {first} are (9, 8): store one shape"),
        ((9, 4), "row 2: the features in {file} are (9, 4), and those of"),
        ((9,), "row 2: {file} holds float32 (9,), and should hold finite (positions, channels)"),
    ],
)
def test_features_of_another_shape_are_named_with_their_row(shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    make_features(tmp_path, ["a"])
    make_features(tmp_path, ["b"], shape)
    first, file = (str(tmp_path / f"{name}.h5") for name in "ab")
    with pytest.raises(DataError) as caught:
        image_reader(VISION).read([(first,), (file,)]).of([0, 1])
    assert message.format(file=file, first=first) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_hold_no_features_are_named_with_their_row(tmp_path: Path) -> None:
    make_features(tmp_path, ["a"])
    (tmp_path / "broken.h5").write_bytes(b"no HDF5")
    (tmp_path / "a.h5").rename(tmp_path / "renamed.h5")
    for name, message in (
        ("broken.h5", "row 1: .*broken.h5 is no whole file of features"),
        ("renamed.h5", "row 1: .*renamed.h5 holds no data set renamed/features, but a"),
        ("gone.h5", "row 1: .*gone.h5 is gone: put the image's features there, or remove the row"),
    ):
        with pytest.raises(DataError, match=message):
            image_reader(VISION).read([(str(tmp_path / name),)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_dim": 2048}, "vision.feature_dim is 2048, but hdf5 makes 8 channels: write 8"),
        ({"pooled_grid": 6}, "vision.pooled_grid 6 is finer than the 3 x 3 features of an image"),
    ],
)
def test_features_that_do_not_fit_the_recipe_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_features(tmp_path, ["a"])
    with pytest.raises(LadderError) as caught:
        image_reader(VISION.model_copy(update=changes)).read([(str(tmp_path / "a.h5"),)])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("said", "compared"),
    [
        ("The Red U.S. Car.", "red us car"),
        ("3.5", "3.5"),
        ("two dogs, playing", "2 dogs playing"),
        ("dont know", "don't know"),
        ("t-shirt", "t shirt"),
        ("1,000", "1000"),
        ("none", "0"),
    ],
)
def test_an_answer_is_cleaned_as_the_release_cleans_it(said: str, compared: str) -> None:
    assert cleaned(said) == compared


def test_an_answer_is_worth_a_third_for_each_other_person_who_gave_it() -> None:
    human = ["red"] * 2 + ["dark red"] * 8
    assert accuracy("red", human) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert accuracy("Dark red", human) == 1.0 and accuracy("blue", human) == 0.0
    assert accuracy("A red", ["a red"] * 10) == 0.0  # people's answers keep their articles, as in the release


def task_of(*metrics: str) -> TaskData:
    row = [Row("", "x")]
    return TaskData(name="t", kind="text", labels=None, metrics=metrics, epochs=1, train=row, validation=row, test=None)


def test_consistency_is_told_and_no_part_of_the_score() -> None:
    known = [json.dumps([sentence, truth]) for sentence, truth in (("a", "true"), ("a", "false"), ("b", "true"), ("b", "true"))]
    found = score(task_of("accuracy", "consistency"), ["true", "true", "true", "true"], ["true", "false", "true", "true"], known)
    assert found == {"accuracy": 75.0, "consistency": 50.0, "score": 75.0}


def test_an_answer_to_gqa_is_worth_what_its_label_says() -> None:
    known = [json.dumps({"yes": 1.0}), json.dumps({"left": 0.5, "right": 0.5})]
    assert score(task_of("gqa_accuracy"), ["yes", "left"], ["", ""], known)["score"] == 75.0


def test_captions_are_scored_and_the_name_says_by_which_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [json.dumps(["A man rides a horse.", "a person on a horse"]), json.dumps(["Two dogs play at the beach", "dogs on the beach."])]
    said = ["a man rides a horse", "dogs on the beach"]
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = score(task_of("cider"), said, ["", ""], known)
    assert set(found) == {"cider_plain", "score"} and found["score"] > 200
    assert score(task_of("cider"), said[::-1], ["", ""], known)["score"] < 50


@pytest.mark.skipif(release_measures.tokenizer() != release_measures.JAVA, reason="needs Java")
def test_both_tokenizers_make_the_same_words_of_plain_captions() -> None:
    captions = ["A man isn't riding a well-known horse, at all!", "the dog's bowl; it is empty...", "two dogs"]
    by_java = release_measures._by_java({0: captions})[0]
    assert by_java == [words_of(caption) for caption in captions]
    assert "cider_ptb" in score(task_of("cider"), ["two dogs", "a cat"], ["", ""], [json.dumps([text]) for text in ("two dogs", "a cat")])


def test_a_run_s_score_is_the_mean_of_its_tasks() -> None:
    both = together(["a", "b"], [{"accuracy": 50.0, "score": 50.0}, {"cider_ptb": 100.0, "score": 100.0}])
    assert both == {"a/accuracy": 50.0, "a/score": 50.0, "b/cider_ptb": 100.0, "b/score": 100.0, "score": 75.0}
    assert together(["a"], [{"score": 1.0}]) == {"score": 1.0}


def test_every_metric_of_the_release_is_described() -> None:
    assert set(RELEASE_MEASURES) == {name for task in FOUR for name in ReleaseTask(format=task).of.metrics} - {"accuracy"}  # type: ignore[arg-type]


def test_steps_of_several_tasks_come_in_proportion_and_cover_every_row_once(datasets: Path) -> None:
    recipe = recipe_of(datasets, "training.global_batch_size=6")
    tasks = load_data(recipe).tasks
    order = {"epoch": 1, "seed": 3}
    each = [
        Steps(task.train, global_batches(task.train, size=task.batch_size, **order), micro_batches=2, rank=0, world_size=1)
        for task in tasks
    ]
    steps = MixedSteps(each, **order)
    assert len(steps) == sum(map(len, each)) == 2 + 3 + 6 + 6
    seen: Counter[tuple[int, int]] = Counter()
    for step in steps:
        shapes = {batch.images.features_BIGF.shape[1] for batch in step.micro_batches if batch.images is not None}
        assert len(shapes) == 1 and len(step.micro_batches) == 2, "one task a step"
        seen.update((step.num_rows or 0, index) for batch in step.micro_batches for index in batch.indices if index >= 0)
    assert sum(seen.values()) == 12 + 24 + 12 + 30
    assert [step.num_rows for step in steps] != [step.num_rows for task in each for step in task], "tasks by turns"
    with pytest.raises(LstScaleError, match="the release's file"):
        load_data(recipe_of(datasets / "elsewhere"))

"""`lst-scale predict`: answers as they were scored, on rows as they were trained, in a file that is valid and whole or not there."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from helpers.finished import finished_runs
from lst_scale.cli.main import app
from lst_scale.data.scores import score
from lst_scale.data.tasks import load_task
from lst_scale.errors import ArgumentError, LstScaleError
from lst_scale.inference import predict
from lst_scale.inference.json_lines import LinesFile, as_json, lines_file
from lst_scale.inference.predict import predict_file, refuse_inputs_as_output
from lst_scale.recipe.schema import load_recipe
from lst_scale.training.sessions import Moment, Session

ROWS = [{"word": "cat", "definition": "a feline"}, {"word": "run", "definition": "to move fast on one's feet"}]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return finished_runs(tmp_path_factory.mktemp("predict"))


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Predict and read the output as strict JSON."""

    def strict(word: str) -> Any:
        raise ValueError(word)

    def ask(run: Path, inputs: Path, *overrides: str, **options: Any) -> list[dict[str, Any]]:
        output = tmp_path / "out.jsonl"
        count = predict_file([run], inputs, output, overrides, **options)
        lines = [json.loads(line, parse_constant=strict) for line in output.read_text().splitlines()]
        assert len(lines) == count and sorted(path.name for path in tmp_path.glob("*.partial")) == []
        return lines

    return ask


@pytest.fixture
def no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused must be refused before the backbone is loaded."""
    monkeypatch.setattr(predict, "load_placed", None)


def damaged(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "damaged"))


@pytest.mark.parametrize("name", ["class", "number", "mean", "text", "lora"])
def test_predictions_are_the_answers_that_were_scored(name: str, finished: dict[str, Path], ask: Any) -> None:
    run = finished[name]
    recipe, result = load_recipe(str(run / "recipe.yaml")), json.loads((run / "result.json").read_text())
    task = load_task(recipe)
    lines = ask(run, Path(recipe.task.validation))[: len(task.validation)]  # type: ignore[union-attr]
    answers = [str(line["prediction"]) for line in lines]
    found = score(task, answers, [row.target for row in task.validation])
    assert {key: round(value, 4) for key, value in found.items()} == result["scores"]
    if name in ("class", "lora"):
        assert result["labels"] == ["artifact", "food"] and recipe.task.labels is None  # type: ignore[union-attr]
    if name == "text":
        assert result["longest_target"] > 6, "that of the training rows, not of the short answers that were scored"


def test_probabilities_of_all_labels_sum_to_1_and_the_likeliest_is_the_answer(finished: dict[str, Path], inputs: Path, ask: Any) -> None:
    for line, row in zip(ask(finished["class"], inputs, probabilities=True), ROWS, strict=True):
        assert row.items() <= line.items() and set(line["probabilities"]) == {"artifact", "food"}
        assert math.isclose(sum(line["probabilities"].values()), 1, abs_tol=1e-9)
        assert line["prediction"] == max(line["probabilities"], key=line["probabilities"].__getitem__)
    generated = ask(finished["class"], inputs, "evaluation.method=generation", probabilities=True)
    assert [line["probabilities"] for line in generated] == [
        line["probabilities"] for line in ask(finished["class"], inputs, probabilities=True)
    ]
    assert len(ask(finished["lora"], inputs, probabilities=True)) == 2


def test_a_regression_answers_with_numbers_or_null(
    finished: dict[str, Path], inputs: Path, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(line["prediction"] is None or isinstance(line["prediction"], float) for line in ask(finished["number"], inputs))

    def said(*_: Any, at: Moment) -> Session[list[str]]:
        yield from ()
        return ["0.5", "nan or so"]

    monkeypatch.setattr(predict, "generated", said)
    assert [line["prediction"] for line in ask(finished["number"], inputs)] == [0.5, None]


def test_any_regression_answers_with_the_mean_of_its_numbers_where_it_keeps_them(
    finished: dict[str, Path], inputs: Path, ask: Any, tmp_path: Path
) -> None:
    lines = ask(finished["number"], inputs, "evaluation.method=expectation")
    assert lines == ask(finished["mean"], inputs), "a run that was scored by generation keeps its numbers, too"
    assert all(0 < line["prediction"] < 2 and line["prediction"] not in (0.5, 1.0, 1.5) for line in lines), "means of 0, 0.5 ... 2"
    run = damaged(finished["mean"], tmp_path)
    result = json.loads((run / "result.json").read_text())
    for numbers, said in (
        (None, f"mean of the numbers that a run was trained on, and {re.escape(str(run))} keeps none: write evaluation.method=generation"),
        (["1", "x"], "'numbers' is no list of numbers"),
        (["nan"], "'numbers' is no list of numbers"),
        ([], "'numbers' is no list of numbers"),
    ):
        (run / "result.json").write_text(json.dumps(result | {"numbers": numbers}))
        with pytest.raises(ArgumentError, match=said):
            ask(run, inputs)


def test_several_runs_answer_with_one_mean(finished: dict[str, Path], inputs: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone.jsonl", tmp_path / "together.jsonl"
    predict_file([finished["mean"]], inputs, alone)
    predict_file([finished["mean"], finished["number"]], inputs, together, ["evaluation.method=expectation"])
    assert alone.read_text() == together.read_text(), "both were trained alike"
    other = damaged(finished["mean"], tmp_path)
    result = json.loads((other / "result.json").read_text())
    (other / "result.json").write_text(json.dumps(result | {"numbers": ["1", "2"]}))
    with pytest.raises(ArgumentError, match="damaged was trained on other numbers than"):
        predict_file([finished["mean"], other], inputs, together, ["evaluation.method=expectation"])


def test_the_command_writes_what_the_function_does(finished: dict[str, Path], inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "er" / "out.jsonl"
    words = ["predict", str(finished["text"]), str(inputs), "--output", str(output), "--num-beams", "1", "--batch-size", "1"]
    done = CliRunner().invoke(app, [*words, "--column", "answer"])
    assert done.exit_code == 0, done.output
    assert f"2 predictions in {output}" in done.output
    assert all(isinstance(json.loads(line)["answer"], str) for line in output.read_text().splitlines())


def test_many_rows_keep_their_order(finished: dict[str, Path], tmp_path: Path, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "BATCHES_AT_ONCE", 2)
    path = tmp_path / "many.jsonl"
    path.write_text(
        "".join(json.dumps({"word": "w" * (number % 7 + 1), "definition": str(number), "n": number}) + "\n" for number in range(23))
    )
    assert [line["n"] for line in ask(finished["class"], path, "evaluation.batch_size=3")] == list(range(23))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], {"word": "x", "definition": None}], "row 2 has no definition; fill it in or remove the row"),
        ([{"word": float("nan"), "definition": "x"}], "row 1 has no word"),
        ([ROWS[0], {"definition": "x"}], "row 2 has no field 'word'"),
        ([{"word": ["a"], "definition": "x"}], "row 1: word holds a list"),
        ([{"word": {"a": 1}, "definition": "x"}], "row 1: word holds an object"),
        (
            [ROWS[0], ROWS[1] | {"prediction": "mine"}],
            "row 2 has a field 'prediction' already, where the answer would stand: write --column",
        ),
        ([ROWS[0] | {"note": "\ud800"}], "row 1: field 'note' can't be written as JSON: not UTF-8 text"),
        ([ROWS[0] | {"no\udfffte": 1}], "can't be written as JSON: not UTF-8 text"),
    ],
)
@pytest.mark.usefixtures("no_backbone")
def test_a_row_that_training_would_refuse_is_refused(rows: Any, message: str, finished: dict[str, Path], inputs: Path, ask: Any) -> None:
    inputs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LstScaleError, match=re.escape(message)) as caught:
        ask(finished["class"], inputs)
    assert "\n" not in str(caught.value) and str(inputs) in str(caught.value)
    assert [path.name for path in inputs.parent.iterdir()] == ["in.jsonl"]


def test_a_column_called_probabilities_stands_in_the_way_only_of_probabilities(finished: dict[str, Path], inputs: Path, ask: Any) -> None:
    inputs.write_text(json.dumps(ROWS[0] | {"probabilities": 1}) + "\n")
    assert ask(finished["class"], inputs)[0]["probabilities"] == 1
    with pytest.raises(LstScaleError, match="a field 'probabilities' already, where the answer would stand: rename probabilities"):
        ask(finished["class"], inputs, probabilities=True)


def test_what_json_lacks_is_written_as_text_or_null(finished: dict[str, Path], tmp_path: Path, ask: Any) -> None:
    path = tmp_path / "typed.parquet"
    columns = {
        "word": ["cat"],
        "definition": ["a feline"],
        "when": [datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)],
        "day": [datetime.date(2026, 1, 2)],
        "price": [decimal.Decimal("1.50")],
        "raw": [b"\xff\x00"],
        "share": [float("nan")],
        "size": [float("-inf")],
        "parts": [[{"at": datetime.time(1, 2), "value": float("inf")}]],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    (line,) = ask(finished["class"], path)
    assert line | {"prediction": ""} == {
        "word": "cat",
        "definition": "a feline",
        "when": "2026-01-02T03:04:00+00:00",
        "day": "2026-01-02",
        "price": "1.50",
        "raw": "/wA=",
        "share": None,
        "size": "-Infinity",
        "parts": [{"at": "01:02:00", "value": "Infinity"}],
        "prediction": "",
    }


@pytest.mark.parametrize(
    "value", [{1, 2}, object(), {b"k": 1}, 10**5000, [[[print]]], complex(1, 2)], ids=lambda value: type(value).__name__
)
def test_what_has_no_form_in_json_is_named(value: Any) -> None:
    with pytest.raises(LstScaleError, match=r"f: row 3: field 'odd' can't be written as JSON: .") as caught:
        as_json({"fine": 1, "odd": value}, "f: row 3")
    assert "\n" not in str(caught.value)
    deep: Any = 0
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(LstScaleError, match="nested too deeply"):
        as_json({"odd": deep}, "f: row 3")


@pytest.mark.usefixtures("no_backbone")
def test_a_place_that_can_not_be_written_is_told_before_the_backbone_is_loaded(
    finished: dict[str, Path], inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("folder", "folder is a folder: write the name of a file"),
        ("file/below.jsonl", "below.jsonl can't be written: "),
        ("pipe", "pipe is no plain file: write the name of a file"),
        ("in.jsonl", "in.jsonl is the file of inputs: write another name"),
        ("x" * 300, "can't be written: File name too long"),
        ("a\0b", "can't be written: "),
    ):
        with pytest.raises(ArgumentError, match=re.escape(message)):
            predict_file([finished["class"]], inputs, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "in.jsonl", "pipe"]
    assert (tmp_path / "file").read_text() == "mine" and not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("source", ["in.jsonl", "*.jsonl", "[in]*.jsonl"])
def test_no_file_of_the_inputs_is_the_output(source: str, inputs: Path) -> None:
    with pytest.raises(ArgumentError, match="is the file of inputs"):
        refuse_inputs_as_output(inputs.parent / source, inputs)
    refuse_inputs_as_output(inputs.parent / source, inputs.parent / "out.jsonl")
    refuse_inputs_as_output(Path("hub:somebody/in.jsonl"), inputs)


def test_a_failure_keeps_what_stood_there_and_says_where_the_answers_so_far_are(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out.jsonl"
    with pytest.raises(LstScaleError, match=r"^first$"), lines_file(path):
        raise LstScaleError("first")
    assert not path.parent.exists(), "nothing was written, nothing is left"
    path.parent.mkdir()
    path.write_text("old\n")
    with pytest.raises(LstScaleError, match=r"second; the first 2 lines are in .*/\.out\.jsonl\.partial"), lines_file(path) as file:
        file.write([{"a": 1}, {"a": 2}])
        raise LstScaleError("second")
    assert path.read_text() == "old\n" and path.with_name(".out.jsonl.partial").read_text() == '{"a": 1}\n{"a": 2}\n'
    with lines_file(path) as file:
        with pytest.raises(ArgumentError, match="is being written by another process"), lines_file(path):
            pass
        file.write([{"a": 3}])
        assert path.read_text() == "old\n", "until the end"
        file.finish()
    assert path.read_text() == '{"a": 3}\n' and len(list(path.parent.iterdir())) == 1


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as stream:
        file = LinesFile(stream, tmp_path / "partial", tmp_path / "out")
        with pytest.raises(ArgumentError, match="out can't be written: No space left on device"):
            file.write([{"a": "b" * 100_000}])


def test_a_link_to_a_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with lines_file(tmp_path / "link") as file:
        file.write([{"a": 1}])
        file.finish()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == '{"a": 1}\n'


@pytest.mark.parametrize(
    "override",
    ["data.max_eval_rows=5", "training.epochs=1", "seed=1", "cache.enabled=true", "name=x", "task.labels=[a]", "method.dropout=0.5"],
)
@pytest.mark.usefixtures("no_backbone")
def test_an_override_without_effect_is_refused(override: str, finished: dict[str, Path], inputs: Path, ask: Any) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ArgumentError, match=f"{key} has no effect on predictions: remove it"):
        ask(finished["class"], inputs, override)


@pytest.mark.usefixtures("no_backbone")
def test_ways_of_answering_that_a_run_has_not_are_refused(finished: dict[str, Path], inputs: Path, ask: Any) -> None:
    with pytest.raises(LstScaleError, match=r"--probabilities are those of labels, which .* has not \(kind regression\)"):
        ask(finished["number"], inputs, probabilities=True)
    with pytest.raises(LstScaleError, match=r"likelihood needs labels, which kind regression lacks: write evaluation\.method=expe"):
        ask(finished["number"], inputs, "evaluation.method=likelihood")
    with pytest.raises(LstScaleError, match=r"expectation is the mean of numbers, which kind classification lacks: write .*=likelihood"):
        ask(finished["class"], inputs, "evaluation.method=expectation")
    with pytest.raises(LstScaleError, match="num_beams and max_new_tokens have no effect on method likelihood"):
        ask(finished["class"], inputs, "evaluation.num_beams=3")
    for column in ("", "probabilities"):
        with pytest.raises(LstScaleError, match="is no name for the answer"):
            ask(finished["class"], inputs, column=column, probabilities=True)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '"x"', "\xff", "[" * 100_000]
    + [json.dumps({"labels": value, "longest_target": 3}) for value in (None, [], "ab", [1], ["a", "a"], [""], {"a": 1})]
    + [json.dumps({"labels": ["a"], "longest_target": value}) for value in (0, -1, 1.5, "3", True, 1e30, 10**9, [3])],
    ids=lambda text: text[:40],
)
@pytest.mark.usefixtures("no_backbone")
def test_a_damaged_result_is_one_line(text: str, finished: dict[str, Path], inputs: Path, tmp_path: Path) -> None:
    run = damaged(finished["class"], tmp_path)
    (run / "result.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArgumentError, match=r"damaged/result\.json is damaged: .") as caught:
        predict_file([run], inputs, tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_backbone")
def test_labels_that_the_recipe_lists_otherwise_are_refused(finished: dict[str, Path], inputs: Path, tmp_path: Path) -> None:
    run = damaged(finished["class"], tmp_path)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"task": recipe["task"] | {"labels": ["artifact", "fool"]}}))
    with pytest.raises(ArgumentError, match=r"result\.json is damaged: 'labels' are not those of the run's recipe"):
        predict_file([run], inputs, tmp_path / "out")


@pytest.mark.usefixtures("no_backbone")
def test_a_run_that_is_not_finished_and_one_of_an_earlier_version_are_told_apart(
    finished: dict[str, Path], inputs: Path, tmp_path: Path
) -> None:
    run = damaged(finished["text"], tmp_path)
    result = json.loads((run / "result.json").read_text())
    for changed, message in (
        ({"ensemble_of": ["a", "b"]}, "is an ensemble, which answers by its members: give one of them, and the others by --with"),
        ({"longest_target": None}, "does not say how long its targets were: write evaluation.max_new_tokens=64"),
    ):
        (run / "result.json").write_text(json.dumps(result | changed))
        with pytest.raises(ArgumentError, match=message):
            predict_file([run], inputs, tmp_path / "out")
    (run / "result.json").unlink()
    with pytest.raises(ArgumentError, match=r"is no finished run: it holds no result\.json"):
        predict_file([run], inputs, tmp_path / "out")
    with pytest.raises(ArgumentError, match="is no run: give a folder that holds"):
        predict_file([tmp_path], inputs, tmp_path / "out")


def forget_digests(run: Path) -> None:
    """Make a run one of an earlier version, which kept none."""
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({key: value for key, value in result.items() if key != "saved_sha256"}))


def change_weight(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weights = load_file(path)
    name = max(weights, key=lambda name: weights[name].numel())
    save_file(weights | {name: change(weights[name]).contiguous()}, path)


@pytest.mark.parametrize("name", ["class", "lora"])
@pytest.mark.usefixtures("no_backbone")
def test_one_flipped_bit_in_the_weights_is_found(name: str, finished: dict[str, Path], inputs: Path, tmp_path: Path) -> None:
    run = damaged(finished[name], tmp_path)
    (path,) = [*run.glob("side_network/*.safetensors"), *run.glob("trained/*.safetensors")]
    content = bytearray(path.read_bytes())
    content[-4] ^= 1  # the least of a number's bits
    path.write_bytes(content)
    with pytest.raises(ArgumentError, match=r"\.safetensors is damaged: it is not what the run wrote"):
        predict_file([run], inputs, tmp_path / "out")
    for odd in ({"saved_sha256": 3}, {"saved_sha256": ["a"]}):
        (run / "result.json").write_text(json.dumps(json.loads((run / "result.json").read_text()) | odd))
        with pytest.raises(ArgumentError, match=r"result\.json is damaged"):
            predict_file([run], inputs, tmp_path / "out")


@pytest.mark.parametrize("name", ["class", "lora"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.mul(float("nan")), "not finite"),
        (lambda weight: weight.long(), "int64"),
        (lambda weight: weight[:-1], "does not fit"),
        (lambda weight: weight.half(), "float16"),
    ],
    ids=["nan", "int64", "shape", "half"],
)
def test_weights_that_no_run_writes_are_refused(
    name: str, change: Any, message: str, finished: dict[str, Path], inputs: Path, tmp_path: Path
) -> None:
    run = damaged(finished[name], tmp_path)
    forget_digests(run)
    (path,) = [*run.glob("side_network/*.safetensors"), *run.glob("trained/*.safetensors")]
    change_weight(path, change)
    with pytest.raises(LstScaleError, match=message) as caught:
        predict_file([run], inputs, tmp_path / "out")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["class", "lora"])
@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_weights_cut_off_anywhere_are_refused(name: str, left: int, finished: dict[str, Path], inputs: Path, tmp_path: Path) -> None:
    run = damaged(finished[name], tmp_path)
    (path,) = [*run.glob("side_network/*.safetensors"), *run.glob("trained/*.safetensors")]
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(LstScaleError) as caught:
        predict_file([run], inputs, tmp_path / "out")
    assert "\n" not in str(caught.value) and "damaged" in str(caught.value)


def test_a_side_network_whose_description_was_edited_is_refused(finished: dict[str, Path], inputs: Path, tmp_path: Path) -> None:
    run = damaged(finished["class"], tmp_path)
    path = run / "side_network" / "ladder_config.json"
    record = json.loads(path.read_text())
    for changes in (
        {"normalize_taps": True},
        {"reduction_factor": 2},
        {"side_layers": [0]},
        {"side_layers": 3},
        {"reduction_factor": "4"},
        {"design": ["a"]},
        {"gate": None},
    ):
        path.write_text(json.dumps(record | {"config": record["config"] | changes}))
        with pytest.raises(LstScaleError) as caught:
            predict_file([run], inputs, tmp_path / "out")
        assert "\n" not in str(caught.value) and str(run) in str(caught.value)
    for text in ("[]", "{}", '{"format": 1}', '{"format": 1, "config": 3}'):
        path.write_text(text)
        with pytest.raises(LstScaleError, match=r"ladder_config\.json is damaged"):
            predict_file([run], inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()

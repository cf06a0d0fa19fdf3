"""`predict --resume`: what was answered stays, the rest is answered as if nothing had happened, and nothing else is gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.models import make_t5
from helpers.recipes import recipe_writer
from lst_scale.data.files import load_records
from lst_scale.errors import ArgumentError
from lst_scale.inference import predict
from lst_scale.inference.json_lines import LinesFile
from lst_scale.inference.predict import predict_file
from lst_scale.recipe.schema import load_recipe
from lst_scale.training import evaluation
from lst_scale.training.run import run

VALIDATION = "embedded:wordnet/validation.jsonl"
ROWS, AT_ONCE = 23, 4


class Killed(BaseException):
    """Ends a process wherever it is."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    make = recipe_writer(folder, make_t5(folder / "t5", dropout_rate=0.0))
    short: dict[str, Any] = {"training__max_steps": 2, "training__evaluate_every": 2, "method__side_layers": [2]}
    run(load_recipe(str(make("answers", evaluation={"method": "likelihood", "batch_size": 2}, **short))))
    return next(path for path in (folder / "runs").iterdir() if (path / "result.json").is_file())


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(predict, "BATCHES_AT_ONCE", AT_ONCE // 2)
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in load_records(VALIDATION, "validation")[:ROWS]))
    return path


@pytest.fixture
def killed(finished: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Answer the inputs until so many lines are written, then end in the middle of the next one."""

    def kill(after: int) -> Path:
        write, partial = LinesFile.write, tmp_path / ".out.jsonl.partial"

        def last(self: LinesFile, records: Any) -> None:
            write(self, records)
            if partial.read_text().count("\n") >= after:
                with partial.open("a") as file:
                    file.write('{"word": "cut o')
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(LinesFile, "write", last)
            with pytest.raises(Killed):
                predict_file([finished], inputs, tmp_path / "out.jsonl")
        return partial

    return kill


def test_a_killed_prediction_goes_on_where_it_was_and_ends_the_same(
    finished: Path, inputs: Path, killed: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_file([finished], inputs, tmp_path / "whole.jsonl")
    partial = killed(8)
    partial.write_text("".join(partial.read_text().splitlines(keepends=True)[:6]))  # not where rows are divided
    asked: list[int] = []
    encode = predict.encode_sources
    monkeypatch.setattr(predict, "encode_sources", lambda texts, *rest: asked.append(len(texts)) or encode(texts, *rest))  # type: ignore[func-returns-value]
    said: list[str] = []
    assert predict_file([finished], inputs, tmp_path / "out.jsonl", resume=True, say=said.append) == ROWS
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert sum(asked) == ROWS - 4 and said[0] == "going on after 4 rows"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_with_nothing_to_go_on_with_it_begins(finished: Path, inputs: Path, tmp_path: Path) -> None:
    assert predict_file([finished], inputs, tmp_path / "out.jsonl", resume=True) == ROWS


def test_without_resume_it_begins_again(finished: Path, inputs: Path, killed: Callable[[int], Path], tmp_path: Path) -> None:
    killed(8)
    assert predict_file([finished], inputs, tmp_path / "out.jsonl") == ROWS == (tmp_path / "out.jsonl").read_text().count("\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("inputs", "row 2 of .*in.jsonl is not the one that was answered: leave --resume out to begin again"),
        ("settings", "holds answers that another run or other settings made: repeat the command that began them, or leave --resume out"),
        ("damage", "is damaged at line 1: leave --resume out to begin again"),
        ("unknown maker", "holds answers that another run or other settings made"),
    ],
)
def test_what_was_answered_otherwise_is_not_gone_on_with(
    change: str, message: str, finished: Path, inputs: Path, killed: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = killed(8)
    if change == "inputs":
        lines = inputs.read_text().splitlines(keepends=True)
        inputs.write_text("".join([lines[0], *lines[2:], lines[1]]))
    elif change == "damage":
        partial.write_text("[]\n" + partial.read_text())
    elif change == "unknown maker":
        partial.with_name(f"{partial.name}.made-by").unlink()
    before = partial.read_text()
    monkeypatch.setattr(predict, "load_placed", None)  # nothing is loaded to find it out
    overrides = ["evaluation.batch_size=1"] if change == "settings" else []
    with pytest.raises(ArgumentError, match=message):
        predict_file([finished], inputs, tmp_path / "out.jsonl", overrides, resume=True)
    assert partial.read_text() == before and not (tmp_path / "out.jsonl").exists()


def test_rows_are_not_held_in_memory(finished: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more rows are there at a time than are answered together."""
    most: list[int] = []
    each_row = evaluation.each_row
    monkeypatch.setattr(predict, "each_row", lambda model, split, *rest: most.append(len(split.rows)) or each_row(model, split, *rest))  # type: ignore[func-returns-value]
    monkeypatch.setattr(predict.files, "load_records", None)
    predict_file([finished], inputs, tmp_path / "out.jsonl")
    assert most == [AT_ONCE] * (ROWS // AT_ONCE) + [ROWS % AT_ONCE]

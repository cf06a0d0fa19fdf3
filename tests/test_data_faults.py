"""Data files as people have them: what can be read is read, and anything else is one line that names the file and the row."""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from lst_scale.data.files import load_records
from lst_scale.data.own_rows import file_source
from lst_scale.data.scores import majority_score
from lst_scale.data.tasks import Row, TaskData, load_task
from lst_scale.errors import DataError, RecipeError
from lst_scale.recipe.schema import Recipe, parse_recipe
from lst_scale.recipe.task import FileTask

RECIPE = "{name: t, task: rte, backbone: {checkpoint: x}, method: {name: lst, side_layers: [1, 2]}}"
AS_CSV = [{"x": "a, b", "y": "0"}, {"x": "c", "y": "1"}]


def recipe_of(path: Path | str, **task: Any) -> Recipe:
    fields = {"kind": "classification", "train": str(path), "validation": str(path), "source": ["x"], "target": "y"} | task
    return parse_recipe(RECIPE, "t.yaml", [f"task={json.dumps(fields)}"])


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ('x,y\n"a, b",0\nc,1\n', "utf-8"),
        ('x,y\r\n"a, b",0\r\nc,1\r\n', "utf-8-sig"),
        ("x;y\r\na, b;0\r\nc;1\r\n", "utf-8-sig"),
        ("x\ty\na, b\t0\nc\t1\n", "utf-8"),
        ("sep=;\r\nx;y\r\na, b;0\r\nc;1\r\n", "utf-8-sig"),
        ("SEP=|\nx|y\na, b|0\nc|1\n", "utf-8"),
        ('"x";y\na, b;0\nc;1', "utf-8"),
        ('\n\nx,y\n\n"a, b",0\n\nc,1\n', "utf-8"),
        ('x,y\r"a, b",0\rc,1\r', "utf-8"),
    ],
    ids=["plain", "byte order mark", "semicolons", "tabs", "sep=", "SEP=", "quoted header", "empty lines", "old Mac"],
)
def test_csv_is_read_as_spreadsheets_write_it(text: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode(encoding))
    assert list(load_records(str(path), "train")) == AS_CSV


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
def test_a_compressed_file_is_read_as_what_it_holds(kind: str, ending: str, tmp_path: Path) -> None:

    text = "a,b\n" + "one,ä\n" * 20_000 if kind == ".csv" else '{"a": "one", "b": "ä"}\n' * 20_000
    path = tmp_path / f"rows{kind}{ending}"
    write = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(ending)
    with write(path, "wb") if write else pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(text.encode())
    assert load_records(str(path), "train") == [{"a": "one", "b": "ä"}] * 20_000
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"^task\.train: .*rows"):
        load_records(str(path), "train")


def test_a_header_with_a_semicolon_inside_a_name_is_divided_by_its_commas(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('"x;z",y\na,0\n')
    assert list(load_records(str(path), "train")) == [{"x;z": "a", "y": "0"}]


def test_a_csv_cell_may_be_longer_than_pythons_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.CSV"
    path.write_text(f"x,y\n{'a' * 200_000},0\n")
    assert len(load_records(str(path), "train")[0]["x"]) == 200_000


UNREADABLE: list[tuple[str, bytes, str]] = [
    ("a.csv", "x,y\na,0\n".encode("utf-16"), "is UTF-16 text: in a spreadsheet, save it as 'CSV UTF-8'"),
    ("a.csv", "x,y\na,0\n".encode("utf-16-le"), "is UTF-16 text"),
    ("a.csv", "x,y\na,0\n".encode("utf-16-be"), "is UTF-16 text"),
    ("a.csv", "x,y\n\xe9,0\n".encode("cp1252"), "is not a UTF-8 CSV file (byte 0xe9 can't be read): save it as 'CSV UTF-8'"),
    ("a.csv", b'x,y\n"a,0\n', "is not a UTF-8 CSV file: unexpected end of data in line 2"),
    ("a.csv", b'x,y\nb,1\n"a"b,0\n', "in line 3; quote values that hold quotes"),
    ("a.csv", b"x,y,x\na,0,1\n", "the header names 'x' twice"),
    ("a.csv", b"x;y\na;b;0\n", "row 1 has more values than the header has names; quote values that hold semicolons"),
    ("a.csv", b'"x\ny","\x1b[31m"\na,0\n', "row 1 has no field 'x'. Valid: ?[31m, x?y."),
    ("a.jsonl", '{"x": 1}\n'.encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
    ("a.jsonl", b'{"x": "a", "y": "0"}\n' + b"[" * 100_000, "line 2 is not valid JSON: nested too deeply"),
    ("a.jsonl", b'{"x": ' + b"1" * 5000 + b', "y": "0"}', "line 1 is not valid JSON: Exceeds the limit"),
    ("a.jsonl", b'{"x": "a", "y": "0"}\n{"x" 1}', "line 2 is not valid JSON: Expecting ':' delimiter at character 6"),
    ("a.jsonl", b'{"x": "\xff", "y": "0"}', "line 1 is not valid JSON: not UTF-8 text"),
    ("a.jsonl", b'"x"', "line 1 is not an object"),
    ("a.parquet", b"", "is not a whole parquet file"),
    ("a.parquet", b"PAR1" + b"\0" * 64 + b"PAR1", "is not a whole parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), UNREADABLE, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(UNREADABLE)])
def test_a_file_that_can_not_be_read_is_one_line_that_names_it(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_task(recipe_of(path))
    line = str(caught.value)
    assert str(path) in line and message in line and "\n" not in line and line.isprintable()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 5000 + ".csv", "File name too long"),
        ("{folder}", "is a folder; write the path of a file in it"),
        ("{fifo}", "is no ordinary file; write its rows into one"),
        ("{folder}/none.csv", "is not there; write the path of a file"),
        ("a.tsv", "must end in .csv, .jsonl, .parquet; convert it to one of them"),
        ("hub:/data/train.csv", "names a file: write its path without hub:"),
        ("hub:./train", "names a file: write its path without hub:"),
        ("hub:data/train.jsonl", "names a file: write its path without hub:"),
    ],
)
def test_a_path_that_leads_to_no_file_is_one_line(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "fifo.csv")
    with pytest.raises(DataError) as caught:
        load_records(name.format(folder=tmp_path / "folder.csv", fifo=tmp_path / "fifo.csv"), "train")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_file_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read anything
    with pytest.raises(DataError, match=r"task.train: .*a\.jsonl: Permission denied"):
        load_records(str(path), "train")


ROWS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"x": "a", "y": ""}, {}, "row 2 has an empty y; fill it in or remove the row"),
    ({"x": "a", "y": "  "}, {"kind": "text"}, "row 2 has an empty y; fill it in or remove the row"),
    ({"x": "a", "y": ""}, {"kind": "regression"}, "row 2 has an empty y; fill it in or remove the row"),
    ({"x": "a", "y": None}, {}, "row 2 has no y; fill it in or remove the row"),
    ({"x": float("nan"), "y": "0"}, {}, "row 2 has no x; fill it in or remove the row"),
    ({"x": "a"}, {}, "row 2 has no field 'y'"),
    ({"x": {"a": 1}, "y": "0"}, {}, "row 2: x holds an object; write a text or a number there"),
    ({"x": ["a"], "y": "0"}, {}, "row 2: x holds a list; write a text or a number there"),
    ({"x": "a", "y": ["0"]}, {}, "row 2: y holds a list; write a text or a number there"),
    ({"x": "a\ud800", "y": "0"}, {}, "row 2: x holds half a character (a lone surrogate)"),
    ({"x": "a", "y": "\udfff"}, {"kind": "text"}, "row 2: y holds half a character (a lone surrogate)"),
    ({"x": "a", "y": "nan"}, {"kind": "regression"}, "row 2: y is 'nan', not a number"),
    ({"x": "a", "y": 1e999}, {"kind": "regression"}, "row 2: y is 'inf', not a number"),
    ({"x": "a", "y": "b\nc"}, {"labels": ["0", "d\te"]}, "train: row 2 has the label 'b\\nc'; known: 0, d?e."),
]


@pytest.mark.parametrize(("row", "task", "message"), ROWS, ids=[str(number) for number in range(len(ROWS))])
def test_a_row_that_can_not_be_used_is_one_line_that_names_it(
    row: dict[str, Any], task: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in [{"x": "a", "y": "0"}, row]))
    with pytest.raises(DataError) as caught:
        load_task(recipe_of(path, **task))
    line = str(caught.value)
    assert message in line and "\n" not in line and (str(path) in line or line.startswith("train: "))


@pytest.mark.parametrize(
    ("values", "what"), [([b"abc"], "bytes"), ([{"a": 1}], "an object"), ([[1, 2]], "a list"), ([None], None)], ids=str
)
def test_a_parquet_cell_that_is_no_text_is_refused_by_row(values: list[Any], what: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"x": values, "y": ["0"]}), path)
    with pytest.raises(DataError) as caught:
        load_task(recipe_of(path))
    assert str(caught.value).startswith(f"{path}: row 1: x holds {what};" if what else f"{path}: row 1 has no x;")


def test_parquet_numbers_dates_and_booleans_are_written_as_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    cells = {"d": [datetime.date(2026, 1, 2)], "n": [decimal.Decimal("1.50")], "b": [True], "y": [3]}
    parquet.write_table(pyarrow.table(cells), path)
    task = load_task(recipe_of(path, source=["d", "n", "b"]))
    assert task.train == [Row("d: 2026-01-02 n: 1.50 b: True", "3")]


@pytest.mark.parametrize(
    "field", ["{x!z}", "{x!r}", "{x:d}", "{x:>9999999999}", "{x:{x}}", "{x!r:>9999999999}", "{x.__class__}", "{x[0]}", "{}", "{0}"]
)
def test_a_template_holds_plain_names_only(field: str) -> None:
    with pytest.raises(RecipeError, match="template") as caught:
        recipe_of("a.csv", template=f"{{x}} and {field}")
    assert "\n" not in str(caught.value)


def test_a_template_writes_values_as_they_are_whatever_they_hold() -> None:
    task = FileTask.model_validate(
        {"kind": "text", "train": "-", "validation": "-", "source": ("x", "0"), "target": "y", "template": "{{{x}}} {0}{x}"}
    )
    assert file_source(task, {"x": "{0:>99999}", "0": 1.5}) == "{{0:>99999}} 1.5{0:>99999}"


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"metrics": ["f1"], "labels": ["a", "b"]}, "f1 is of two classes, of which '1' is the positive one"),
    ({"metrics": ["accuracy", "f1"], "labels": ["0", "1", "2"]}, "f1 is of two classes"),
    ({"metrics": ["pearson"], "labels": ["bad", "good"]}, "pearson compares numbers, and labels such as 'bad' are none"),
    ({"metrics": ["spearman"], "labels": ["1", "nan"]}, "spearman compares numbers"),
    ({"metrics": ["matthews"], "labels": ["a"]}, "matthews is 0 for a single label"),
    ({"metrics": ["matthews"], "kind": "text"}, "matthews compares classes, which kind text lacks"),
    ({"metrics": ["f1"], "kind": "regression"}, "f1 compares classes, which kind regression lacks"),
    ({"metrics": ["pearson"], "kind": "text"}, "pearson compares numbers, which kind text lacks"),
    ({"metrics": ["accuracy"], "kind": "regression"}, "accuracy compares texts, and 0.20 is another text than 0.2"),
    ({"metrics": ["rouge_l"], "kind": "regression"}, "rouge_l compares texts"),
    ({"labels": ["a", ""]}, "labels: '' is empty"),
    ({"labels": ["a", "b", "a"]}, "labels: 'a' is there twice"),
    ({"source": ["x", "y"]}, "source holds 'y', which is the target"),
    ({"source": ["x", "x"]}, "source names 'x' twice"),
]


@pytest.mark.parametrize(("task", "message"), MISFITS, ids=[message[:30] for _, message in MISFITS])
def test_what_can_not_be_meant_is_refused_with_the_recipe(task: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_of("a.csv", **task)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "labels", "message"),
    [("f1", "ab", "task.metrics: f1 is of two classes"), ("pearson", "ab", "labels such as 'a' are none"), ("matthews", "aa", "'a' alone")],
)
def test_a_metric_that_does_not_fit_the_labels_of_the_file_is_refused(metric: str, labels: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x,y\n" + "".join(f"t,{label}\n" for label in labels))
    with pytest.raises(DataError) as caught:
        load_task(recipe_of(path, metrics=[metric]))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "task",
    [
        {"metrics": ["f1", "matthews"], "labels": ["0", "1"]},
        {"metrics": ["f1"], "labels": ["no", "1"]},
        {"metrics": ["pearson"], "labels": ["1", "2", "3.5"]},
        {"metrics": ["exact_match", "chrf"], "kind": "text"},
        {"metrics": ["pearson"], "kind": "regression"},
    ],
    ids=str,
)
def test_metrics_that_fit_are_taken(task: dict[str, Any]) -> None:
    assert recipe_of("a.csv", **task)


def test_the_majority_of_many_labels_is_counted_in_one_pass() -> None:
    class Counted(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return str.__eq__(self, other)

    rows = [Row("", Counted(number % 500)) for number in range(2000)]
    task = TaskData(name="t", kind="classification", labels=None, metrics=(), epochs=1, train=rows, validation=rows, test=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lst_scale.data.scores.score", lambda task, predictions, *_: {"said": predictions[0]})
        assert majority_score(task, rows[:1]) == {"said": "0"}
    assert Counted.compared < 10 * len(rows)


def test_the_first_rows_alone_can_be_read(tmp_path: Path) -> None:
    writers: dict[str, Callable[[Path], object]] = {
        "a.csv": lambda path: path.write_text("x,y\na,0\n" * 1 + 'b,1\n"broken'),
        "a.jsonl": lambda path: path.write_text('{"x": "a", "y": "0"}\n{"x": "b", "y": "1"}\nbroken'),
        "a.parquet": lambda path: parquet.write_table(pyarrow.table({"x": ["a", "b", "c"], "y": ["0", "1", "2"]}), path),
    }
    for name, write in writers.items():
        write(tmp_path / name)
        assert list(load_records(str(tmp_path / name), "train", 2)) == [{"x": "a", "y": "0"}, {"x": "b", "y": "1"}]

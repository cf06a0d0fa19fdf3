"""Many rows: read, checked and encoded once a machine, into tables that are mapped."""

from __future__ import annotations

import gzip
import json
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from helpers.tiny import tiny_ladder
from lst_scale.cli.main import app
from lst_scale.data import columns, encode, tables, tasks
from lst_scale.data import rows as rows_module
from lst_scale.data.batches import training_steps
from lst_scale.data.columns import chunk_of
from lst_scale.data.rows import StoredRows
from lst_scale.data.tables import known_table, stored_table
from lst_scale.data.tasks import Row, load_task
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.errors import DataError, LstScaleError, StorageError
from lst_scale.methods.lst import with_keys
from lst_scale.recipe.schema import Recipe, parse_recipe

RECIPE = "{name: t, task: rte, backbone: {checkpoint: x}, method: {name: lst, side_layers: [1, 2]}}"
KIND = {"n": "ids"}


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let ten rows be many, and the cache be empty; return where it is."""
    for module in (columns, rows_module, encode):
        monkeypatch.setattr(module, "CHUNK", 10)
    monkeypatch.setattr(columns.by_chunks, "__defaults__", (10,))
    monkeypatch.setattr(tasks, "LEAST_BYTES", 0)
    monkeypatch.setattr(encode, "AT_ONCE", 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lst_scale" / "rows"


def records(count: int) -> list[dict[str, str]]:
    return [{"x": f"héllo number {number} {'and more ' * (number % 7)}", "y": str(number % 3)} for number in range(count)]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def recipe_of(path: Path | str, *overrides: str, **task: Any) -> Recipe:
    fields = {"kind": "classification", "train": str(path), "validation": str(path), "source": ["x"], "target": "y"} | task
    return parse_recipe(RECIPE, "t.yaml", [f"task={json.dumps(fields)}", *overrides])


def expected(count: int) -> list[Row]:
    return [Row(f"x: {row['x']}", row["y"]) for row in records(count)]


def test_many_rows_are_those_of_a_list_and_give_the_same_batches(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", records(53))
    task = load_task(recipe_of(path))
    assert isinstance(task.train, StoredRows) and list(task.train) == expected(53) and task.labels == ("0", "1", "2")
    tokenizer = load_tokenizer("embedded:tiny-t5")
    for _ in ("written", "mapped"):
        stored, listed = (encode.encode(rows, tokenizer, 12, 2) for rows in (task.train, list(task.train)))
        assert (stored.cut_sources, stored.cut_targets, stored.longest_target) == (listed.cut_sources, listed.cut_targets, 2)
        assert stored.known_digest == stored.digest == listed.digest
        how = {"epoch": 1, "seed": 3, "global_batch_size": 7, "micro_batch_size": 4, "rank": 1, "world_size": 2}
        for one, other in zip(training_steps(stored, **how), training_steps(listed, **how), strict=True):
            assert one.num_target_tokens == other.num_target_tokens
            for mine, its in zip(one.micro_batches, other.micro_batches, strict=True):
                assert mine.indices == its.indices and mine.input_ids_BS.equal(its.input_ids_BS) and mine.labels_BT.equal(its.labels_BT)


@pytest.mark.parametrize("cores", [1, 3])
def test_any_number_of_processes_encodes_to_the_same_table(cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "usable_cores", lambda: cores)
    rows = load_task(recipe_of(write_rows(tmp_path / "a.jsonl", records(87)))).train
    tokenizer = load_tokenizer("embedded:tiny-t5")
    stored, listed = (encode.encode(each, tokenizer, 12, 2) for each in (rows, list(rows)))
    assert isinstance(rows, StoredRows) and stored.digest == listed.digest
    assert (stored.cut_sources, stored.cut_targets) == (listed.cut_sources, listed.cut_targets)


def test_a_killed_encoding_process_is_one_line_and_a_row_that_can_not_be_encoded_is_named_by_any(
    few_are_many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "usable_cores", lambda: 2)
    rows = load_task(recipe_of(write_rows(tmp_path / "a.jsonl", records(87)))).train
    real = encode.Encoding._chunk

    def killed(self: Any, rows: Any, first: int) -> Any:
        if first == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, rows, first)

    monkeypatch.setattr(encode.Encoding, "_chunk", killed)
    before = sorted(few_are_many.iterdir())
    with pytest.raises(StorageError, match=r"^a process that encoded rows was killed, perhaps for want of memory: start again$"):
        encode.encode(rows, load_tokenizer("embedded:tiny-t5"), 12, None)
    assert [path for path in sorted(few_are_many.iterdir()) if not path.name.endswith(".lock")] == [
        path for path in before if not path.name.endswith(".lock")
    ]

    def refused(self: Any, rows: Any, first: int) -> Any:
        raise DataError(f"row {first + 1} can't be encoded")

    monkeypatch.setattr(encode.Encoding, "_chunk", refused)
    with pytest.raises(DataError, match=r"^row 1 can't be encoded$"):
        encode.encode(rows, load_tokenizer("embedded:tiny-t5"), 12, None)


def test_a_table_is_read_through_at_a_start_only_when_somebody_touched_it(
    few_are_many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(write_rows(tmp_path / "a.jsonl", records(30)))
    expected = list(load_task(recipe).train)
    read: list[Path] = []
    real = tables._checksum_of
    monkeypatch.setattr(tables, "_checksum_of", lambda path: read.append(path) or real(path))
    assert list(load_task(recipe).train) == expected and not read
    (rows,) = few_are_many.glob("*/rows.arrow")
    os.utime(rows)
    assert list(load_task(recipe).train) == expected and set(read) == {rows}


def test_a_second_start_reads_neither_the_file_nor_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(write_rows(tmp_path / "a.jsonl", records(30)))
    tokenizer = load_tokenizer("embedded:tiny-t5")
    first = encode.encode(load_task(recipe).train, tokenizer, 12, None)

    def refuse(*_: Any) -> Any:
        raise AssertionError("the rows were read again")

    monkeypatch.setattr("lst_scale.data.files._read_jsonl", refuse)
    monkeypatch.setitem(tasks.files.READERS, ".jsonl", refuse)  # type: ignore[arg-type]
    monkeypatch.setattr(encode.Encoding, "chunks", refuse)
    second = encode.encode(load_task(recipe).train, tokenizer, 12, None)
    assert all(np.array_equal(*pair) for pair in zip(first.input_ids, second.input_ids, strict=True))


def test_digests_of_many_rows_are_made_once_and_are_those_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load_task(recipe_of(write_rows(tmp_path / "a.jsonl", records(33)))).train
    tokenizer = load_tokenizer("embedded:tiny-t5")
    spec = tiny_ladder().backbone.spec
    listed = with_keys(encode.encode(list(rows), tokenizer, 12, None), spec).keys
    split = encode.encode(rows, tokenizer, 12, None)
    assert listed is not None
    for _ in ("made", "mapped"):
        stored = with_keys(split, spec).keys
        assert stored is not None and list(stored) == list(listed) and stored[-1] == listed[-1] and len(stored) == 33
        monkeypatch.setattr("lst_scale.methods.lst._each_key", None)


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", records(30))
    assert len(load_task(recipe_of(path)).train) == 30
    write_rows(path, records(31))
    assert list(load_task(recipe_of(path)).train) == expected(31)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "facts cut", "facts of another kind", "nested facts", "facts as folder"])
def test_a_damaged_table_is_written_again(damage: str, tmp_path: Path, few_are_many: Path) -> None:
    recipe = recipe_of(write_rows(tmp_path / "a.jsonl", records(53)))
    load_task(recipe)
    (folder,) = {path.parent for path in few_are_many.glob("*/rows.arrow")}
    rows, facts = folder / "rows.arrow", folder / "facts.json"
    raw = rows.read_bytes()
    if damage == "cut":
        rows.write_bytes(raw[:-9])
    elif damage == "flip":
        rows.write_bytes(raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :])
    elif damage == "gone":
        rows.unlink()
    elif damage == "facts as folder":
        facts.unlink()
        facts.mkdir()
    else:
        facts.write_text({"facts cut": facts.read_text()[:-3], "facts of another kind": "[1]", "nested facts": "[" * 100_000}[damage])
    assert list(load_task(recipe).train) == expected(53)
    assert rows.read_bytes() == raw and facts.is_file()


def test_several_files_and_compressed_ones_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_rows(tmp_path / "train-1.jsonl.gz", records(25)[12:])
    write_rows(tmp_path / "train-0.jsonl", records(12))
    assert list(load_task(recipe_of(tmp_path / "train-*")).train) == expected(25)
    with pytest.raises(DataError, match="matches no file"):
        load_task(recipe_of(tmp_path / "nothing-*.csv"))


@pytest.mark.parametrize("number", [3, 27])
def test_a_broken_row_in_the_middle_is_named_and_leaves_nothing_behind(number: int, tmp_path: Path, few_are_many: Path) -> None:
    rows = records(40)
    del rows[number - 1]["y"]
    write_rows(tmp_path / "a-0.jsonl", records(13))
    write_rows(tmp_path / "a-1.jsonl", rows)
    with pytest.raises(DataError, match=rf"a-1\.jsonl: row {number} has no field 'y'"):
        load_task(recipe_of(tmp_path / "a-*.jsonl"))
    assert not [path for path in few_are_many.glob("*") if path.suffix != ".lock"]


def test_a_label_that_is_not_known_is_named_with_its_first_row(tmp_path: Path) -> None:
    rows = records(40)
    rows[33]["y"] = rows[35]["y"] = "5"
    with pytest.raises(DataError, match="train: row 34 has the label '5'; known: 0, 1, 2"):
        load_task(recipe_of(write_rows(tmp_path / "a.jsonl", rows), labels=["0", "1", "2"]))


def test_the_first_rows_of_a_table_and_rows_in_another_order_are_tables_too(tmp_path: Path) -> None:
    rows = load_task(recipe_of(write_rows(tmp_path / "a.jsonl", records(40)), "data.max_train_rows=25")).train
    assert isinstance(rows, StoredRows) and list(rows) == expected(25)
    turned = rows.select(np.arange(25)[::-1])
    assert list(turned) == expected(25)[::-1] and len({rows.key, turned.key, turned.table.key}) == 3
    assert list(rows[3:5]) == expected(25)[3:5] and rows[-1] == expected(25)[-1]


def test_one_writes_and_others_wait() -> None:
    written, entered, go_on = [], threading.Event(), threading.Event()

    def fill(write: tables.Write) -> Mapping[str, Any]:
        entered.set()
        assert go_on.wait(60)
        write({"n": chunk_of([[1, 2], [], [3]])})
        written.append(1)
        return {"rows": 3}

    found: list[tables.Table] = []
    threads = [threading.Thread(target=lambda: found.append(stored_table("k", KIND, fill, likely_bytes=1))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert entered.wait(60) and known_table("k", KIND) is None
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3 and written == [1]
    assert [row.tolist() for row in found[0].ids("n")] == [[1, 2], [], [3]] and found[0].facts == {"rows": 3}


def test_what_a_killed_writer_left_is_in_nobodys_way(few_are_many: Path) -> None:
    pid = os.fork()
    if pid == 0:
        stored_table("k", KIND, lambda write: os._exit(9), likely_bytes=1)
    os.waitpid(pid, 0)
    assert (few_are_many / ".k.partial").exists() and known_table("k", KIND) is None

    def fill(write: tables.Write) -> dict[str, Any]:
        write({"n": chunk_of([[7]])})
        return {}

    assert [row.tolist() for row in stored_table("k", KIND, fill, likely_bytes=1).ids("n")] == [[7]]
    assert not (few_are_many / ".k.partial").exists()


def test_a_full_disk_is_one_line_with_the_space_that_is_needed_and_leaves_nothing(few_are_many: Path) -> None:
    with pytest.raises(StorageError, match=r"the rows' table needs about 1000000\.00 GB in .*rows, where .* GB are free"):
        stored_table("k", KIND, lambda write: {}, likely_bytes=10**15)

    def fill(write: tables.Write) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left on device; free space"):
        stored_table("k", KIND, fill, likely_bytes=1)
    assert [path.name for path in few_are_many.iterdir()] == [".k.lock"]


def test_tables_are_listed_and_removed_and_what_is_not_ours_stays(few_are_many: Path, tmp_path: Path) -> None:
    def rows(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["cache", "rows", *arguments])
        return f"error: {done.exception}" if isinstance(done.exception, LstScaleError) else done.output

    assert "no tables of rows in" in rows()
    expected = list(load_task(recipe := recipe_of(write_rows(tmp_path / "a.jsonl", records(30)))).train)
    (table,) = few_are_many.glob("*/rows.arrow")
    (few_are_many / "foreign").mkdir()
    (few_are_many / "foreign" / "facts.json").write_text("{}")
    (table.parent / "thesis.doc").write_text("years")
    assert rows().startswith(f"{table.parent.name}  0.000 GB  ") and rows().count("\n") == 1
    assert rows("--remove", "x") == f"error: 'x' is the beginning of no table: {table.parent.name}, or write all"
    assert rows("--remove", table.parent.name[:6]).startswith("removed ") and not table.exists()
    assert (table.parent / "thesis.doc").exists() and (few_are_many / "foreign" / "facts.json").exists()
    assert list(load_task(recipe).train) == expected


def test_what_a_table_takes_of_memory_is_given_back_and_its_rows_stay() -> None:
    """The system counts the pages that were read until they are given back; 64 MB here."""
    count, length = 10, 1_600_000

    def fill(write: Any) -> dict[str, Any]:
        write({"n": chunk_of([np.full(length, number) for number in range(count)])})
        return {}

    column = stored_table("large", KIND, fill, likely_bytes=0).ids("n")

    def mapped() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("RssFile"))

    column.let_go()
    before = mapped()
    assert [int(row.sum()) for row in column] == [number * length for number in range(count)]
    read = mapped()
    column.let_go()
    assert read - before > 50 and mapped() - before < 10
    assert int(column[3][0]) == 3

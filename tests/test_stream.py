"""Rows of a stream: each read when it is needed, in an order that a step's number alone says, over files that ranks share."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from helpers.runs import assert_same_weights, final_weights, losses
from helpers.training import train
from lst_scale.data.encode import Encoding
from lst_scale.data.stream import Stream
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.errors import DataError, RecipeError
from lst_scale.recipe.schema import load_recipe
from lst_scale.recipe.task import FileTask

LABELS = ("artifact", "person")


def shards(folder: Path, sizes: tuple[int, ...], ending: str = ".parquet") -> str:
    """Write files of so many rows and return their pattern."""
    first = 0
    for number, size in enumerate(sizes):
        rows = [{"text": f"row {row} {'word ' * (row % 5)}", "label": LABELS[row % 2]} for row in range(first, first + size)]
        path = folder / f"rows-{number}{ending}"
        if ending == ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        first += size
    return str(folder / f"rows-*{ending}")


def stream(pattern: str, *, rank: int = 0, world_size: int = 1, **changes: Any) -> Stream:
    task = FileTask(
        kind="classification", train=pattern, validation=pattern, source=("text",), target="label", labels=LABELS, streaming=True
    )
    encoding = Encoding(tokenizer=load_tokenizer("embedded:tiny-t5"), max_source_length=16)
    options = {"steps": 30, "global_batch_size": 4, "micro_batches": 2, "window": 12, "seed": 0} | changes
    return Stream(task, encoding, rank=rank, world_size=world_size, **options)


def texts(step: Any) -> list[tuple[int, ...]]:
    """Return the token ids of a step's rows."""
    rows = (row for batch in step.micro_batches for row in zip(batch.input_ids_BS.tolist(), batch.attention_mask_BS.tolist(), strict=True))
    return [tuple(token for token, there in zip(*row, strict=True) if there) for row in rows]


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_row_comes_once_before_any_comes_again(ending: str, world_size: int, tmp_path: Path) -> None:
    pattern = shards(tmp_path, (7, 17, 29, 19), ending)  # 72 rows; of two ranks each has 36
    seen: Counter[tuple[int, ...]] = Counter()
    for rank in range(world_size):
        steps = stream(pattern, rank=rank, world_size=world_size)
        for number in range(18):
            seen.update(texts(steps[number]))
    assert len(seen) == 72 and set(seen.values()) == {1}


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_a_step_is_the_same_whatever_came_before(ending: str, tmp_path: Path) -> None:
    pattern = shards(tmp_path, (7, 3, 11), ending)
    walked = stream(pattern)
    one_by_one = [texts(walked[number]) for number in range(30)]  # nearly six times through 21 rows
    assert len({tuple(step) for step in one_by_one}) > 20
    for number in (29, 0, 17, 3):
        assert texts(stream(pattern)[number]) == one_by_one[number]
    assert [texts(stream(pattern, seed=1)[number]) for number in range(3)] != one_by_one[:3]


def test_what_a_stream_can_not_be_read_with_is_one_line(tmp_path: Path) -> None:
    pattern = shards(tmp_path, (8, 8))
    with pytest.raises(DataError, match="is 2 files, too few for 3 processes"):
        stream(pattern, world_size=3)
    with pytest.raises(DataError, match="global_batch_size 3 can't be divided among 2 processes"):
        stream(pattern, world_size=2, global_batch_size=3)
    odd = shards(tmp_path, (8, 8), ".jsonl")
    with (tmp_path / "rows-1.jsonl").open("a") as file:
        file.write('{"text": "one", "label": "perso"}\n')
    broken = stream(odd)
    with pytest.raises(DataError, match=r"rows-1\.jsonl: row 9 has the label 'perso'; known: artifact, person"):
        [broken[number] for number in range(7)]


def recipe(write: Callable[..., Path], folder: Path, name: str, pattern: str, **changes: Any) -> Path:
    rows = {"task__train": pattern, "task__source": ["text"], "task__target": "label", "task__labels": list(LABELS)}
    rows |= {"task__streaming": True, "task__validation": str(folder / "rows-0.parquet"), "data__max_train_rows": None}
    rows |= {"training__epochs": None, "training__max_steps": 12, "data__shuffle_buffer": 24, "evaluation__method": "likelihood"}
    return write(name, **(rows | changes))


def test_a_recipe_says_at_once_what_a_stream_needs_and_can_not_go_with(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"training__max_steps": None, "task__labels": None, "cache__enabled": True, "training__epochs": 2}
    with pytest.raises(RecipeError) as told:
        load_recipe(str(recipe(write_recipe, tmp_path, "wrong", shards(tmp_path, (8,)), **changes)))
    for needed in ("write training.max_steps", "write task.labels", "remove cache.enabled", "remove training.epochs"):
        assert needed in str(told.value)


@pytest.mark.slow
def test_two_ranks_train_on_a_stream_and_resume_bit_for_bit(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    pattern = shards(tmp_path, (31, 17, 40, 29))
    common: dict[str, Any] = {"training__save_every_steps": 5, "training__keep_checkpoints": 9, "method__dropout": 0.1}
    whole, cut = (recipe(write_recipe, tmp_path, name, pattern, **common) for name in ("whole", "cut"))
    train(whole, cut, processes=2)
    folder, other = (tmp_path / "runs" / f"{name}-kind-seed0" for name in ("whole", "cut"))
    for checkpoint in sorted((other / "checkpoints").iterdir())[1:]:  # back to the first
        shutil.rmtree(checkpoint)
    train("--resume", cut, processes=2)
    assert_same_weights(other, final_weights(folder))
    assert losses(other) == losses(folder) and len(losses(folder)) == 12
    with pytest.raises(AssertionError, match="processes was 2, is 1"):
        train("--resume", cut)

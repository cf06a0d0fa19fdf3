"""What every step is made of, bit for bit, as it was when rows were Python lists: the digests were recorded then."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable
from typing import Any

import pytest

from lst_scale.data.ahead import Ahead
from lst_scale.data.batches import Batch, Step, evaluation_batches, training_steps
from lst_scale.data.encode import EncodedSplit, encode
from lst_scale.data.tasks import load_task
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.errors import DataError
from lst_scale.recipe.schema import parse_recipe

RECIPE = "{name: t, task: rte, backbone: {checkpoint: x}, method: {name: lst, side_layers: [1, 2]}}"
KINDS = {
    "classification": {"kind": "classification", "source": ["word", "definition"], "target": "kind"},
    "text": {"kind": "text", "source": ["definition"], "target": "word", "template": "what is {definition} ?"},
}


def encoded(kind: str, rows: int, max_target_length: int | None = None) -> EncodedSplit:
    files = {split: f"embedded:wordnet/{split}.jsonl" for split in ("train", "validation")}
    overrides = [f"task={json.dumps(files | KINDS[kind])}", f"data.max_train_rows={rows}"]
    task = load_task(parse_recipe(RECIPE, "t.yaml", overrides))
    return encode(task.train, load_tokenizer("embedded:tiny-t5"), 24, max_target_length, task.target_prefix)


def digest_of(batches: Iterable[Batch]) -> str:
    found = hashlib.blake2b(digest_size=10)
    for batch in batches:
        found.update(repr(batch.indices).encode())
        for tensor in (batch.input_ids_BS, batch.attention_mask_BS, batch.labels_BT):
            found.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
            found.update(bytes(tensor.contiguous().numpy().data))
    return found.hexdigest()


def digest_of_steps(steps: Iterable[Step]) -> str:
    found = hashlib.blake2b(digest_size=10)
    for step in steps:
        found.update(f"{step.num_target_tokens} {digest_of(step.micro_batches)}".encode())
    return found.hexdigest()


def digest_of_ranks(split: EncodedSplit, world_size: int, *, since: int = 0, **how: Any) -> str:
    ranks = [training_steps(split, **how, rank=rank, world_size=world_size) for rank in range(world_size)]
    return digest_of_steps(steps[number] for steps in ranks for number in range(since, len(steps)))


RECORDED = {
    "plain": "bd45a64434840fda3d50",
    "several pools of like length": "4f044ad8ddec8e928735",
    "two ranks' shares, with fillers": "2fb4a4c8dec213aadff8",
    "gone on with on three ranks in the second epoch": "45c9cc7ab5b74e5bdb79",
    "free text with cut targets": "b9aec5a6dc6cb2dcc725",
}


@pytest.mark.parametrize("setting", RECORDED)
def test_every_step_is_made_of_the_rows_and_the_padding_that_lists_gave(setting: str) -> None:
    common: dict[str, Any] = {"epoch": 0, "seed": 3, "global_batch_size": 16, "micro_batch_size": 16}
    found = {
        "plain": lambda: digest_of_ranks(encoded("classification", 300), 1, **common),
        "several pools of like length": lambda: digest_of_ranks(
            encoded("classification", 1001), 1, **common | {"global_batch_size": 8, "micro_batch_size": 3}
        ),
        "two ranks' shares, with fillers": lambda: digest_of_ranks(
            encoded("classification", 331), 2, **common | {"global_batch_size": 7, "micro_batch_size": 2}
        ),
        "gone on with on three ranks in the second epoch": lambda: digest_of_ranks(
            encoded("classification", 331), 3, since=17, **common | {"epoch": 1, "micro_batch_size": 4}
        ),
        "free text with cut targets": lambda: digest_of_ranks(encoded("text", 700, 3), 1, **common | {"seed": 2**31}),
    }
    assert found[setting]() == RECORDED[setting]


EVALUATED = ["f0cd1f5161d6dc67e8c0", "ca9dfad4b1239da95080"]


def test_rows_are_evaluated_in_the_order_and_the_padding_that_lists_gave() -> None:
    split = encoded("text", 331)
    assert [digest_of(evaluation_batches(split, batch_size=16, rank=rank, world_size=2, equally_many=True)) for rank in (0, 1)] == EVALUATED


def test_a_step_is_made_before_it_is_asked_for_and_what_fails_in_the_thread_is_raised_where_it_is_asked_for() -> None:
    made: dict[int, threading.Event] = {number: threading.Event() for number in range(4)}

    def make(number: int) -> int:
        made[number].set()
        if number == 2:
            raise DataError("row 2")
        return number * 10

    steps = Ahead(make, 4)
    assert steps[0] == 0 and made[1].wait(60) and not made[2].is_set()
    assert steps[1] == 10
    with pytest.raises(DataError, match="row 2"):
        steps[2]
    assert steps[3] == 30

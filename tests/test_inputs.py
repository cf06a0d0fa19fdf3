"""By what a cache knows a row: its token ids alone, hashed once, where they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.inputs import inputs_of
from helpers.tiny import tiny_ladder
from lst_scale.data.batches import FILLER, Batch, collate
from lst_scale.data.columns import Ids
from lst_scale.data.encode import EncodedSplit
from lst_scale.data.tasks import Row
from lst_scale.inputs import batch as module
from lst_scale.methods.lst import inputs_of as of_batch
from lst_scale.methods.lst import with_keys

SOURCES = ["359c909618f9b85d827914fe3a0f50a3", "03f6b489f717338dd504311f6b8beb2f"]  # as the first caches on disk have them
TARGETS = ["b05e314be40bfaa28d1ff5ba8c8e938e", "fd743d2236aebb0ec2b17998acf24b49"]


def padded(more: int) -> Batch:
    """Return rows of the sources 5 6 1 and 4 1 and the labels 7 8 1 and 9 1, padded to 3 tokens and some more."""
    rows = {"input_ids_BS": [[5, 6, 1], [4, 1, 0]], "attention_mask_BS": [[1, 1, 1], [1, 1, 0]], "labels_BT": [[7, 8, 1], [9, 1, -100]]}
    fill = {"input_ids_BS": 0, "attention_mask_BS": 0, "labels_BT": -100}
    tensors = {name: torch.nn.functional.pad(torch.tensor(row), (0, more), value=fill[name]) for name, row in rows.items()}
    return Batch(indices=(0, 1), target_lengths=(3, 2), **tensors)


@pytest.mark.parametrize("more", [0, 4])
def test_a_row_has_the_name_that_it_has_had_whatever_its_batch_is_padded_to(more: int) -> None:
    keys = of_batch(padded(more), tiny_ladder().spec).keys
    assert ([key.hex() for key in keys.sources], [key.hex() for key in keys.targets]) == (SOURCES, TARGETS)
    assert (keys.source_lengths, keys.target_lengths) == ((3, 2), (3, 2))


def test_a_label_that_is_scored_has_the_name_of_the_same_label_trained_on() -> None:
    inputs = of_batch(padded(2), tiny_ladder().spec)
    assert inputs.with_target(torch.tensor([0, 7, 8])).keys.targets[0].hex() == TARGETS[0]
    assert inputs.with_target(torch.tensor([0, 9])).keys.targets[1].hex() == TARGETS[1]


def test_ids_are_hashed_once_and_where_they_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    here = of_batch(padded(0), tiny_ladder().spec)
    hashed: list[Tensor] = []
    make = module.source_digest
    monkeypatch.setattr(module, "source_digest", lambda ids: hashed.append(ids) or make(ids))  # type: ignore[func-returns-value]
    there = here.to(torch.device("meta"))  # from which no id could come back
    assert there.keys is here.keys and there.to(torch.device("meta")).keys is here.keys and len(hashed) == 2
    assert there.with_target(torch.tensor([0, 9])).keys.sources == here.keys.sources


def test_left_padding_is_no_part_of_a_source() -> None:
    left = inputs_of(torch.tensor([[0, 0, 4, 1]]), torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 9]]))
    assert left.keys.sources[0].hex() == SOURCES[1] and left.keys.targets[0].hex() == TARGETS[1]


def test_rows_are_hashed_once_when_they_are_encoded_and_their_batches_carry_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sources, labels = [[4, 1], [5, 6, 1], [9, 9, 9, 1]], [[9, 1], [7, 8, 1], [3, 1]]
    split = EncodedSplit(rows=[Row("", "")] * 3, input_ids=Ids.of(sources), labels=Ids.of(labels), pad_token_id=0)
    spec, rows = tiny_ladder().spec, [1, FILLER, 0]
    here, label = of_batch(collate(split, rows), spec), torch.tensor([0, 7, 8])
    expected, expected_label = here.keys, here.with_target(label).keys
    named = with_keys(split, spec)
    monkeypatch.setattr(module, "source_digest", lambda ids: pytest.fail("a source was hashed again"))
    there = of_batch(collate(named, rows), spec).to(torch.device("meta"))
    assert there.keys.sources[0].hex() == SOURCES[0] and there.keys.targets[0].hex() == TARGETS[0]
    assert there.with_target(label).keys.targets[0].hex() == TARGETS[0]
    assert there.keys == expected and there.with_target(label).keys == expected_label
    assert [key.source.hex() for key in named.keys or ()][:2] == SOURCES[::-1] and named.keys is not None and len(named.keys) == 3

"""Taps that are read while another batch trains are those that would be read then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.cached import REQUEST, batches, opened
from helpers.recipes import recipe_writer
from lst_scale.backbone.taps import Taps
from lst_scale.data.encode import encode
from lst_scale.data.tasks import load_task
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.recipe.schema import load_recipe
from lst_scale.system import distributed
from lst_scale.training.loop import Trainer, make_plan


def assert_equal(found: Taps, expected: Taps) -> None:
    for mine, theirs in ((found.source, expected.source), (found.target, expected.target)):
        assert mine.layers == theirs.layers
        for one, other in zip(mine.tensors, theirs.tensors, strict=True):
            assert torch.equal(one, other)
    assert found.final_BTD is not None and expected.final_BTD is not None
    assert torch.equal(found.final_BTD, expected.final_BTD)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_what_was_read_ahead_is_what_is_read_when_asked_for(dtype: str, tiny_t5_dir: Path, tmp_path: Path) -> None:
    writer, asked = opened(tiny_t5_dir, tmp_path, dtype), batches(4)
    for inputs in asked:
        writer(inputs, REQUEST)
    direct, ahead = opened(tiny_t5_dir, tmp_path, dtype), opened(tiny_t5_dir, tmp_path, dtype)
    expected = [direct(inputs, REQUEST) for inputs in asked]
    for number, inputs in enumerate(asked):
        assert_equal(ahead(inputs, REQUEST), expected[number])
        ahead.prefetch(asked[(number + 1) % 4])
        ahead.prefetch(asked[(number + 1) % 4])  # being told twice reads once
        if number == 1:  # an evaluation in between asks for another batch, and the one read ahead is kept
            assert_equal(ahead(asked[0], REQUEST), expected[0])
    assert ahead.rows_read == 5 * 3 and ahead.rows_run == 0 and not ahead.is_loaded


def test_what_was_not_there_when_read_ahead_is_run_and_then_read(tiny_t5_dir: Path, tmp_path: Path) -> None:
    backbone, (inputs,) = opened(tiny_t5_dir, tmp_path, "fp32"), batches(1)
    backbone.prefetch(inputs)
    first = backbone(inputs, REQUEST)
    backbone.prefetch(inputs)
    second = backbone(inputs, REQUEST)
    assert (backbone.rows_run, backbone.rows_read) == (3, 3)
    lengths = inputs.source_mask_BS.sum(1).tolist()
    for one, other in zip(first.source.tensors, second.source.tensors, strict=True):
        for row, length in enumerate(lengths):  # what the backbone makes of padding is not stored
            assert torch.equal(one[row, :length], other[row, :length]) and not other[row, length:].any()


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damage_met_when_reading_ahead_is_named_once_and_made_again(damage: str, tiny_t5_dir: Path, tmp_path: Path) -> None:
    writer, (inputs,) = opened(tiny_t5_dir, tmp_path, "fp32"), batches(1)
    expected = writer(inputs, REQUEST)
    (data,) = writer.cache.folder.glob("*.taps")
    backbone = opened(tiny_t5_dir, tmp_path, "fp32")  # it has seen the whole file
    raw = bytearray(data.read_bytes())
    raw[-100] ^= 1
    data.write_bytes(raw if damage == "flip" else raw[:-100])
    backbone.prefetch(inputs)
    assert_equal(backbone(inputs, REQUEST), expected)
    assert backbone.rows_run == 3 and len(backbone.cache.damaged) == 1 and str(data) in backbone.cache.damaged[0]
    backbone.prefetch(inputs)
    backbone(inputs, REQUEST)
    assert backbone.rows_read == 3 and len(backbone.cache.damaged) == 1


def test_what_fails_in_the_reading_thread_is_raised_where_the_batch_is_asked_for(
    tiny_t5_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, (inputs,) = opened(tiny_t5_dir, tmp_path, "fp32"), batches(1)
    backbone(inputs, REQUEST)

    def fail(*_: Any) -> bool:
        raise MemoryError("no room for a batch")

    monkeypatch.setattr(backbone.cache, "read_into", fail)
    backbone.prefetch(inputs)
    with pytest.raises(MemoryError, match="no room for a batch"):
        backbone(inputs, REQUEST)


def test_a_session_knows_the_next_micro_batch_across_steps_and_epochs(tiny_t5_dir: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_writer(tmp_path, tiny_t5_dir)("known")))  # 22 rows, batches of 6 in micro-batches of 2, 2 epochs
    task = load_task(recipe)
    split = encode(task.train, load_tokenizer(str(tiny_t5_dir), None), 24, None, task.target_prefix)
    plan = make_plan(recipe, [(22, 6)], 2, 1)
    unused: Any = None
    trainer = Trainer(
        world=distributed.connect(),
        recipe=recipe,
        plan=plan,
        trainee=unused,
        engine=unused,
        train=[(split, 6)],
        evaluate=unused,
        save_best=unused,
        logger=unused,
        folder=tmp_path,
        identity={},
    )
    asked = [(step, index) for step in range(plan.total_steps) for index in range(len(trainer._steps[step].micro_batches))]
    following = [trainer._after(step, index) for step, index in asked]
    expected = [trainer._steps[step].micro_batches[index].indices for step, index in asked]
    assert len(asked) == 24 and following[-1] is None
    assert [batch.indices for batch in following[:-1] if batch is not None] == expected[1:]

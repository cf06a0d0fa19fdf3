"""Runs side by side ask the frozen backbone once for what they have in common, while they train and while they answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import recipe_writer
from test_prefetch import REQUEST, batches, opened

from lst_scale import distributed
from lst_scale.backbone.local import LocalBackbone
from lst_scale.data.batches import Batch
from lst_scale.errors import DataError, LstScaleError, TrainingError
from lst_scale.preemption import Interrupted
from lst_scale.recipe import load_recipe
from lst_scale.run import run
from lst_scale.training import sessions
from lst_scale.training.sessions import CLOSING, EVALUATION, TRAINING, Answer, Ask, Session, SomeFailed, fit_together, timed


def batch_of(*rows: int) -> Batch:
    nothing = torch.zeros(len(rows), 1, dtype=torch.long)
    return Batch(input_ids_BS=nothing, attention_mask_BS=nothing, labels_BT=nothing, indices=rows)


def asking(*asks: tuple[tuple[int, int, int], tuple[int, ...] | None]) -> Session[list[Any]]:
    """A session that asks and returns what it was told."""
    told = []
    for at, rows in asks:
        answer = yield Ask(at=at, batch=None if rows is None else batch_of(*rows))
        told.append(answer.prepared)
    return told


def test_what_several_ask_for_is_made_once_and_each_way_by_its_own_part() -> None:
    made: list[tuple[str, tuple[int, ...]]] = []

    def part(name: str) -> Any:
        def make(batch: Batch) -> str:
            made.append((name, batch.indices))
            return f"{name} {batch.indices}"

        return make

    both = [((0, TRAINING, 0), (1, 2)), ((1, EVALUATION, 0), (7,)), ((1, EVALUATION, 1), None)]
    early = asking(*both, ((1, CLOSING, 0), (8, 9)))  # ends while the other trains on
    late = asking(*both, ((1, TRAINING, 0), (3, 4)), ((2, EVALUATION, 0), (7,)), ((2, CLOSING, 0), (8, 9)))
    first, second = fit_together([early, late], part("all of"), part("source of"))
    assert first == ["all of (1, 2)", "source of (7,)", None, "source of (8, 9)"]
    assert second == ["all of (1, 2)", "source of (7,)", None, "all of (3, 4)", "source of (7,)", "source of (8, 9)"]
    assert made == [
        ("all of", (1, 2)),
        ("source of", (7,)),
        ("all of", (3, 4)),
        ("source of", (8, 9)),  # of the one that ends early: nobody waits for it
        ("source of", (7,)),
        ("source of", (8, 9)),
    ]


def test_a_session_that_waits_for_others_does_not_count_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(sessions.time, "perf_counter", lambda: now[0])

    def session() -> Session[str]:
        now[0] += 1.0
        yield Ask(at=(0, EVALUATION, 0), batch=None)
        now[0] += 2.0
        return "scores"

    clocked = timed(session())
    next(clocked)
    now[0] += 100.0  # others
    with pytest.raises(StopIteration) as end:
        clocked.send(Answer(prepared=None, seconds=4.0))
    assert end.value.value == ("scores", 1.0 + 4.0 + 2.0)


def test_an_interruption_reaches_all_and_what_they_had_open_is_closed() -> None:
    left: list[str] = []

    def session(name: str) -> Session[None]:
        try:
            yield Ask(at=(0, EVALUATION, 0), batch=None)
            if name == "second":
                raise Interrupted(15)
            yield Ask(at=(0, EVALUATION, 1), batch=None)
        finally:
            left.append(name)

    def outer(name: str) -> Session[None]:
        yield from timed(session(name))

    with pytest.raises(Interrupted):
        fit_together([outer(name) for name in ("first", "second", "third")], batch_of, batch_of)
    assert sorted(left) == ["first", "second", "third"]


def test_one_that_fails_on_all_ranks_alike_fails_alone_and_any_other_failure_ends_all() -> None:
    def failing(error: LstScaleError) -> Session[None]:
        yield Ask(at=(0, TRAINING, 0), batch=batch_of(1))
        raise error

    def whole(batch: Batch) -> str:
        return f"{batch.indices}"

    asks = (((0, TRAINING, 0), (1,)), ((1, TRAINING, 0), (2,)))
    known = distributed.same_everywhere(TrainingError("not finite"))
    with pytest.raises(SomeFailed) as caught:
        fit_together([asking(*asks), failing(known), asking(*asks)], whole, whole)
    assert caught.value.failures == {1: known}
    assert caught.value.finished == {0: ["(1,)", "(2,)"], 2: ["(1,)", "(2,)"]}
    for sessions_of, error in (([asking(*asks)], DataError("on this rank alone")), ([], known)):
        with pytest.raises(type(error), match=str(error)):
            fit_together([*sessions_of, failing(error)], whole, whole)


def test_sessions_that_ask_for_different_batches_are_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="different batches"):
        fit_together([asking(((0, TRAINING, 0), (1,))), asking(((0, TRAINING, 0), (2,)))], batch_of, batch_of)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of rows of each call of the backbone's encoder."""
    calls: list[int] = []
    encode = LocalBackbone.encode

    def counted(self: LocalBackbone, input_ids_BS: Any, *rest: Any) -> Any:
        calls.append(len(input_ids_BS))
        return encode(self, input_ids_BS, *rest)

    monkeypatch.setattr(LocalBackbone, "encode", counted)
    yield calls


@pytest.mark.parametrize("changes", [{}, {"evaluation__method": "likelihood"}], ids=["generation", "likelihood"])
def test_members_answer_on_one_pass_too(changes: dict[str, Any], tiny_t5_dir: Path, tmp_path: Path, encoded: list[int]) -> None:
    def rows_encoded(members: list[str]) -> int:
        encoded.clear()
        folder = tmp_path / str(len(members))
        folder.mkdir()
        write = recipe_writer(folder, tiny_t5_dir)
        assert len(run(load_recipe(str(write("answers", members=members, data__shuffle_seed=0, **changes))))) == len(members)
        return sum(encoded)

    assert rows_encoded(["seed=0", "seed=1", "seed=2"]) == rows_encoded(["seed=0"]) > 0


def test_the_encoder_runs_once_for_all_labels_and_reads_once(tiny_t5_dir: Path, tmp_path: Path, encoded: list[int]) -> None:
    writer, ((ids, mask, first), (_, _, second), (_, _, third)) = opened(tiny_t5_dir, tmp_path, "fp32"), batches(3)
    targets = [first, second, third]
    expected = [writer.live(ids, mask, target, REQUEST) for target in targets]
    encoded.clear()
    made = list(writer.of_each(ids, mask, targets, REQUEST))
    assert encoded == [3] and (writer.rows_run, writer.rows_read) == (9, 0)
    reader, reads = opened(tiny_t5_dir, tmp_path, "fp32"), []
    read_into = reader.cache.read_into
    reader.cache.read_into = lambda digest, out: reads.append(digest) or read_into(digest, out)  # type: ignore[method-assign,func-returns-value]
    read = list(reader.of_each(ids, mask, targets, REQUEST))
    assert not reader.is_loaded and (reader.rows_run, reader.rows_read) == (0, 9)
    assert len(reads) == len(set(reads)) == 3 + 9  # each row's source once, and three targets of each
    for one, again, live in zip(made, read, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.encoder.tensors, live.encoder.tensors, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one.decoder.tensors, live.decoder.tensors, strict=True))
        for row, length in enumerate((4, 2, 3)):
            for a, b in zip(again.decoder.tensors, live.decoder.tensors, strict=True):
                assert torch.equal(a[row, : length - 1], b[row, : length - 1])

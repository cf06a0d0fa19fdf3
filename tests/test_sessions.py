"""Runs side by side ask the frozen backbone once for what they have in common, while they train and while they answer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.cached import REQUEST, batches, opened
from helpers.recipes import recipe_writer
from lst_scale.backbone.cache.claim import Claim
from lst_scale.backbone.cache.store import TapCache
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.data.batches import Batch
from lst_scale.errors import DataError, LstScaleError, TrainingError
from lst_scale.recipe.schema import load_recipe
from lst_scale.system import distributed
from lst_scale.system.preemption import Interrupted
from lst_scale.training import sessions
from lst_scale.training.run import run
from lst_scale.training.sessions import (
    CLOSING,
    EVALUATION,
    TRAINING,
    BackboneRequest,
    BackboneResult,
    Moment,
    Session,
    SomeFailed,
    Want,
    fit_together,
    run_alone,
    timed,
)


def batch_of(*rows: int) -> Batch:
    nothing = torch.zeros(len(rows), 1, dtype=torch.long)
    return Batch(input_ids_BS=nothing, attention_mask_BS=nothing, labels_BT=nothing, indices=rows)


WANTED = {TRAINING: Want.ALL, EVALUATION: Want.SOURCE, CLOSING: Want.TARGET}


def asking(*asks: tuple[tuple[int, ...], tuple[int, ...] | None]) -> Session[list[Any]]:
    """A session that asks and returns what it was told."""
    told = []
    for at, rows in asks:
        batch = None if rows is None else batch_of(*rows)
        want = WANTED[at[1]]
        answer = yield BackboneRequest(at=Moment(*at), batch=batch, want=want, targets=((4,), (5,), (6,)) if want is Want.TARGET else ())
        told.append(answer.prepared)
    return told


class Recorded:
    """Passes that say what was made of what, and remember it."""

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def all_of(self, batch: Batch) -> str:
        self.made.append(("all of", batch.indices))
        return f"all of {batch.indices}"

    def source_of(self, batch: Batch) -> str:
        self.made.append(("source of", batch.indices))
        return f"source of {batch.indices}"

    def each_target(self, batch: Batch, targets: Sequence[Sequence[int]]) -> Iterator[str]:
        self.made.append(("targets of", batch.indices))
        for target in targets:
            yield f"{target} of {batch.indices}"

    def prefetch(self, following: Callable[[], Batch | None]) -> None:
        pass


def test_what_several_ask_for_is_made_once_and_as_each_wants_it() -> None:
    both = [((0, TRAINING, 0), (1, 2)), ((1, EVALUATION, 0), (7,)), ((1, EVALUATION, 1), None)]
    early = asking(*both, ((1, CLOSING, 0, 0), (8, 9)), ((1, CLOSING, 0, 1), (8, 9)))  # ends while the other trains on
    closing = [((2, CLOSING, 0, target), (8, 9)) for target in range(3)]
    late = asking(*both, ((1, TRAINING, 0), (3, 4)), ((2, EVALUATION, 0), (7,)), *closing)
    passes = Recorded()
    first, second = fit_together([early, late], passes)
    assert first == ["all of (1, 2)", "source of (7,)", None, "(4,) of (8, 9)", "(5,) of (8, 9)"]
    assert second[:5] == ["all of (1, 2)", "source of (7,)", None, "all of (3, 4)", "source of (7,)"]
    assert second[5:] == ["(4,) of (8, 9)", "(5,) of (8, 9)", "(6,) of (8, 9)"]
    assert passes.made == [
        ("all of", (1, 2)),
        ("source of", (7,)),
        ("all of", (3, 4)),
        ("targets of", (8, 9)),  # of the one that ends early: nobody waits for it
        ("source of", (7,)),
        ("targets of", (8, 9)),
    ]


def test_targets_of_one_batch_are_each_the_right_one_whoever_asks_between() -> None:
    other = [((0, CLOSING, 1, target), (5,)) for target in range(3)]
    torn = asking(((0, CLOSING, 0, 0), (8,)), ((0, CLOSING, 0, 2), (8,)), other[1], other[0])
    assert run_alone(torn, Recorded()) == ["(4,) of (8,)", "(6,) of (8,)", "(5,) of (5,)", "(4,) of (5,)"]


def test_a_session_that_waits_for_others_does_not_count_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(sessions.time, "perf_counter", lambda: now[0])

    def session() -> Session[str]:
        now[0] += 1.0
        yield BackboneRequest(at=Moment(0, EVALUATION, 0), batch=None)
        now[0] += 2.0
        return "scores"

    clocked = timed(session())
    next(clocked)
    now[0] += 100.0  # others
    with pytest.raises(StopIteration) as end:
        clocked.send(BackboneResult(prepared=None, seconds=4.0))
    assert end.value.value == ("scores", 1.0 + 4.0 + 2.0)


def test_an_interruption_reaches_all_and_what_they_had_open_is_closed() -> None:
    left: list[str] = []

    def session(name: str) -> Session[None]:
        try:
            yield BackboneRequest(at=Moment(0, EVALUATION, 0), batch=None)
            if name == "second":
                raise Interrupted(15)
            yield BackboneRequest(at=Moment(0, EVALUATION, 1), batch=None)
        finally:
            left.append(name)

    def outer(name: str) -> Session[None]:
        yield from timed(session(name))

    with pytest.raises(Interrupted):
        fit_together([outer(name) for name in ("first", "second", "third")], Recorded())
    assert sorted(left) == ["first", "second", "third"]


def test_one_that_fails_on_all_ranks_alike_fails_alone_and_any_other_failure_ends_all() -> None:
    def failing(error: LstScaleError) -> Session[None]:
        yield BackboneRequest(at=Moment(0, TRAINING, 0), batch=batch_of(1))
        raise error

    asks = (((0, TRAINING, 0), (1,)), ((1, TRAINING, 0), (2,)))
    known = distributed.same_everywhere(TrainingError("not finite"))
    with pytest.raises(SomeFailed) as caught:
        fit_together([asking(*asks), failing(known), asking(*asks)], Recorded())
    assert caught.value.failures == {1: known}
    assert caught.value.finished == {0: ["all of (1,)", "all of (2,)"], 2: ["all of (1,)", "all of (2,)"]}
    for sessions_of, error in (([asking(*asks)], DataError("on this rank alone")), ([], known)):
        with pytest.raises(type(error), match=str(error)):
            fit_together([*sessions_of, failing(error)], Recorded())


def test_sessions_that_ask_for_different_batches_are_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="different batches"):
        fit_together([asking(((0, TRAINING, 0), (1,))), asking(((0, TRAINING, 0), (2,)))], Recorded())


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many rows each stack of the backbone has run, and how many payloads were read."""
    counts = {"encoder": 0, "decoder": 0, "read": 0}
    encode, decode, read_into = LocalBackbone.read, LocalBackbone.extend, TapCache.read_into

    def encoded(self: LocalBackbone, ids_BS: Any, *rest: Any) -> Any:
        counts["encoder"] += len(ids_BS)
        return encode(self, ids_BS, *rest)

    def decoded(self: LocalBackbone, ids_BT: Any, *rest: Any) -> Any:
        counts["decoder"] += len(ids_BT)
        return decode(self, ids_BT, *rest)

    def read(self: TapCache, *rest: Any) -> bool:
        counts["read"] += 1
        return read_into(self, *rest)

    monkeypatch.setattr(LocalBackbone, "read", encoded)
    monkeypatch.setattr(LocalBackbone, "extend", decoded)
    monkeypatch.setattr(TapCache, "read_into", read)
    return counts


def run_members(members: list[str], checkpoint: Path, folder: Path, **changes: Any) -> None:
    folder.mkdir()
    path = recipe_writer(folder, checkpoint)("answers", members=members, data__shuffle_seed=0, training__max_steps=2, **changes)
    assert len(run(load_recipe(str(path)))) == len(members)


def test_members_that_generate_read_the_source_on_one_pass(tiny_t5_dir: Path, tmp_path: Path, passes: dict[str, int]) -> None:
    run_members(["seed=0"], tiny_t5_dir, tmp_path / "one")
    alone = passes["encoder"]
    run_members(["seed=0", "seed=1", "seed=2"], tiny_t5_dir, tmp_path / "three")
    assert passes["encoder"] == 2 * alone > 0


@pytest.mark.parametrize("way", ["live", "cached", "cached while another run writes"])
def test_members_score_labels_on_one_pass(way: str, tiny_t5_dir: Path, tmp_path: Path, passes: dict[str, int]) -> None:
    changes: dict[str, Any] = {"evaluation__method": "likelihood"}
    if way != "live":
        changes |= {"cache__enabled": True, "cache__dtype": "fp32", "cache__folder": str(tmp_path / "taps")}
        run_members(["seed=0"], tiny_t5_dir, tmp_path / "first", **changes)
    with contextlib.ExitStack() as stack:
        if way == "cached while another run writes":
            for payloads in [*(tmp_path / "taps").rglob("*.taps"), *(tmp_path / "taps").rglob("*.index")]:
                payloads.unlink()
            (claimed,) = (tmp_path / "taps").rglob("*.claim")
            claim = Claim(claimed.parent, claimed.stem)
            assert claim.take()
            stack.callback(claim.release)
        found = []
        for members in (["seed=0"], ["seed=0", "seed=1", "seed=2"]):
            passes.update(encoder=0, decoder=0, read=0)
            run_members(members, tiny_t5_dir, tmp_path / str(len(members)), **changes)
            found.append(dict(passes))
    assert found[0] == found[1]
    live, cached = found[0]["encoder"] > 0 and found[0]["decoder"] > 0, found[0]["read"] > 0
    assert (live, cached) == {"live": (True, False), "cached": (False, True)}.get(way, (True, False))


def test_the_encoder_runs_once_for_all_labels_and_reads_once(tiny_t5_dir: Path, tmp_path: Path, passes: dict[str, int]) -> None:
    writer, (first, *others) = opened(tiny_t5_dir, tmp_path, "fp32"), batches(3)
    several = [first, *(dataclasses.replace(first, target_BT=other.target_BT) for other in others)]
    expected = [writer.live(inputs, REQUEST) for inputs in several]
    passes.update(encoder=0)
    made = list(writer.each_target(several, REQUEST))
    assert passes["encoder"] == 3 and (writer.rows_run, writer.rows_read) == (9, 0)
    reader, reads = opened(tiny_t5_dir, tmp_path, "fp32"), []
    read_into = reader.cache.read_into
    reader.cache.read_into = lambda digest, *rest: reads.append(digest) or read_into(digest, *rest)  # type: ignore[method-assign,func-returns-value]
    read = list(reader.each_target(several, REQUEST))
    assert not reader.is_loaded and (reader.rows_run, reader.rows_read) == (0, 9)
    assert len(reads) == len(set(reads)) == 3 + 9  # each row's source once, and three targets of each
    for one, again, live in zip(made, read, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.source.tensors, live.source.tensors, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one.target.tensors, live.target.tensors, strict=True))
        for row, length in enumerate((4, 2, 3)):
            for a, b in zip(again.target.tensors, live.target.tensors, strict=True):
                assert torch.equal(a[row, : length - 1], b[row, : length - 1])

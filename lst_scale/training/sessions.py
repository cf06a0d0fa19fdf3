"""Runs side by side, sharing what the frozen backbone makes of each batch.

A session is a generator: it yields an `Ask` where it needs the backbone and is sent the `Answer`; everything else it does by itself.
`fit_together` answers sessions that ask for the same batch at once, so that a batch costs one pass, however many train or answer on it.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lst_scale.data.batches import Batch
from lst_scale.errors import LstScaleError
from lst_scale.preemption import Interrupted

T = TypeVar("T")
EVALUATION, TRAINING, CLOSING = range(3)  # what a session does at a step, in this order


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What does the frozen backbone make of this batch? While training all of it is wanted, otherwise what it makes of the source."""

    at: tuple[int, int, int]  # step, EVALUATION or TRAINING or CLOSING, number of the batch within it
    batch: Batch | None  # None: this rank has no rows left where others do, and asks to stay in step with them
    following: Callable[[], Batch | None] = lambda: None  # what this session will most likely train on next


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the frozen backbone made of a batch, for all sessions that asked."""

    prepared: Any
    seconds: float  # that it took; each session counts them as its own, so that its time is that of a run alone


Session = Generator[Ask, Answer, T]


class SomeFailed(LstScaleError):
    """Some of several sessions failed, on all ranks alike; the others ended as they would have without them."""

    same_on_all_ranks = True

    def __init__(self, failures: dict[int, LstScaleError], finished: dict[int, Any]) -> None:
        super().__init__("; ".join(map(str, failures.values())))
        self.failures, self.finished = failures, finished


def fit_together(
    sessions: Sequence[Session[T]],
    prepare: Callable[[Batch], Any],
    encode: Callable[[Batch], Any],
    prefetch: Callable[[Batch], None] | None = None,
) -> list[T]:
    """Run sessions side by side to their ends and return what they return.

    Sessions must ask for the same batches in the same order. One that starts behind the others catches up first; one that ends is let
    go with all it held. One that fails on all ranks alike fails alone. When one is interrupted, all are, and save. `prepare` answers
    training, `encode` evaluation; `prefetch` is told what comes next before a micro-batch trains.

    Raises:
        SomeFailed: after the others have ended. A session that is alone raises its own error.
    """
    finished: dict[int, T] = {}
    failed: dict[int, LstScaleError] = {}
    asking: dict[int, Ask] = {}

    def resume(number: int, answer: Answer | None) -> None:
        asking.pop(number, None)
        try:
            asking[number] = next(sessions[number]) if answer is None else sessions[number].send(answer)
            return
        except StopIteration as end:
            finished[number] = end.value
        except Interrupted:
            raise
        except LstScaleError as error:
            if len(sessions) == 1 or not error.same_on_all_ranks:
                raise
            failed[number] = error.with_traceback(None)  # whose frames hold what the session held
        gc.collect()  # an engine is a ring of references

    try:
        for number in range(len(sessions)):
            resume(number, None)
        while asking:
            first = min(ask.at for ask in asking.values())
            together = [number for number, ask in asking.items() if ask.at == first]
            ask = asking[together[0]]
            assert all(_rows(asking[number]) == _rows(ask) for number in together), "sessions ask for different batches"
            start = time.perf_counter()
            prepared = None if ask.batch is None else (prepare if first[1] == TRAINING else encode)(ask.batch)
            answer = Answer(prepared=prepared, seconds=time.perf_counter() - start)
            if prefetch is not None and (next_batch := ask.following()) is not None:
                prefetch(next_batch)
            del prepared
            for number in together:
                resume(number, answer)
            del answer
    except Interrupted as interrupted:
        for number in asking:
            with contextlib.suppress(Interrupted):
                sessions[number].throw(interrupted)
        raise
    if failed:
        raise SomeFailed(failed, finished)
    return [finished[number] for number in range(len(sessions))]


def run_alone(session: Session[T], encode: Callable[[Batch], Any]) -> T:
    """Run one session that does not train, and return what it returns."""
    (result,) = fit_together([session], encode, encode)
    return result


def timed(session: Session[T]) -> Session[tuple[T, float]]:
    """Also return the seconds that a session took by itself and its answers: what others did between them is theirs."""
    seconds, answer = 0.0, None
    with contextlib.closing(session):
        while True:
            start = time.perf_counter()
            try:
                ask = next(session) if answer is None else session.send(answer)
            except StopIteration as end:
                return end.value, seconds + time.perf_counter() - start
            seconds += time.perf_counter() - start
            answer = yield ask
            seconds += answer.seconds


def _rows(ask: Ask) -> tuple[int, ...] | None:
    return None if ask.batch is None else ask.batch.indices

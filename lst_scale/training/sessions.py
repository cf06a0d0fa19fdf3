"""Runs side by side, sharing what the frozen backbone makes of each batch.

A session is a generator: it yields a `BackboneRequest` where it needs the backbone, is sent the `BackboneResult` and does the rest itself.
`fit_together` answers sessions that ask for the same batch at once, so that a batch costs one pass, however many train or answer on it.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from lst_scale.data.batches import Batch
from lst_scale.errors import LstScaleError
from lst_scale.system.preemption import Interrupted

T = TypeVar("T")
EVALUATION, TRAINING, CLOSING = range(3)  # what a session does at a step, in this order


class Moment(NamedTuple):
    """When a session asks. Moments are compared: sessions that are behind go first."""

    step: int
    phase: int  # EVALUATION, TRAINING or CLOSING
    batch: int = 0  # number within the phase
    target: int = 0  # number within the batch, where its rows are read with several targets


class Want(enum.Enum):
    """What a session wants to know of a batch."""

    ALL = "all"  # of the source and of the batch's own target: to train on
    SOURCE = "source"  # of the source alone: to generate
    TARGET = "target"  # of the source and of one of several targets, in turn: to score them


@dataclass(frozen=True, kw_only=True)
class BackboneRequest:
    """What does the frozen backbone make of this batch?"""

    at: Moment
    batch: Batch | None  # None: this rank has no rows left where others do, and asks to stay in step with them
    want: Want = Want.ALL
    targets: tuple[tuple[int, ...], ...] = ()  # token ids of each, where one of several is wanted: number `at.target`
    following: Callable[[], Batch | None] = lambda: None  # what this session will most likely train on next


@dataclass(frozen=True, kw_only=True)
class BackboneResult:
    """What the frozen backbone made of a batch, for all sessions that asked."""

    prepared: Any
    seconds: float  # that it took; each session counts them as its own, so that its time is that of a run alone


class Passes(Protocol):
    """The frozen backbone as sessions share it."""

    def all_of(self, batch: Batch) -> Any: ...
    def source_of(self, batch: Batch) -> Any: ...
    def each_target(self, batch: Batch, targets: Sequence[Sequence[int]]) -> Iterator[Any]: ...
    def prefetch(self, following: Callable[[], Batch | None]) -> None:
        """Begin to read the batch that will be wanted next, where that saves time."""
        ...


Session = Generator[BackboneRequest, BackboneResult, T]


class SomeFailed(LstScaleError):
    """Some of several sessions failed, on all ranks alike; the others ended as they would have without them."""

    same_on_all_ranks = True

    def __init__(self, failures: dict[int, LstScaleError], finished: dict[int, Any]) -> None:
        super().__init__("; ".join(map(str, failures.values())))
        self.failures, self.finished = failures, finished


def fit_together(sessions: Sequence[Session[T]], passes: Passes) -> list[T]:
    """Run sessions side by side to their ends and return what they return.

    Sessions must ask for the same batches in the same order. One that starts behind the others catches up first; one that ends is let
    go with all it held. One that fails on all ranks alike fails alone. When one is interrupted, all are, and save.

    Raises:
        SomeFailed: after the others have ended. A session that is alone raises its own error.
    """
    interleaver = Interleaver(sessions, passes)
    interleaver.run()
    if interleaver.failed:
        raise SomeFailed(interleaver.failed, interleaver.finished)
    return [interleaver.finished[number] for number in range(len(sessions))]


def run_alone(session: Session[T], passes: Passes) -> T:
    """Run one session and return what it returns."""
    (result,) = fit_together([session], passes)
    return result


class Interleaver(Generic[T]):
    """Runs sessions by turns. Each waits at its `BackboneRequest`; those that ask for the earliest batch are served together."""

    def __init__(self, sessions: Sequence[Session[T]], passes: Passes) -> None:
        self.finished: dict[int, T] = {}
        self.failed: dict[int, LstScaleError] = {}
        self._sessions, self._backbone = sessions, _Backbone(passes)
        self._asking: dict[int, BackboneRequest] = {}

    def run(self) -> None:
        try:
            for number in range(len(self._sessions)):
                self._advance(number, None)
            while self._asking:
                self._serve(self._next_group())
        except Interrupted as interrupted:
            self._interrupt(interrupted)
            raise

    def _next_group(self) -> list[int]:
        """Return the sessions that ask for the earliest batch: they must want the same of the same rows."""
        first = min(ask.at for ask in self._asking.values())
        group = [number for number, ask in self._asking.items() if ask.at == first]
        wanted = {(_rows(ask), ask.want, ask.targets) for ask in map(self._asking.__getitem__, group)}
        assert len(wanted) == 1, "sessions ask for different batches"
        return group

    def _serve(self, group: list[int]) -> None:
        ask = self._asking[group[0]]
        answer = self._backbone.answer(ask)
        for number in group:
            self._advance(number, answer)

    def _advance(self, number: int, answer: BackboneResult | None) -> None:
        """Run one session to its next `BackboneRequest`, its end or its failure."""
        self._asking.pop(number, None)
        session = self._sessions[number]
        try:
            self._asking[number] = next(session) if answer is None else session.send(answer)
            return
        except StopIteration as end:
            self.finished[number] = end.value
        except Interrupted:
            raise
        except LstScaleError as error:
            if len(self._sessions) == 1 or not error.same_on_all_ranks:
                raise
            self.failed[number] = error.with_traceback(None)  # whose frames hold what the session held
        gc.collect()  # an engine is a ring of references

    def _interrupt(self, interrupted: Interrupted) -> None:
        """Let the sessions that wait save what they have."""
        for number in self._asking:
            with contextlib.suppress(Interrupted):
                self._sessions[number].throw(interrupted)


class _Backbone:
    """Answers asks. Of a batch that is read with several targets it remembers how far it is: its source is read for the first alone."""

    def __init__(self, passes: Passes) -> None:
        self._passes = passes
        self._next: Moment | None = None  # which target `_targets` gives next
        self._targets: Iterator[Any] = iter(())

    def answer(self, ask: BackboneRequest) -> BackboneResult:
        start = time.perf_counter()
        prepared = None if ask.batch is None else self._make(ask, ask.batch)
        seconds = time.perf_counter() - start
        self._passes.prefetch(ask.following)
        return BackboneResult(prepared=prepared, seconds=seconds)

    def _make(self, ask: BackboneRequest, batch: Batch) -> Any:
        if ask.want is Want.TARGET:
            return self._target(ask, batch)
        return self._passes.all_of(batch) if ask.want is Want.ALL else self._passes.source_of(batch)

    def _target(self, ask: BackboneRequest, batch: Batch) -> Any:
        if self._next != ask.at:
            self._targets = self._passes.each_target(batch, ask.targets[ask.at.target :])
        found = next(self._targets)
        last = ask.at.target + 1 == len(ask.targets)
        self._next = None if last else ask.at._replace(target=ask.at.target + 1)
        if last:
            self._targets = iter(())  # lets go of the source
        return found


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


def _rows(ask: BackboneRequest) -> tuple[int, ...] | None:
    return None if ask.batch is None else ask.batch.indices

"""Rows that join and leave one running batch at every token, whichever side network answers them.

One thread runs passes; requests come from others. Each round it first lets those go that nobody waits for, weighs the labels that were
asked for, reads the prompts of those that wait and lets them join, and then runs one more token of every row through the backbone, once.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lst_scale.backbone.families import family_of
from lst_scale.backbone.taps import Backbone
from lst_scale.serving.answering import Answering, by_shape
from lst_scale.serving.jobs import Ended, Generation, Scoring, TooManyWait, key_of, tell_failure
from lst_scale.serving.networks import Network, Networks
from lst_scale.serving.passes import Passes, Prompt, states_of
from lst_scale.serving.reading import Reader
from lst_scale.serving.rows import Rows, joined
from lst_scale.serving.sampling import Chooser
from lst_scale.serving.scoring import Scorer, portions

IDLE_SECONDS = 60.0  # after which ranks that wait for a pass hear that there is none, before their patience ends


@dataclass(eq=False)
class _Row:
    job: Generation
    chooser: Chooser
    count: int = 0
    last: int = 0


@dataclass(eq=False)
class _Group:
    """The rows that side networks of one shape answer, or the backbone; `held` is what those side networks keep of them."""

    rows: list[_Row] = field(default_factory=list)
    held: Rows | None = None

    @property
    def networks(self) -> list[Network]:
        return [row.job.network for row in self.rows]


@dataclass
class Counts:
    """What has been done, for whoever watches."""

    tokens: int = 0
    rounds: int = 0
    rows_in_rounds: int = 0


class Engine:
    """Answers requests.

    Args:
        most_rows: that run together.
        most_waiting: requests that may wait; more are refused.
        prompt_bytes: of prompts that are kept for others that are equal.
    """

    def __init__(
        self, passes: Passes, networks: Networks, *, most_rows: int = 64, most_waiting: int = 256, prompt_bytes: int = 256 << 20
    ) -> None:
        self.passes = passes
        self.reader = Reader(self.passes, networks, prompt_bytes)
        self._answering = Answering(self.passes)
        self._scorer = Scorer(self.passes, self.reader, self._answering)
        self._most_rows, self._most_waiting = most_rows, most_waiting
        self._ends = _ends_of(passes.backbone)
        self._waiting: deque[Generation] = deque()
        self._scorings: deque[Scoring] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._rows: list[_Row] = []  # in the order of `_held`
        self._held: Rows | None = None
        self._groups: dict[Hashable, _Group] = {}  # by the shape of side networks
        self.counts = Counts()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # For other threads.

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Generation | Scoring) -> None:
        """Let a request wait for its turn.

        Raises:
            TooManyWait: as many wait as may.
        """
        with self._wake:
            if self._stopping or self.num_waiting >= self._most_waiting:
                raise TooManyWait
            if isinstance(job, Generation):
                self._waiting.append(job)
            else:
                self._scorings.append(job)
            self._wake.notify()

    def stop(self, seconds: float | None = None) -> None:
        """Take no more requests, finish those that were taken, and end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(seconds)

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs, without which nothing is answered."""
        return self._thread.is_alive()

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._scorings)

    # In its own thread.

    def _run(self) -> None:
        while self._wait():
            try:
                self._drop_cancelled()
                self._answer_scorings()
                self._admit()
                if self._rows:
                    self._round()
            except Exception as error:
                self._end_all(error)

    def _wait(self) -> bool:
        """Sleep until there is something to do; false at the end."""
        with self._wake:
            while not (self._rows or self._waiting or self._scorings or self._stopping):
                if not self._wake.wait(IDLE_SECONDS):
                    self.passes.nothing_to_do()
            return bool(self._rows or self._waiting or self._scorings)

    def _end_all(self, error: Exception) -> None:
        """Tell all rows that they failed, and go on without them; nothing is copied, since memory may be what failed."""
        traceback.print_exc()
        rows, self._rows, self._held, self._groups = self._rows, [], None, {}
        tell_failure([row.job for row in rows], error)

    def _drop_cancelled(self) -> None:
        """Let those go that nobody waits for, whether they run or wait."""
        with self._wake:
            self._waiting = deque(job for job in self._waiting if not job.cancelled)
            self._scorings = deque(job for job in self._scorings if not job.cancelled)
        # Other threads cancel meanwhile: who goes is looked up once.
        gone = {id(row) for row in self._rows if row.job.cancelled}
        if gone:
            self._leave(gone)

    def _answer_scorings(self) -> None:
        with self._wake:
            jobs = list(self._scorings)
            self._scorings.clear()
        for some in portions(jobs, 4 * self._most_rows):
            try:
                for job, scores in zip(some, self._scorer.scores(some), strict=True):
                    job.tell(scores)
            except Exception as error:
                traceback.print_exc()
                tell_failure(some, error)

    def _admit(self) -> None:
        """Read the prompts of those that wait, as far as there is room, and let them join."""
        with self._wake:
            room = max(0, self._most_rows - len(self._rows))
            taken = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if not taken:
            return
        try:
            prompts = self.reader.read(taken)
            groups = [[_Row(job, Chooser(job.sampling)) for job in jobs] for jobs in by_shape(taken).values()]
        except Exception as error:
            traceback.print_exc()
            tell_failure(taken, error)
            return
        for rows in groups:
            try:
                self._join(rows, [prompts[key_of(row.job)] for row in rows])
            except Exception as error:
                traceback.print_exc()
                tell_failure([row.job for row in rows], error)

    def _join(self, rows: list[_Row], prompts: list[Prompt]) -> None:
        """Choose the first token of rows that side networks of one shape answer, and let those that go on join.

        Where that fails, those that run are as they were.
        """
        logits_BV, held = self._answering.begin([row.job.network for row in rows], prompts)
        going_on = self._choose(rows, logits_BV)
        staying = [number for number, row in enumerate(rows) if id(row) in going_on]
        if not staying:
            return
        shape = rows[0].job.network.shape
        group = self._groups.get(shape, _Group())
        own = None if held is None else _with(group.held, held.of(staying))
        self._held = _with(self._held, joined([prompts[number].rows for number in staying]))
        # From here on nothing can fail.
        self._groups[shape], group.held = group, own
        self._rows += [rows[number] for number in staying]
        group.rows += [rows[number] for number in staying]

    def _round(self) -> None:
        """Run one more token of every row."""
        assert self._held is not None
        ids_B1 = torch.tensor([[row.last] for row in self._rows], device=self.passes.backbone.device)
        state, self._held = self.passes.extend(ids_B1, self._held, self.reader.request([row.job for row in self._rows]))
        place = {id(row): number for number, row in enumerate(self._rows)}
        going_on: set[int] = set()
        for group in self._groups.values():
            own = states_of(state, [place[id(row)] for row in group.rows])
            logits_BTV, group.held = self._answering.go_on(group.networks, own, group.held)
            going_on |= self._choose(group.rows, logits_BTV[:, -1])
        self.counts.rounds += 1
        self.counts.rows_in_rounds += len(self._rows)
        ended = place.keys() - going_on
        if ended:
            self._leave(ended)

    def _choose(self, rows: Sequence[_Row], logits_BV: Tensor) -> set[int]:
        """Tell the next token of rows; return the ids of those that go on."""
        likeliest = logits_BV.argmax(-1).tolist()  # of all rows at once: the device is waited for once a round
        return {id(row) for row, logits_V, best in zip(rows, logits_BV, likeliest, strict=True) if self._goes_on(row, logits_V, best)}

    def _goes_on(self, row: _Row, logits_V: Tensor, likeliest: int) -> bool:
        try:
            chosen = row.chooser.choose(logits_V, likeliest)
        except Exception as error:  # others of the round are not to blame
            traceback.print_exc()
            tell_failure([row.job], error)
            return False
        row.count, row.last = row.count + 1, chosen.token
        self.counts.tokens += 1
        if (chosen.token in self._ends or chosen.token == row.job.network.end) and not row.job.sampling.past_the_end:
            row.job.tell(Ended("stop"))
            return False
        row.job.tell(chosen)
        if row.count >= row.job.max_tokens:
            row.job.tell(Ended("length"))
            return False
        return not row.job.cancelled

    def _leave(self, gone: set[int]) -> None:
        """Let the rows of these ids leave the batch."""
        staying = [number for number, row in enumerate(self._rows) if id(row) not in gone]
        self._held = self._held.of(staying) if staying and self._held is not None else None
        self._rows = [self._rows[number] for number in staying]
        for key, group in list(self._groups.items()):
            own = [number for number, row in enumerate(group.rows) if id(row) not in gone]
            if len(own) == len(group.rows):
                continue
            group.rows = [group.rows[number] for number in own]
            group.held = group.held.of(own) if own and group.held is not None else None
            if not own:
                del self._groups[key]


def _with(held: Rows | None, more: Rows) -> Rows:
    return more if held is None else joined([held, more])


def _ends_of(backbone: Backbone) -> frozenset[int]:
    """Return the tokens that end a text."""
    found = family_of(backbone.spec.model_type, "this backbone").generation_config(backbone.spec, side_layers=0).eos_token_id
    return frozenset(found if isinstance(found, list) else [found])

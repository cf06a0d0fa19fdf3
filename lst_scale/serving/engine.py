"""Rows that join and leave one running batch at every token, whichever side network answers them.

One thread runs passes; requests come from others. Each round it first reads the prompts of those that wait, equal ones once, lets them
join, answers questions that are labels, and then runs one more token of every row through the backbone, once.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from lst_scale.backbone.families import family_of
from lst_scale.backbone.taps import Backbone, StackTaps, TapRequest, TargetState
from lst_scale.serving.networks import Network, Networks
from lst_scale.serving.passes import Passes, Prompt
from lst_scale.serving.rows import Rows, joined
from lst_scale.serving.sampling import Chooser, Chosen, Sampling
from lst_scale.serving.stacked import Stack, shape_of
from lst_scale.side.network import SideNetwork


@dataclass(eq=False, kw_only=True)
class Generation:
    """A prompt to go on with. `tell` is called in the engine's thread: with a token, and at last with why it ended."""

    network: Network
    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    tell: Callable[[Chosen | Ended], None]
    cancelled: bool = False  # set it when nobody waits any more
    arrived: float = field(default_factory=time.monotonic)


@dataclass(eq=False, kw_only=True)
class Scoring:
    """How likely each of several targets is after a prompt. `tell` gets their log-likelihoods in nats, or why there are none."""

    network: Network
    prompt: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    tell: Callable[[list[float] | Ended], None]
    cancelled: bool = False


@dataclass(frozen=True)
class Ended:
    """Why a row ended: "stop" at the model's end of text, "length" at max_tokens, "error"."""

    reason: str
    message: str = ""


class TooManyWait(Exception):
    """The queue is full."""


@dataclass(eq=False)
class _Row:
    job: Generation
    chooser: Chooser
    count: int = 0
    last: int = 0


@dataclass(eq=False)
class _Group:
    """The rows that side networks of one shape answer; `held` is what these keep of them. No stack: the backbone answers them."""

    stack: Stack | None
    rows: list[_Row] = field(default_factory=list)
    held: Rows | None = None


@dataclass
class Counts:
    """What has been done, for whoever watches."""

    tokens: int = 0
    rounds: int = 0
    rows_in_rounds: int = 0
    prompts_reused: int = 0


class Engine:
    """Answers requests.

    Args:
        most_rows: that run together.
        most_waiting: requests that may wait; more are refused.
        prompt_bytes: of prompts that are kept for others that are equal.
    """

    def __init__(
        self, backbone: Backbone, networks: Networks, *, most_rows: int = 64, most_waiting: int = 256, prompt_bytes: int = 256 << 20
    ) -> None:
        self.passes, self._networks = Passes(backbone), networks
        self._most_rows, self._most_waiting = most_rows, most_waiting
        self._ends = _ends_of(backbone)
        self._prompts = _Kept(prompt_bytes)
        self._contexts: OrderedDict[tuple[int, ...], Rows] = OrderedDict()
        self._waiting: deque[Generation] = deque()
        self._scorings: deque[Scoring] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._rows: list[_Row] = []  # in the order of `_held`
        self._held: Rows | None = None
        self._groups: dict[Hashable, _Group] = {}  # by the shape of side networks
        self._stacks: dict[Hashable, Stack] = {}
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
            if self._stopping or len(self._waiting) + len(self._scorings) >= self._most_waiting:
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
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._scorings)

    # In its own thread.

    def _run(self) -> None:
        while self._wait():
            self._guarded(self._drop_cancelled, ())
            self._answer_scorings()
            self._admit()
            if self._rows:
                self._guarded(self._round, list(self._rows))

    def _wait(self) -> bool:
        """Sleep until there is something to do; false at the end."""
        with self._wake:
            while not (self._rows or self._waiting or self._scorings or self._stopping):
                self._wake.wait()
            return bool(self._rows or self._waiting or self._scorings)

    def _guarded(self, work: Callable[[], None], rows: Sequence[_Row]) -> None:
        """Do something; when it fails, end these rows and go on with others."""
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            for row in rows:
                row.job.tell(Ended("error", type(error).__name__))
            gone = set(map(id, rows))
            self._leave(lambda row: id(row) in gone)

    def _admit(self) -> None:
        """Read the prompts of those that wait, as far as there is room, and let them join."""
        taken: list[Generation] = []
        with self._wake:
            while self._waiting and len(self._rows) + len(taken) < self._most_rows:
                job = self._waiting.popleft()
                if not job.cancelled:
                    taken.append(job)
        try:
            prompts = self._read([(job.network, job.prompt) for job in taken])
        except Exception as error:
            traceback.print_exc()
            for job in taken:
                job.tell(Ended("error", type(error).__name__))
            return
        for jobs in _by_shape(taken).values():
            rows = [_Row(job, Chooser(job.sampling)) for job in jobs]
            self._guarded(lambda rows=rows: self._join(rows, [prompts[_key(row.job)] for row in rows]), rows)  # type: ignore[misc]

    def _join(self, rows: list[_Row], prompts: list[Prompt]) -> None:
        """Choose the first token of rows that side networks of one shape answer, and let those that go on join."""
        networks = [row.job.network for row in rows]
        logits_BV, held = self._begin(networks, prompts)
        staying = [number for number, row in enumerate(rows) if self._choose(row, logits_BV[number])]
        if not staying:
            return
        added = joined([prompts[number].rows for number in staying])
        self._held = added if self._held is None else joined([self._held, added])
        self._rows += [rows[number] for number in staying]
        group = self._groups.setdefault(_shape(networks[0]), _Group(self._stack(networks[0])))
        group.rows += [rows[number] for number in staying]
        if held is not None:
            own = held.of(staying)
            group.held = own if group.held is None else joined([group.held, own])

    def _begin(self, networks: Sequence[Network], prompts: list[Prompt]) -> tuple[Tensor, Rows | None]:
        """Return the logits after prompts, each answered by its own network; all are of one shape."""
        stack = self._stack(networks[0])
        if stack is None:
            return torch.cat([self.passes.bare(prompt.target)[:, -1] for prompt in prompts]), None
        stack.route(_sides(networks))
        return self.passes.begin(stack.side, prompts)

    def _stack(self, network: Network) -> Stack | None:
        if network.side is None:
            return None
        shape = shape_of(network.side)
        if shape not in self._stacks:
            self._stacks[shape] = Stack(network.side)
        return self._stacks[shape]

    def _round(self) -> None:
        """Run one more token of every row."""
        assert self._held is not None
        ids_B1 = torch.tensor([[row.last] for row in self._rows], device=self.passes.backbone.device)
        state, self._held = self.passes.extend(ids_B1, self._held, self._request())
        place = {id(row): number for number, row in enumerate(self._rows)}
        ended: set[int] = set()
        for group in self._groups.values():
            logits_BV = self._go_on(group, _of(state, [place[id(row)] for row in group.rows]))
            ended |= {id(row) for row, logits_V in zip(group.rows, logits_BV, strict=True) if not self._choose(row, logits_V)}
        self.counts.rounds += 1
        self.counts.rows_in_rounds += len(self._rows)
        if ended:
            self._leave(lambda row: id(row) in ended)

    def _go_on(self, group: _Group, state: TargetState) -> Tensor:
        if group.stack is None:
            return self.passes.bare(state)[:, -1]
        assert group.held is not None
        group.stack.route(_sides([row.job.network for row in group.rows]))
        logits_BTV, group.held = self.passes.go_on(group.stack.side, state, group.held)
        return logits_BTV[:, -1]

    def _choose(self, row: _Row, logits_V: Tensor) -> bool:
        """Tell a row's next token; return whether it goes on."""
        chosen = row.chooser.choose(logits_V)
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

    def _drop_cancelled(self) -> None:
        if any(row.job.cancelled for row in self._rows):
            self._leave(lambda row: row.job.cancelled)

    def _leave(self, goes: Callable[[_Row], bool]) -> None:
        staying = [number for number, row in enumerate(self._rows) if not goes(row)]
        self._held = self._held.of(staying) if staying and self._held is not None else None
        self._rows = [self._rows[number] for number in staying]
        for key, group in list(self._groups.items()):
            own = [number for number, row in enumerate(group.rows) if not goes(row)]
            if len(own) == len(group.rows):
                continue
            group.rows = [group.rows[number] for number in own]
            group.held = group.held.of(own) if own and group.held is not None else None
            if not own:
                del self._groups[key]

    # Prompts, contexts and labels.

    def _request(self) -> TapRequest:
        running = [row.job.network.side for row in self._rows if row.job.network.side is not None]
        return self.passes.request([*self._networks.sides, *running])

    def _read(self, asked: Iterable[tuple[Network, tuple[int, ...]]]) -> dict[_PromptKey, Prompt]:
        """Return what the backbone makes of prompts: those that are kept, and the others in one pass a context."""
        asked = list(asked)
        sides = [network.side for network, _ in asked if network.side is not None]
        request = self.passes.request([*self._networks.sides, *sides])
        wanted = dict.fromkeys((network.context, prompt) for network, prompt in asked)
        found = {key: kept for key in wanted if (kept := self._prompts.get((key, request.layers))) is not None}
        self.counts.prompts_reused += len(asked) - (len(wanted) - len(found))
        for context in dict.fromkeys(context for context, _ in wanted):
            missing = [prompt for at, prompt in wanted if at == context and (at, prompt) not in found]
            if missing:
                for prompt, read in zip(missing, self.passes.read(missing, self._context(context), request), strict=True):
                    found[context, prompt] = read
                    self._prompts.put(((context, prompt), request.layers), read)
        return found

    def _context(self, ids: tuple[int, ...]) -> Rows | None:
        if not ids:
            return None
        if ids not in self._contexts:
            self._contexts[ids] = self.passes.read_context(ids)
        return self._contexts[ids]

    def _answer_scorings(self) -> None:
        with self._wake:
            jobs = [job for job in self._scorings if not job.cancelled]
            self._scorings.clear()
        for some in _portions(jobs, 4 * self._most_rows):
            try:
                for job, scores in zip(some, self._scores(some), strict=True):
                    job.tell(scores)
            except Exception as error:
                traceback.print_exc()
                for job in some:
                    job.tell(Ended("error", type(error).__name__))

    def _scores(self, jobs: Sequence[Scoring]) -> list[list[float]]:
        """Run each different prompt once, each different target after it once, and the side networks on what came of them."""
        prompts = self._read([(job.network, job.prompt) for job in jobs])
        pairs = list(dict.fromkeys((_key(job), target) for job in jobs for target in job.targets))
        held = joined([prompts[key].rows for key, _ in pairs])
        request = self._request_of(jobs)
        ids_BT = _padded_after([target[:-1] or (0,) for _, target in pairs], self.passes.backbone.device)
        state, _ = self.passes.extend(ids_BT, held, request)
        place = {pair: number for number, pair in enumerate(pairs)}
        scores: dict[int, list[float]] = {}
        for alike in _by_shape(jobs).values():
            firsts = list({(id(job.network), _key(job)): job for job in alike}.values())  # a network reads a prompt once
            first_BV, own = self._begin([job.network for job in firsts], [prompts[_key(job)] for job in firsts])
            begun = {(id(job.network), _key(job)): number for number, job in enumerate(firsts)}
            mine = [(job, target) for job in firsts for target in dict.fromkeys(t for j in alike if _same(j, job) for t in j.targets)]
            beginnings = [begun[id(job.network), _key(job)] for job, _ in mine]
            after = _of(state, [place[_key(job), target] for job, target in mine])
            logits_BTV = self._after([job.network for job, _ in mine], after, None if own is None else own.of(beginnings))
            sums = _likelihoods(first_BV, beginnings, logits_BTV, [target for _, target in mine])
            likely = {(id(job.network), _key(job), target): sums[number] for number, (job, target) in enumerate(mine)}
            scores |= {id(job): [likely[id(job.network), _key(job), target] for target in job.targets] for job in alike}
        return [scores[id(job)] for job in jobs]

    def _request_of(self, jobs: Sequence[Scoring]) -> TapRequest:
        return self.passes.request([*self._networks.sides, *(job.network.side for job in jobs if job.network.side is not None)])

    def _after(self, networks: Sequence[Network], state: TargetState, own: Rows | None) -> Tensor:
        stack = self._stack(networks[0])
        if stack is None or own is None:
            return self.passes.bare(state)
        stack.route(_sides(networks))
        return self.passes.go_on(stack.side, state, own)[0]


J = TypeVar("J", Generation, Scoring)
_PromptKey = tuple[tuple[int, ...], tuple[int, ...]]  # the context's ids, the prompt's


class _Kept:
    """What the backbone made of prompts lately, up to a number of bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._there: OrderedDict[object, Prompt] = OrderedDict()

    def get(self, key: object) -> Prompt | None:
        if key in self._there:
            self._there.move_to_end(key)
        return self._there.get(key)

    def put(self, key: object, prompt: Prompt) -> None:
        self._there[key] = prompt
        self._bytes += prompt.nbytes
        while self._bytes > self._most and self._there:
            _, gone = self._there.popitem(last=False)
            self._bytes -= gone.nbytes


def _key(job: Generation | Scoring) -> _PromptKey:
    return job.network.context, job.prompt


def _portions(jobs: Sequence[Scoring], most: int) -> Iterable[list[Scoring]]:
    """Yield jobs as many at a time as have so many targets together, or one that has more."""
    some: list[Scoring] = []
    for job in jobs:
        if some and sum(len(each.targets) for each in some) + len(job.targets) > most:
            yield some
            some = []
        some.append(job)
    if some:
        yield some


def _same(one: Scoring, other: Scoring) -> bool:
    """Whether two jobs ask one network about one prompt."""
    return one.network is other.network and _key(one) == _key(other)


def _shape(network: Network) -> Hashable:
    return None if network.side is None else shape_of(network.side)


def _by_shape(jobs: Sequence[J]) -> dict[Hashable, list[J]]:
    found: dict[Hashable, list[J]] = {}
    for job in jobs:
        found.setdefault(_shape(job.network), []).append(job)
    return found


def _sides(networks: Sequence[Network]) -> list[SideNetwork]:
    return [network.side for network in networks if network.side is not None]


def _of(state: TargetState, rows: list[int]) -> TargetState:
    """Return the states of some rows."""
    taps = state.taps
    picked = StackTaps(layers=taps.layers, embedding=taps.embedding[rows], hidden=tuple(tap[rows] for tap in taps.hidden))
    return TargetState(taps=picked, final_BTD=None if state.final_BTD is None else state.final_BTD[rows])


def _padded_after(targets: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    longest = max(map(len, targets))
    return torch.tensor([[*target, *[0] * (longest - len(target))] for target in targets], device=device)


def _likelihoods(first_BV: Tensor, rows: list[int], logits_MTV: Tensor, targets: Sequence[Sequence[int]]) -> list[float]:
    """Return the log-likelihood of each of M targets: its first token after the prompt of row `rows[m]`, the others after that.

    No log-probability is made but those that are asked for: of a large vocabulary all of them would take longer than the side networks.
    """
    device = first_BV.device
    firsts = torch.tensor([target[0] for target in targets], device=device)
    sums = first_BV[rows, firsts].float() - first_BV.float().logsumexp(-1)[rows]
    rest = _padded_after([target[1:] or (0,) for target in targets], device)
    there = torch.tensor([[position < len(target) - 1 for position in range(rest.shape[1])] for target in targets], device=device)
    chosen = logits_MTV.gather(-1, rest[..., None])[..., 0].float() - logits_MTV.float().logsumexp(-1)
    found: list[float] = (sums + chosen.masked_fill(~there, 0).sum(-1)).tolist()
    return found


def _ends_of(backbone: Backbone) -> frozenset[int]:
    """Return the tokens that end a text."""
    found = family_of(backbone.spec.model_type, "this backbone").generation_config(backbone.spec, side_layers=0).eos_token_id
    return frozenset(found if isinstance(found, list) else [found])

"""A backbone divided over ranks: rank 0 answers requests, and the others run each pass of the backbone with it.

What a rank keeps of rows is its share of their keys and values, so rows that join, leave or are let go do so on all ranks. Rank 0 takes
notes of it (`Twin`) and sends them with the next pass; the others never see a side network, a request or a token that was not run.
A pass that fails on any rank ends that process, and whoever started the ranks then ends the others: no rank goes on with half a pass.
"""

from __future__ import annotations

import os
import signal
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lst_scale.backbone.taps import Backbone, TapRequest, TargetState
from lst_scale.serving.passes import Passes, Prompt
from lst_scale.serving.rows import Rows, joined
from lst_scale.system.distributed import Channel

T = TypeVar("T")


class Twin:
    """Rows as other ranks hold them, by a number; `note` keeps what is to be done there until they are told."""

    def __init__(self, number: int, note: Callable[..., int]) -> None:
        self.number, self._note = number, note
        weakref.finalize(self, note, "free", number).atexit = False

    def of(self, rows: Sequence[int]) -> Twin:
        """Return some of these rows."""
        return Twin(self._note("of", self.number, list(rows)), self._note)

    def joined(self, parts: Sequence[Twin]) -> Twin:
        """Return the rows of all parts."""
        return Twin(self._note("joined", [part.number for part in parts]), self._note)


class LeadingPasses(Passes):
    """Rank 0's passes: the others are told of each before it runs."""

    def __init__(self, backbone: Backbone, channel: Channel) -> None:
        super().__init__(backbone)
        self._channel, self._notes, self._count = channel, deque[tuple[Any, ...]](), 0

    def read(self, prompts: Sequence[Sequence[int]], context: Rows | None, request: TapRequest) -> list[Prompt]:
        first = self._tell("read", _number_of(context), [list(ids) for ids in prompts], request.layers, results=len(prompts))
        found = _or_end(lambda: super(LeadingPasses, self).read(prompts, context, request))
        return [replace(prompt, rows=self._tagged(prompt.rows, first + place)) for place, prompt in enumerate(found)]

    def read_context(self, ids: Sequence[int]) -> Rows:
        number = self._tell("read_context", list(ids))
        return self._tagged(_or_end(lambda: super(LeadingPasses, self).read_context(ids)), number)

    def extend(self, ids_BT: Tensor, rows: Rows, request: TapRequest) -> tuple[TargetState, Rows]:
        number = self._tell("extend", ids_BT.tolist(), _number_of(rows), request.layers)
        state, longer = _or_end(lambda: super(LeadingPasses, self).extend(ids_BT, rows, request))
        return state, self._tagged(longer, number)

    def nothing_to_do(self) -> None:
        self._channel.tell([])

    def end(self) -> None:
        """Let the others leave."""
        self._channel.tell(None)

    def _tell(self, *what: Any, results: int = 1) -> int:
        """Send what was noted, and what runs now; return the number of its first result."""
        number = self._note(*what)
        self._count += results - 1
        self._channel.tell([self._notes.popleft() for _ in range(len(self._notes))])
        return number

    def _note(self, *what: Any) -> int:
        if what[0] != "free":  # which any thread may note, since it may collect garbage
            self._count += 1
        self._notes.append((self._count, *what))
        return self._count

    def _tagged(self, rows: Rows, number: int) -> Rows:
        return replace(rows, twin=Twin(number, self._note))


def follow(backbone: Backbone, channel: Channel) -> None:
    """Run what rank 0 runs, until it ends. Signals are its own affair: it finishes what it has taken."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    follower = _Follower(Passes(backbone))
    while (notes := channel.hear()) is not None:
        for number, what, *arguments in notes:
            follower.do(number, what, arguments)


class _Follower:
    def __init__(self, passes: Passes) -> None:
        self._passes, self._held = passes, dict[int, Rows]()

    def do(self, number: int, what: str, arguments: Sequence[Any]) -> None:
        if what == "free":
            del self._held[arguments[0]]
        elif what == "of":
            self._held[number] = self._held[arguments[0]].of(arguments[1])
        elif what == "joined":
            self._held[number] = joined([self._held[part] for part in arguments[0]])
        elif what == "read_context":
            self._held[number] = self._passes.read_context(arguments[0])
        elif what == "read":
            context, prompts, layers = arguments
            found = self._passes.read(prompts, None if context is None else self._held[context], _request(layers))
            self._held |= {number + place: prompt.rows for place, prompt in enumerate(found)}
        else:
            ids, rows, layers = arguments
            ids_BT = torch.tensor(ids, device=self._passes.backbone.device)
            self._held[number] = self._passes.extend(ids_BT, self._held[rows], _request(layers))[1]


def _request(layers: tuple[int, ...]) -> TapRequest:
    return TapRequest(layers=layers, target_final=True)


def _number_of(rows: Rows | None) -> int | None:
    if rows is None:
        return None
    assert isinstance(rows.twin, Twin), "rows of a divided backbone are on all ranks"
    return rows.twin.number


def _or_end(work: Callable[[], T]) -> T:
    """Do a share of a pass; where that fails the ranks have lost each other, and this process ends at once."""
    try:
        return work()
    except BaseException:
        with suppress(BaseException):
            traceback.print_exc()
        os._exit(1)

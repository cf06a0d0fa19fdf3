"""From a request to rows of the engine, and from their tokens to what a client is told: whole, or piece by piece."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lst_scale.serving.engine import Engine
from lst_scale.serving.jobs import Ended, Generation, Scoring
from lst_scale.serving.networks import Network
from lst_scale.serving.sampling import Chosen, Sampling
from lst_scale.serving.text import GrowingText


class Failed(Exception):
    """The engine could not answer; what happened is in the server's log."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some more text, and the tokens that it came with."""

    text: str
    chosen: Chosen | None = None
    finish_reason: str | None = None


@dataclass(eq=False)
class Reply:
    """One row on its way. Leave it by `close`, whether it is finished or not."""

    job: Generation
    text: GrowingText
    events: asyncio.Queue[Chosen | Ended]
    tokens: list[Chosen] = field(default_factory=list)
    first_after: float | None = None  # seconds from its arrival to its first token

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield text as it comes; the last piece says why it ended."""
        while True:
            event = await self.events.get()
            if self.first_after is None:
                self.first_after = time.monotonic() - self.job.arrived
            if isinstance(event, Ended):
                if event.reason == "error":
                    raise Failed(event.message)
                yield Piece(text=self.text.finish(), finish_reason=event.reason)
                return
            self.tokens.append(event)
            new = self.text.add(event.token)
            if self.text.stopped:
                self.close()
                yield Piece(text=new, chosen=event, finish_reason="stop")
                return
            yield Piece(text=new, chosen=event)

    def close(self) -> None:
        """Let the row leave the batch, if it is still there."""
        self.job.cancelled = True


def ask(
    engine: Engine, network: Network, prompt: tuple[int, ...], sampling: Sampling, max_tokens: int, stops: Sequence[str], tokenizer: Any
) -> Reply:
    """Let a prompt wait for its turn. Call it in the event loop.

    Raises:
        TooManyWait: the queue is full.
    """
    events: asyncio.Queue[Chosen | Ended] = asyncio.Queue()
    job = Generation(network=network, prompt=prompt, sampling=sampling, max_tokens=max_tokens, tell=_to_loop(events.put_nowait))
    engine.submit(job)
    return Reply(job, GrowingText(tokenizer, stops), events)


async def label(engine: Engine, network: Network, prompt: tuple[int, ...], targets: tuple[tuple[int, ...], ...]) -> list[float]:
    """Return the probabilities of labels, given their token ids.

    Raises:
        TooManyWait: the queue is full.
        Failed: the engine could not answer.
    """
    answer: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()

    def put(found: list[float] | Ended) -> None:
        if answer.done():
            return
        if isinstance(found, Ended):
            answer.set_exception(Failed(found.message))
        else:
            answer.set_result(found)

    job = Scoring(network=network, prompt=prompt, targets=targets, tell=_to_loop(put))
    engine.submit(job)
    try:
        return shares(await answer)
    finally:
        job.cancelled = True


def _to_loop(put: Callable[[Any], None]) -> Callable[[Any], None]:
    loop = asyncio.get_running_loop()

    def tell(event: Any) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(put, event)

    return tell


def shares(scores: Sequence[float]) -> list[float]:
    """Return the probabilities of labels beside each other, given their log-likelihoods in nats."""
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]

"""What waits for the engine: a prompt to go on with, or labels to weigh; and how it is told what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from lst_scale.serving.networks import Network
from lst_scale.serving.sampling import Chosen, Sampling

PromptKey = tuple[tuple[int, ...], tuple[int, ...]]  # the token ids of a context, and of the prompt after it


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


Job = TypeVar("Job", Generation, Scoring)


def key_of(job: Generation | Scoring) -> PromptKey:
    """Return what two jobs have in common when the backbone reads one prompt for both."""
    return job.network.context, job.prompt


def tell_failure(jobs: Sequence[Generation | Scoring], error: Exception) -> None:
    """Let those who wait for jobs know that a pass failed."""
    for job in jobs:
        job.tell(Ended("error", type(error).__name__))

"""How likely labels are: each different prompt runs once, each different label after it once, and then the side networks on those.

Shapes: B rows, T tokens, V vocabulary, M pairs of a question and a label.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lst_scale.backbone.taps import TargetState
from lst_scale.serving.answering import Answering, by_shape
from lst_scale.serving.jobs import Scoring, key_of
from lst_scale.serving.passes import Passes, Prompt, states_of
from lst_scale.serving.reading import Reader
from lst_scale.serving.rows import joined


class Scorer:
    """Answers questions that are labels."""

    def __init__(self, passes: Passes, reader: Reader, answering: Answering) -> None:
        self._passes, self._reader, self._answering = passes, reader, answering

    def scores(self, jobs: Sequence[Scoring]) -> list[list[float]]:
        """Return the log-likelihoods in nats of each job's targets."""
        prompts = self._reader.read(jobs)
        pairs = list(dict.fromkeys((key_of(job), target) for job in jobs for target in job.targets))
        held = joined([prompts[key].rows for key, _ in pairs])
        ids_BT = _padded_after([target[:-1] or (0,) for _, target in pairs], self._passes.backbone.device)
        state, _ = self._passes.extend(ids_BT, held, self._reader.request(jobs))
        place = {pair: number for number, pair in enumerate(pairs)}
        scores: dict[int, list[float]] = {}
        for alike in by_shape(jobs).values():
            likely = _Alike(alike, prompts).likelihoods(
                self._answering, lambda asked: states_of(state, [place[key_of(job), target] for job, target in asked])
            )
            scores |= {id(job): [likely[_question(job), target] for target in job.targets] for job in alike}
        return [scores[id(job)] for job in jobs]


class _Alike:
    """Jobs that side networks of one shape answer. A network reads a prompt once, and a label after it once."""

    def __init__(self, jobs: Sequence[Scoring], prompts: dict[Any, Prompt]) -> None:
        self._firsts = list({_question(job): job for job in jobs}.values())
        self._prompts = prompts
        self._pairs = [
            (first, target)
            for first in self._firsts
            for target in dict.fromkeys(target for job in jobs if _question(job) == _question(first) for target in job.targets)
        ]

    def likelihoods(self, answering: Answering, states: Callable[[Any], TargetState]) -> dict[Any, float]:
        first_BV, own = answering.begin([job.network for job in self._firsts], [self._prompts[key_of(job)] for job in self._firsts])
        begun = {_question(job): number for number, job in enumerate(self._firsts)}
        rows = [begun[_question(job)] for job, _ in self._pairs]
        held = None if own is None else own.of(rows)
        logits_MTV, _ = answering.go_on([job.network for job, _ in self._pairs], states(self._pairs), held)
        sums = _likelihoods(first_BV, rows, logits_MTV, [target for _, target in self._pairs])
        return {(_question(job), target): each for (job, target), each in zip(self._pairs, sums, strict=True)}


def portions(jobs: Sequence[Scoring], most: int) -> Iterable[list[Scoring]]:
    """Yield jobs as many at a time as have so many targets together, or one that has more."""
    some: list[Scoring] = []
    for job in jobs:
        if some and sum(len(each.targets) for each in some) + len(job.targets) > most:
            yield some
            some = []
        some.append(job)
    if some:
        yield some


def _question(job: Scoring) -> Hashable:
    """Return what two jobs have in common that ask one network about one prompt."""
    return id(job.network), key_of(job)


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

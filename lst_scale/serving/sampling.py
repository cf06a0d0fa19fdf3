"""The next token: the likeliest, or one drawn at a temperature out of the likeliest that hold a share of the probability."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COLDEST = 1e-4  # below it the likeliest token is taken as at 0: logits divided by less may be no finite numbers any more


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. `temperature` below `COLDEST`: always the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    past_the_end: bool = False  # go on after the token that ends texts, to measure with
    logprobs: int | None = None  # how many of the likeliest tokens are told with each; None: nothing is


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A token, its log-probability in nats, and the likeliest ones with theirs; these are before temperature and top_p."""

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one row; with a seed, always the same ones."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is not None:
            self._generator.manual_seed(sampling.seed)
        else:
            self._generator.seed()

    def choose(self, logits_V: Tensor, likeliest: int) -> Chosen:
        """Return the next token; `likeliest` is that of the highest logit."""
        asked = self._sampling
        token = likeliest if asked.temperature < COLDEST else self._drawn(logits_V.float().cpu())
        if asked.logprobs is None:
            return Chosen(token=token)
        logprobs_V = logits_V.float().log_softmax(-1)
        best = logprobs_V.topk(min(asked.logprobs, len(logprobs_V)))
        told = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Chosen(token=token, logprob=float(logprobs_V[token]), likeliest=told)

    def _drawn(self, logits_V: Tensor) -> int:
        shares_V = (logits_V / self._sampling.temperature).softmax(-1)
        if self._sampling.top_p < 1:
            ordered, order = shares_V.sort(descending=True)
            ordered[ordered.cumsum(0) - ordered >= self._sampling.top_p] = 0  # the first always stays
            return int(order[torch.multinomial(ordered, 1, generator=self._generator)])
        return int(torch.multinomial(shares_V, 1, generator=self._generator))

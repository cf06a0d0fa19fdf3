"""How likely continuations are after their prompts. A prompt that several have in common is read once for all of them.

Shapes: B rows, T target tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lst_scale.data.batches import Batch, collate
from lst_scale.data.columns import Ids
from lst_scale.data.encode import EncodedSplit
from lst_scale.data.rows import Row
from lst_scale.inputs.keys import IGNORED
from lst_scale.methods.base import Predictor
from lst_scale.methods.lst import SharedPasses, inputs_of

POSITIONS = 4096  # whose logits are made at once, unless one row alone has more

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt, at least one, and of what may follow it."""

    source: Tokens
    target: Tokens


@dataclass(frozen=True)
class Likelihood:
    """Of a target, given its source."""

    nats: float  # its log-likelihood
    is_greedy: bool  # whether each of its tokens is the likeliest


class Judge:
    """Says how likely targets are to a model.

    Args:
        batch_size: prompts at once.
    """

    def __init__(self, model: Predictor, passes: SharedPasses, batch_size: int) -> None:
        self._model, self._passes, self._batch_size = model, passes, batch_size

    @torch.no_grad()
    def __call__(self, pairs: Sequence[Pair], advance: Callable[[int], None] = lambda count: None) -> list[Likelihood]:
        """Return how likely each pair's target is, in order; `advance` is told how many more are done."""
        found: dict[Pair, Likelihood] = {}
        grouped: dict[Tokens, list[Tokens]] = {}
        for pair in dict.fromkeys(pairs):
            grouped.setdefault(pair.source, []).append(pair.target)
        # A model that goes on with a text predicts a target from the last token of its prompt on, and what it has read before that token.
        begins: dict[Tokens, list[Tokens]] = {}
        if self._model.spec.one_stack:
            begins = {source: grouped.pop(source) for source in list(grouped) if len(source) == 1}
        for several in self._texts(begins):
            found |= self._of_texts(several)
            advance(len(several))
        for sources, targets in self._prompts(grouped):
            found |= self._of_prompts(sources, targets)
            advance(sum(map(len, targets)))
        return [found[pair] for pair in pairs]

    def _texts(self, grouped: Mapping[Tokens, Sequence[Tokens]]) -> Iterator[list[Pair]]:
        """Yield pairs as many at a time as run together, those of like length."""
        pairs = sorted((Pair(source, target) for source, targets in grouped.items() for target in targets), key=lambda p: len(p.target))
        while pairs:
            count = self._fitting([len(pair.target) for pair in pairs])
            yield pairs[:count]
            pairs = pairs[count:]

    def _prompts(self, grouped: Mapping[Tokens, Sequence[Tokens]]) -> Iterator[tuple[list[Tokens], list[Sequence[Tokens]]]]:
        """Yield prompts as many at a time as run together, and the targets of each: equally many, and of like length."""
        order = sorted(grouped, key=lambda source: (len(grouped[source]), len(source)))
        for _, alike in itertools.groupby(order, key=lambda source: len(grouped[source])):
            sources = list(alike)
            while sources:
                count = self._fitting([max(map(len, grouped[source])) for source in sources])
                yield sources[:count], [grouped[source] for source in sources[:count]]
                sources = sources[count:]

    def _fitting(self, lengths: Sequence[int]) -> int:
        """Return how many of the first rows run together."""
        longest = itertools.accumulate(lengths[: self._batch_size], max)
        return max(1, sum(rows * most <= POSITIONS for rows, most in enumerate(longest, start=1)))

    def _of_texts(self, pairs: Sequence[Pair]) -> dict[Pair, Likelihood]:
        """Return how likely targets are after one token: each text is run as a whole."""
        batch = self._batch([(*pair.source, *pair.target[:-1]) for pair in pairs], [pair.target for pair in pairs])
        device = self._model.device
        logits_BTV = self._model.text_logits(batch.input_ids_BS.to(device), batch.attention_mask_BS.to(device))
        return dict(zip(pairs, _judged(logits_BTV, batch.labels_BT), strict=True))

    def _of_prompts(self, sources: Sequence[Tokens], targets: Sequence[Sequence[Tokens]]) -> dict[Pair, Likelihood]:
        """Return how likely the targets of each prompt are, whose prompts run once; for a model that changes the backbone, if it can."""
        columns = list(zip(*targets, strict=True))
        batches = [self._batch(sources, column) for column in columns]
        several = [inputs_of(batch, self._model.spec).to(self._model.device) for batch in batches]
        request = self._passes.request
        each = itertools.repeat(None) if request is None else self._passes.backbone.each_target(several, request)
        scoring = self._model.scoring(several[0].source_BS, several[0].source_mask_BS)
        found: dict[Pair, Likelihood] = {}
        for column, batch, inputs in zip(columns, batches, several, strict=True):
            taps = next(each)
            judged = _judged(scoring.logits(inputs.target_BT, taps), batch.labels_BT)
            del taps  # or the next target's would be made beside these
            found |= dict(zip(map(Pair, sources, column), judged, strict=True))
        return found

    def _batch(self, sources: Sequence[Tokens], targets: Sequence[Tokens]) -> Batch:
        rows = [Row("", "")] * len(sources)
        pad = self._model.spec.pad_token_id
        return collate(EncodedSplit(rows=rows, input_ids=Ids.of(sources), labels=Ids.of(targets), pad_token_id=pad), range(len(rows)))


def _judged(logits_BTV: Tensor, labels_BT: Tensor) -> list[Likelihood]:
    """Return how likely the labels of each row are by these logits, which may begin with others."""
    labels_BT = labels_BT.to(logits_BTV.device)
    logits_BTV = logits_BTV[:, -labels_BT.shape[1] :]
    there_BT = labels_BT != IGNORED
    chosen_BT = logits_BTV.gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0].float() - logits_BTV.float().logsumexp(-1)
    greedy_B = ((logits_BTV.argmax(-1) == labels_BT) | ~there_BT).all(-1)
    sums_B = chosen_BT.masked_fill(~there_BT, 0.0).sum(-1)
    return [Likelihood(nats, greedy) for nats, greedy in zip(sums_B.tolist(), greedy_B.tolist(), strict=True)]

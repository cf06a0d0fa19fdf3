"""How likely continuations are after their prompts. A prompt that several have in common is read once for all of them.

Targets that differ in their last token alone, such as labels of one token, are one pass.

Shapes: B rows, T target tokens, M targets, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lst_scale.data.batches import Batch, collate
from lst_scale.data.columns import Ids
from lst_scale.data.encode import EncodedSplit
from lst_scale.data.rows import Row as TextRow
from lst_scale.inputs.batch import Inputs
from lst_scale.inputs.keys import IGNORED
from lst_scale.methods.base import Predictor
from lst_scale.methods.lst import SharedPasses, inputs_of

POSITIONS = 4096  # whose logits are made at once, unless one row alone has more

Tokens = tuple[int, ...]
Stem = list[Tokens]  # targets that differ in their last token alone, so that a model reads the same for all


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


@dataclass(frozen=True)
class Row:
    """A prompt, and what may follow it."""

    source: Tokens
    stems: tuple[Stem, ...]

    @property
    def longest(self) -> int:
        """How many tokens its longest target has."""
        return max(len(stem[0]) for stem in self.stems)


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
        prompts = _grouped(pairs)
        # A model that goes on with a text predicts a target from the last token of its prompt on, and what it has read before that token.
        begins = [source for source in prompts if len(source) == 1] if self._model.spec.one_stack else []
        texts = [Row(source, (stem,)) for source in begins for stem in prompts.pop(source).values()]
        for judge, rows in ((self._of_texts, texts), (self._of_prompts, [Row(each, tuple(prompts[each].values())) for each in prompts])):
            for some in self._portions(rows):
                judged = judge(some)
                found |= judged
                advance(len(judged))
        return [found[pair] for pair in pairs]

    def _portions(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Yield rows as many at a time as run together: with equally many stems, of like length, the longest first."""
        order = sorted(rows, key=lambda row: (len(row.stems), -len(row.source) - row.longest))
        for _, several in itertools.groupby(order, key=lambda row: len(row.stems)):
            alike, first = list(several), 0
            while first < len(alike):
                longest = itertools.accumulate((row.longest for row in alike[first : first + self._batch_size]), max)
                count = max(1, sum(number * length <= POSITIONS for number, length in enumerate(longest, start=1)))
                yield alike[first : first + count]
                first += count

    def _of_texts(self, rows: Sequence[Row]) -> dict[Pair, Likelihood]:
        """Return how likely the targets of one stem are after one token: each text is run as a whole."""
        stems = [stem for row in rows for stem in row.stems]
        batch = self._batch([(*row.source, *stem[0][:-1]) for row, stem in zip(rows, stems, strict=True)], stems)
        device = self._model.device
        logits_BTV = self._model.text_logits(batch.input_ids_BS.to(device), batch.attention_mask_BS.to(device))
        return _judged(logits_BTV, [row.source for row in rows], stems)

    def _of_prompts(self, rows: Sequence[Row]) -> dict[Pair, Likelihood]:
        """Return how likely the targets of prompts are. Each prompt runs once."""
        sources = [row.source for row in rows]
        columns = list(zip(*(row.stems for row in rows), strict=True))
        several = [self._inputs(sources, stems).to(self._model.device) for stems in columns]
        request = self._passes.request
        each = itertools.repeat(None) if request is None else self._passes.backbone.each_target(several, request)
        scoring = self._model.scoring(several[0].source_BS, several[0].source_mask_BS)
        found: dict[Pair, Likelihood] = {}
        for number, (stems, inputs) in enumerate(zip(columns, several, strict=True), start=1):
            taps = next(each)
            logits_BTV = scoring.logits(inputs.target_BT, taps, last=number == len(columns))
            del taps  # or the next target's would be made beside these
            found |= _judged(logits_BTV, sources, stems)
        return found

    def _inputs(self, sources: Sequence[Tokens], stems: Sequence[Stem]) -> Inputs:
        inputs = inputs_of(self._batch(sources, stems), self._model.spec)
        return _without_padding_between(inputs) if self._model.spec.one_stack else inputs

    def _batch(self, sources: Sequence[Tokens], stems: Sequence[Stem]) -> Batch:
        labels = Ids.of(stem[0] for stem in stems)
        rows = [TextRow("", "")] * len(sources)
        split = EncodedSplit(rows=rows, input_ids=Ids.of(sources), labels=labels, pad_token_id=self._model.spec.pad_token_id)
        return collate(split, range(len(rows)))


def _without_padding_between(inputs: Inputs) -> Inputs:
    """Return sources with their padding before them: where a window of tokens is seen, a target must follow its source at once."""
    width = inputs.source_BS.shape[1]
    places = (torch.arange(width)[None] + inputs.source_mask_BS.sum(1, keepdim=True)) % width
    source_BS, mask_BS = (each.gather(1, places) for each in (inputs.source_BS, inputs.source_mask_BS))
    return dataclasses.replace(inputs, source_BS=source_BS, source_mask_BS=mask_BS)


def _grouped(pairs: Sequence[Pair]) -> dict[Tokens, dict[Tokens, Stem]]:
    """Return the targets of each source, by all but their last token."""
    found: dict[Tokens, dict[Tokens, Stem]] = {}
    for pair in dict.fromkeys(pairs):
        found.setdefault(pair.source, {}).setdefault(pair.target[:-1], []).append(pair.target)
    return found


def _judged(logits_BTV: Tensor, sources: Sequence[Tokens], stems: Sequence[Stem]) -> dict[Pair, Likelihood]:
    """Return how likely the targets of each row's stem are, M at most, by the logits of one of them."""
    labels_BTM = torch.full((len(stems), max(len(stem[0]) for stem in stems), max(map(len, stems))), IGNORED)
    for row, stem in enumerate(stems):
        labels_BTM[row, : len(stem[0]), : len(stem)] = torch.tensor(stem).T
    labels_BTM = labels_BTM.to(logits_BTV.device)
    there_BTM = labels_BTM != IGNORED
    chosen_BTM = logits_BTV.gather(-1, labels_BTM.clamp(min=0)).float() - logits_BTV.float().logsumexp(-1, keepdim=True)
    greedy_BM = ((logits_BTV.argmax(-1, keepdim=True) == labels_BTM) | ~there_BTM).all(1).tolist()
    sums_BM = chosen_BTM.masked_fill(~there_BTM, 0.0).sum(1).tolist()
    return {
        Pair(source, target): Likelihood(sums_BM[row][number], greedy_BM[row][number])
        for row, (source, stem) in enumerate(zip(sources, stems, strict=True))
        for number, target in enumerate(stem)
    }

"""Score a side network: the answer by generation (the paper's way), or the likeliest label (fast, classification only).

Every rank scores its share of the rows, once each; the texts are gathered and the metric is computed over all of them, so it is
the metric of a single process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lst_scale import distributed
from lst_scale.data.batches import FILLER, Batch, evaluation_batches, merge_predictions
from lst_scale.data.encode import EncodedSplit, answer_in, written_target
from lst_scale.distributed import World
from lst_scale.errors import ArgumentError
from lst_scale.methods.base import Answerer
from lst_scale.recipe import EvaluationRecipe
from lst_scale.side.loss import shift_right


@torch.no_grad()
def predict(
    model: Answerer,
    split: EncodedSplit,
    tokenizer: Any,
    recipe: EvaluationRecipe,
    labels: Sequence[str] | None,
    world: World,
    *,
    target_prefix: str = "",
    longest: int | None = None,
) -> list[str]:
    """Return the predicted text of every row of `split`, in order, on every rank. All ranks must call it.

    `longest` bounds the new tokens when the recipe does not; None: the longest target.
    """
    if recipe.method == "likelihood" and not labels:
        raise ArgumentError("evaluation.method=likelihood needs a task with labels: write evaluation.method=generation")
    longest = longest or max(len(target) for target in split.labels)
    mine: list[tuple[int, str]] = []
    replica = model.replica
    batches: Iterator[Batch] = evaluation_batches(
        split, batch_size=recipe.batch_size, rank=replica.index, world_size=replica.count, equally_many=replica.in_step
    )
    # As many rounds on every rank, so that all can leave together between two batches.
    for _ in range(-(-len(split.rows) // (recipe.batch_size * replica.count))):
        distributed.poll_interruption(world)
        batch = next(batches, None)
        if batch is None:
            continue
        texts = answer(model, batch, tokenizer, recipe, labels, longest, target_prefix)
        mine.extend((row, text) for row, text in zip(batch.indices, texts, strict=True) if row != FILLER)
    # Ranks that share a copy of the backbone answered the same rows: the first one speaks.
    by_replica = dict(reversed(distributed.gather((replica.index, mine))))
    return merge_predictions(by_replica.values(), len(split.rows))


@torch.no_grad()
def answer(
    model: Answerer,
    batch: Batch,
    tokenizer: Any,
    recipe: EvaluationRecipe,
    labels: Sequence[str] | None,
    longest: int,
    target_prefix: str = "",
) -> list[str]:
    """Return the answer to every row of a batch; `longest` bounds generation when the recipe does not."""
    if recipe.method == "likelihood":
        return _likeliest(model, batch, tokenizer, labels or (), target_prefix)
    return [answer_in(text, target_prefix) for text in _generate(model, batch, tokenizer, recipe, longest)]


def _generate(model: Answerer, batch: Batch, tokenizer: Any, recipe: EvaluationRecipe, longest: int) -> list[str]:
    output_BT = model.generate(
        input_ids=batch.input_ids_BS.to(model.device),
        attention_mask=batch.attention_mask_BS.to(model.device),
        num_beams=recipe.num_beams,
        do_sample=False,
        max_new_tokens=recipe.max_new_tokens or longest,
    )
    texts: list[str] = tokenizer.batch_decode(output_BT, skip_special_tokens=True)
    return texts


def _likeliest(model: Answerer, batch: Batch, tokenizer: Any, labels: Sequence[str], target_prefix: str) -> list[str]:
    """Return for each row the label with the largest log-likelihood. The encoders run once for all labels."""
    device, spec = model.device, model.spec
    source = (batch.input_ids_BS.to(device), batch.attention_mask_BS.to(device))
    whole: Any = model if getattr(model, "runs_whole_rows", False) else None
    encoder = None if whole is not None else model.encode(*source)
    scores: list[Tensor] = []
    for label in labels:
        target_1T = torch.tensor([tokenizer(written_target(label, target_prefix)).input_ids], device=device)
        labels_BT = target_1T.expand(len(batch.indices), -1)
        decoder_input_ids_BT = shift_right(labels_BT, spec)
        logits_BTV = whole.logits(*source, decoder_input_ids_BT) if whole is not None else model.decode(decoder_input_ids_BT, encoder)
        token_scores_BT = logits_BTV.float().log_softmax(-1).gather(-1, labels_BT[..., None])[..., 0]
        scores.append(token_scores_BT.sum(-1))
    return [labels[int(best)] for best in torch.stack(scores, -1).argmax(-1)]

"""Score a side network: the answer by generation (the paper's way), or the likeliest label (fast, classification only).

Every rank scores its share of the rows, once each; the texts are gathered and the metric is computed over all of them, so it is
the metric of a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

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
from lst_scale.training.sessions import EVALUATION, Ask, Session

T = TypeVar("T")


def answers(
    model: Answerer,
    split: EncodedSplit,
    tokenizer: Any,
    recipe: EvaluationRecipe,
    labels: Sequence[str] | None,
    world: World,
    target_prefix: str = "",
    *,
    longest: int,
    at: tuple[int, int] = (0, EVALUATION),
) -> Session[list[str]]:
    """A session that ends with the predicted text of every row of `split`, in order, on every rank. All ranks must run it.

    `longest` bounds the new tokens when the recipe does not: that of a training target, since those of the rows to answer are not known.
    """
    if recipe.method == "likelihood" and not labels:
        raise ArgumentError("evaluation.method=likelihood needs a task with labels: write evaluation.method=generation")

    def reply(batch: Batch, source: Any) -> list[str]:
        return answer(model, batch, tokenizer, recipe, labels, longest, target_prefix, source)

    return each_row(model, split, recipe, world, reply, at=at)


def each_row(
    model: Answerer,
    split: EncodedSplit,
    recipe: EvaluationRecipe,
    world: World,
    reply: Callable[[Batch, Any], Sequence[T]],
    *,
    at: tuple[int, int] = (0, EVALUATION),
) -> Session[list[T]]:
    """A session that ends with what `reply` says of every row, in order, on every rank. All ranks must run it.

    It asks for what the frozen backbone makes of each batch's source, where there is one; `reply` gets the batch and that.
    """
    mine: list[tuple[int, T]] = []
    replica = model.replica
    batches: Iterator[Batch] = evaluation_batches(
        split, batch_size=recipe.batch_size, rank=replica.index, world_size=replica.count, equally_many=replica.in_step
    )
    # As many rounds on every rank, so that all can leave together between two batches.
    for number in range(-(-len(split.rows) // (recipe.batch_size * replica.count))):
        distributed.poll_interruption(world)
        batch = next(batches, None)
        source = (yield Ask(at=(*at, number), batch=batch)).prepared if model.asks(recipe.method) else None
        if batch is None:
            continue
        replies = reply(batch, source)
        del source
        mine.extend((row, said) for row, said in zip(batch.indices, replies, strict=True) if row != FILLER)
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
    source: Any = None,
) -> list[str]:
    """Return the answer to every row of a batch.

    Args:
        longest: bounds generation when the recipe does not.
        source: what `model.read` makes of the batch; None: it is made here.
    """
    if recipe.method == "likelihood":
        assert labels, "answers() refuses likelihood without labels"
        scores_BL = label_scores(model, batch, tokenizer, labels, target_prefix, source)
        return [labels[int(best)] for best in scores_BL.argmax(-1)]
    output_BT = model.generate(
        input_ids=batch.input_ids_BS.to(model.device),
        attention_mask=batch.attention_mask_BS.to(model.device),
        num_beams=recipe.num_beams,
        do_sample=False,
        max_new_tokens=recipe.max_new_tokens or longest,
        **({} if source is None else {"source": source}),
    )
    return [answer_in(text, target_prefix) for text in tokenizer.batch_decode(output_BT, skip_special_tokens=True)]


@torch.no_grad()
def label_scores(
    model: Answerer, batch: Batch, tokenizer: Any, labels: Sequence[str], target_prefix: str = "", source: Any = None
) -> Tensor:
    """Return the log-likelihood of every label for every row (B, L), in nats. The encoders run once for all labels."""
    device = model.device
    targets = [torch.tensor([tokenizer(written_target(label, target_prefix)).input_ids], device=device) for label in labels]
    labels_each = [target_1T.expand(len(batch.indices), -1) for target_1T in targets]
    asked = [shift_right(labels_BT, model.spec) for labels_BT in labels_each]
    found = model.logits_of_each(batch.input_ids_BS.to(device), batch.attention_mask_BS.to(device), asked, source)
    scores = [
        logits_BTV.float().log_softmax(-1).gather(-1, labels_BT[..., None])[..., 0].sum(-1)
        for logits_BTV, labels_BT in zip(found, labels_each, strict=True)
    ]
    return torch.stack(scores, -1)

"""Score a side network: the answer by generation (the paper's way), the likeliest label, or a number as the mean of what could be written.

Every rank scores its share of the rows, once each; the texts are gathered and the metric is computed over all of them, so it is
the metric of a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lst_scale.backbone.families import family_of
from lst_scale.data.batches import FILLER, Batch, evaluation_batches, merge_predictions
from lst_scale.data.encode import EncodedSplit, answer_in, target_text
from lst_scale.errors import ArgumentError
from lst_scale.inputs.batch import moved
from lst_scale.methods.base import Predictor, Scoring, as_labels, divided
from lst_scale.recipe.schema import EvaluationRecipe
from lst_scale.system import distributed
from lst_scale.system.distributed import World
from lst_scale.training.paths import Ids, TargetPath, paths_of, scores_along, without_needless_end
from lst_scale.training.sessions import EVALUATION, BackboneRequest, Moment, Session, Want

T = TypeVar("T")


def predict_split(
    model: Predictor,
    split: EncodedSplit,
    tokenizer: Any,
    recipe: EvaluationRecipe,
    labels: Sequence[str] | None,
    world: World,
    target_prefix: str = "",
    *,
    longest: int,
    first_token: bool = False,
    at: Moment = Moment(0, EVALUATION),  # noqa: B008
) -> Session[list[str]]:
    """A session that ends with the predicted text of every row of `split`, in order, on every rank. All ranks must run it.

    `longest` bounds the new tokens when the recipe does not: that of a training target, since those of the rows to answer are not known.
    With `first_token` the likeliest label is that whose first token is. Of an expectation `labels` are the numbers that it is the mean of.
    """
    if recipe.method != "generation" and not labels:
        raise ArgumentError(f"evaluation.method={recipe.method} needs labels, or numbers: write evaluation.method=generation")

    def reply(batch: Batch | None, moment: Moment) -> Session[list[str]]:
        if recipe.method == "generation":
            return generated(model, batch, tokenizer, recipe, longest, target_prefix, at=moment)
        if recipe.method == "expectation":
            return expected(model, batch, tokenizer, labels or (), target_prefix, at=moment)
        return likeliest(model, batch, tokenizer, labels or (), target_prefix, first_token=first_token, at=moment)

    return each_row(model, split, recipe, world, reply, at=at)


def each_row(
    model: Predictor,
    split: EncodedSplit,
    recipe: EvaluationRecipe,
    world: World,
    reply: Callable[[Batch | None, Moment], Session[Sequence[T]]],
    *,
    at: Moment = Moment(0, EVALUATION),  # noqa: B008
) -> Session[list[T]]:
    """A session that ends with what `reply` says of every row, in order, on every rank. All ranks must run it.

    `reply` makes a session of a batch, or of None where this rank has no rows left: it asks for as much then, too.
    """
    mine: list[tuple[int, T]] = []
    replica = model.replica
    batches: Iterator[Batch] = evaluation_batches(
        split, batch_size=recipe.batch_size, rank=replica.index, world_size=replica.count, equally_many=replica.in_step
    )
    # As many rounds on every rank, so that all can leave together between two batches.
    for number in range(count_rounds(model, split, recipe)):
        distributed.poll_interruption(world)
        batch = next(batches, None)
        replies = yield from reply(batch, at._replace(batch=at.batch + number))
        if batch is not None:
            mine.extend((row, said) for row, said in zip(batch.indices, replies, strict=True) if row != FILLER)
    # Ranks that share a copy of the backbone answered the same rows: the first one speaks.
    by_replica = dict(reversed(distributed.gather((replica.index, mine))))
    return merge_predictions(by_replica.values(), len(split))


def count_rounds(model: Predictor, split: EncodedSplit, recipe: EvaluationRecipe) -> int:
    """Return how many batches each rank goes through."""
    return -(-len(split) // (recipe.batch_size * model.replica.count))


def generated(
    model: Predictor, batch: Batch | None, tokenizer: Any, recipe: EvaluationRecipe, longest: int, target_prefix: str = "", *, at: Moment
) -> Session[list[str]]:
    """A session that ends with the generated answer to every row of a batch; `longest` bounds it when the recipe does not."""
    source = (yield BackboneRequest(at=at, batch=batch, want=Want.SOURCE)).prepared
    if batch is None:
        return []
    with torch.no_grad():
        output_BT = family_of(model.spec.model_type, "this model").answers(
            model.generate,
            batch.input_ids_BS.to(model.device),
            batch.attention_mask_BS.to(model.device),
            num_beams=recipe.num_beams,
            do_sample=False,
            max_new_tokens=recipe.max_new_tokens or longest,
            source=source,
            **ends_of(model, tokenizer),
            **({} if batch.images is None else {"image_features": moved(batch.images.features_BIGF, model.device)}),
        )
    return [answer_in(text, target_prefix) for text in tokenizer.batch_decode(output_BT, skip_special_tokens=True)]


def ends_of(model: Predictor, tokenizer: Any) -> dict[str, list[int]]:
    """Return what `generate` is told of the tokens that end an answer, where these are more than the one that ends a text."""
    ends = [model.spec.eos_token_id, tokenizer.eos_token_id]
    return {} if ends[0] == ends[1] else {"eos_token_id": ends}


def likeliest(
    model: Predictor,
    batch: Batch | None,
    tokenizer: Any,
    labels: Sequence[str],
    target_prefix: str = "",
    *,
    first_token: bool = False,
    at: Moment,
) -> Session[list[str]]:
    """A session that ends with the likeliest label of every row of a batch."""
    scores_BL = yield from label_scores(model, batch, tokenizer, labels, target_prefix, first_token=first_token, at=at)
    return [labels[int(best)] for best in scores_BL.argmax(-1)]


def expected(
    model: Predictor, batch: Batch | None, tokenizer: Any, numbers: Sequence[str], target_prefix: str = "", *, at: Moment
) -> Session[list[str]]:
    """A session that ends with a number for every row of a batch: the mean of `numbers`, each as likely as it is to be written.

    Of all answers that has the least squared error where the probabilities are right. Lukasik et al., Regression-aware inference with
    LLMs, 2024 (arXiv 2403.04182).
    """
    targets = without_needless_end(_ids_of(tokenizer, numbers, target_prefix))
    scores_BL = yield from _target_scores(model, batch, targets, at=at)
    return mean_of(numbers, scores_BL)


def mean_of(numbers: Sequence[str], scores_BL: Tensor) -> list[str]:
    """Return the mean of the numbers for every row, given how likely each is (B, L), in nats."""
    values_L = torch.tensor([float(number) for number in numbers], dtype=torch.double)
    return [f"{value:.6g}" for value in (scores_BL.double().cpu().softmax(-1) @ values_L).tolist()]


def label_scores(
    model: Predictor,
    batch: Batch | None,
    tokenizer: Any,
    labels: Sequence[str],
    target_prefix: str = "",
    *,
    first_token: bool = False,
    at: Moment = Moment(0, EVALUATION),  # noqa: B008
) -> Session[Tensor]:
    """A session that ends with the log-likelihood of every label for every row (B, L), in nats; with `first_token` that of its first token.

    A model with a head for labels needs to know what the backbone makes of any.
    """
    targets = _ids_of(tokenizer, labels, target_prefix, most=1 if first_token else None)
    if model.label_head is not None:
        taps = (yield BackboneRequest(at=at, batch=batch, want=Want.TARGET, targets=targets[:1])).prepared
        return torch.empty(0, len(labels)) if batch is None else model.label_head(taps)
    return (yield from _target_scores(model, batch, targets, at=at))


def _ids_of(tokenizer: Any, targets: Sequence[str], prefix: str, most: int | None = None) -> tuple[Ids, ...]:
    return tuple(tuple(tokenizer(text_target=target_text(target, prefix)).input_ids[:most]) for target in targets)


def _target_scores(model: Predictor, batch: Batch | None, targets: Sequence[Ids], *, at: Moment) -> Session[Tensor]:
    """A session that ends with the log-likelihood of every target for every row (B, L), in nats.

    It asks for what the frozen backbone makes of each in turn, but of those that differ in their last token for one; the source is read
    once for all.
    """
    scoring = None if batch is None else _scoring(model, batch)
    paths = paths_of(targets)
    run = tuple(path.ids for path in paths)
    scores: list[Tensor] = []
    for number, path in enumerate(paths):
        taps = (yield BackboneRequest(at=at._replace(target=number), batch=batch, want=Want.TARGET, targets=run)).prepared
        if batch is not None and scoring is not None:
            scores.append(_scores_along(model, scoring, path, targets, batch, taps, last=number + 1 == len(paths)))
        del taps  # or the next path's would be made beside these
    if not scores:
        return torch.empty(0, len(targets))
    found_BL = torch.cat(scores, -1)
    order = torch.tensor([number for path in paths for number in path.along], device=found_BL.device)
    return found_BL[:, order.argsort()]


def _scoring(model: Predictor, batch: Batch) -> Scoring:
    source_BS, mask_BS, _ = divided(batch, batch.labels_BT, model.spec)
    images = () if batch.images is None else (batch.images.to(model.device),)
    return model.scoring(source_BS.to(model.device), mask_BS.to(model.device), *images)


@torch.no_grad()
def _scores_along(
    model: Predictor, scoring: Scoring, path: TargetPath, targets: Sequence[Ids], batch: Batch, taps: Any, *, last: bool
) -> Tensor:
    """Return the log-likelihoods (B, targets along the path) for every row."""
    labels_BT = as_labels(path.ids, batch)
    return scores_along(path, targets, scoring.logits(divided(batch, labels_BT, model.spec)[2].to(model.device), taps, last=last))

"""The end of a run: its best weights answer the scored split and are saved; result.json says what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lst_scale.methods.base import Method
from lst_scale.recipe.schema import Recipe
from lst_scale.runs.logs import Logger
from lst_scale.side.files import CARD
from lst_scale.system import distributed
from lst_scale.system.durable import write_file
from lst_scale.training.answering import Answered, answer_tasks, scored_splits
from lst_scale.training.card import card_of_run
from lst_scale.training.checkpoint import Progress
from lst_scale.training.result import only_answer_sentences, read_start, result_of, summary_sentence, weights_sha256, write_result
from lst_scale.training.sessions import CLOSING, Moment, Session
from lst_scale.training.shared import Shared


def finish(
    recipe: Recipe,
    folder: Path,
    logger: Logger,
    shared: Shared,
    method: Method,
    best: Mapping[str, Tensor],
    progress: Progress,
    *,
    trainable: int,
) -> Session[dict[str, Any]]:
    """Score the best weights on the test split, save them, and write and return result.json. All ranks must run it."""
    answered = yield from answer(method, best, shared, scored_splits(shared.tasks), Moment(progress.step, CLOSING))
    distributed.on_main_rank(shared.world, lambda: method.save(folder / method.FOLDER, best))
    result = result_of(
        recipe,
        shared,
        progress,
        answered,
        start_scores=read_start(folder) if recipe.evaluation.score_start else None,
        trainable=trainable,
        saved_bytes=sum(file.stat().st_size for file in (folder / method.FOLDER).rglob("*") if file.is_file()),
        saved_sha256=distributed.on_main_rank(shared.world, lambda: weights_sha256(folder / method.FOLDER)),
    )
    card = card_of_run(recipe, result, shared.backbone, folder, method.FOLDER)
    distributed.on_main_rank(shared.world, lambda: write_file(folder / method.FOLDER / CARD, card))
    distributed.on_main_rank(shared.world, lambda: write_result(folder, result))
    logger.say(summary_sentence(result, folder))
    for sentence in only_answer_sentences(answered, shared):
        logger.say(sentence)
    return result


def answer(method: Method, weights: Mapping[str, Tensor], shared: Shared, splits: Sequence[str], at: Moment) -> Session[Answered]:
    """Return what these weights' answers to one split of each task are worth."""
    with method.evaluating(weights) as model:
        return (yield from answer_tasks(model, shared, splits, at))

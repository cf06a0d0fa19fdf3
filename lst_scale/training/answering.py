"""Answers to all tasks of a run, each scored by its own metrics, and one score of them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lst_scale.data.rows import targets_of
from lst_scale.data.scores import only_answer, score_rows, together
from lst_scale.methods.base import Predictor
from lst_scale.training.evaluation import count_rounds, predict_split
from lst_scale.training.sessions import EVALUATION, Moment, Session
from lst_scale.training.shared import Shared, TaskRows


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What answers to some splits, one a task, are worth."""

    scores: dict[str, float]
    only: Mapping[str, str]  # tasks all of whose rows got one answer though not all expect it, and that answer


def answer_tasks(
    model: Predictor,
    shared: Shared,
    splits: Sequence[str],
    at: Moment = Moment(0, EVALUATION),  # noqa: B008
) -> Session[Answered]:
    """A session that ends with the scores of one split of each task, on every rank. All ranks must run it."""
    each, only = [], {}
    for rows, name in zip(shared.tasks, splits, strict=True):
        split, task = rows.splits[name], rows.task
        texts = yield from predict_split(
            model,
            split,
            rows.tokenizer,
            rows.evaluation,
            task.choices(rows.evaluation.method),
            shared.world,
            task.target_prefix,
            longest=rows.train.longest_target,
            first_token=task.by_first_token,
            at=at,
        )
        at = at._replace(batch=at.batch + count_rounds(model, split, rows.evaluation))
        each.append(score_rows(task, texts, split.rows))
        if (answer := only_answer(texts, list(targets_of(split.rows)))) is not None:
            only[task.name] = answer
    return Answered(scores=together([rows.task.name for rows in shared.tasks], each), only=only)


def scored_splits(tasks: Sequence[TaskRows]) -> list[str]:
    """Return the split of each task that a result is scored on."""
    return [rows.scored_split for rows in tasks]

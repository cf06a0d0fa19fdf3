"""What stands before every row: a text, examples out of the training rows, or both.

Beside a model that goes on with a text its tokens are run once: their keys and values serve all rows, members, labels and epochs.
Everywhere else it begins each row's source: a model that reads sources as a whole sees it anew with each, and one that is trained
itself has other keys after every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lst_scale.data.encode import target_text
from lst_scale.data.prompts import PromptTokenizer
from lst_scale.data.rows import Row, select_rows, targets_of
from lst_scale.data.tasks import TaskData
from lst_scale.errors import DataError
from lst_scale.recipe.backbone import ContextRecipe

BETWEEN = "\n\n"  # after the text, and after each example


@dataclass(frozen=True, kw_only=True)
class Context:
    """A text that stands before every row, written out."""

    text: str
    rows: tuple[int, ...] = ()  # the training rows among it, counted from 1


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows become ids after a context."""

    tokenizer: Any  # of sources
    before: tuple[int, ...] = ()  # stands before each source
    run_once: tuple[int, ...] = ()  # what the backbone has read before any row

    @property
    def length(self) -> int:
        """How many tokens the context has."""
        return len(self.before) + len(self.run_once)


def with_context(task: TaskData, recipe: ContextRecipe | None) -> tuple[TaskData, Context | None]:
    """Return a task without the training rows that are examples now, and what stands before every other row.

    Raises:
        DataError: too few training rows would be left.
    """
    if recipe is None:
        return task, None
    if recipe.examples is None:
        return task, Context(text=_text(task, recipe, ()))
    if recipe.examples >= len(task.train):
        raise DataError(
            f"backbone.context.examples {recipe.examples} leaves none of the {len(task.train)} training rows to train on: write fewer"
        )
    chosen = drawn(task.train, recipe.examples, recipe.draw or 0, by_label=task.labels is not None)
    left = select_rows(task.train, np.delete(np.arange(len(task.train)), chosen))
    text = _text(task, recipe, [task.train[number] for number in chosen])
    return replace(task, train=left), Context(text=text, rows=tuple(number + 1 for number in chosen))


def _text(task: TaskData, recipe: ContextRecipe, examples: Sequence[Row]) -> str:
    """Return what stands before every row, as rows themselves are written: of conversations the beginning of one, with turns."""
    chat = task.chat
    if chat is not None:
        return chat.head + "".join(f"{row.source}{row.target}{chat.between}" for row in examples)
    apart = "" if task.way.as_written else " "
    each = [f"{row.source}{apart}{target_text(row.target, task.target_prefix)}" for row in examples]
    return "".join(f"{part}{BETWEEN}" for part in ([] if recipe.text is None else [recipe.text]) + each)


def drawn(rows: Sequence[Row], count: int, draw: int, *, by_label: bool) -> list[int]:
    """Return the numbers of `count` rows in random order; of a classification as many of each label as can be."""
    generator = np.random.default_rng(draw)
    order = generator.permutation(len(rows)).tolist()
    if by_label:
        targets, seen, turns = list(targets_of(rows)), Counter[str](), dict[int, int]()
        for number in order:
            turns[number] = seen[targets[number]]
            seen[targets[number]] += 1
        order.sort(key=turns.__getitem__)  # the first of every label, then the second
    chosen = order[:count]
    generator.shuffle(chosen)
    return [int(number) for number in chosen]


def reading_after(context: str | None, tokenizer: Any, *, beside_backbone: bool) -> Reading:
    """Return how rows are read after a context; None: there is none.

    Args:
        beside_backbone: the method leaves the backbone as it is.
    """
    if context is None:
        return Reading(tokenizer=tokenizer)
    if not isinstance(tokenizer, PromptTokenizer):
        return Reading(tokenizer=tokenizer, before=tuple(tokenizer(context, add_special_tokens=False).input_ids))
    ids = tuple(tokenizer(context).input_ids)
    return Reading(tokenizer=tokenizer.going_on(), **{"run_once" if beside_backbone else "before": ids})


def reading_of(context: Sequence[int], tokenizer: Any) -> Reading:
    """Return how rows are read after a context whose token ids a saved side network remembers; without ids there is none."""
    if not context or not isinstance(tokenizer, PromptTokenizer):
        return Reading(tokenizer=tokenizer)
    return Reading(tokenizer=tokenizer.going_on(), run_once=tuple(context))


def sentence_of(context: Context, reading: Reading) -> str:
    """Return what is said of a context before training."""
    rows = f" (training rows {', '.join(map(str, context.rows))}, left out of training)" if context.rows else ""
    how = "run once, before all rows" if reading.run_once else "part of each row's source, beside data.max_source_length"
    return f"context of {reading.length:,} tokens{rows}: {how}"

"""How a finished run answers: what its recipe and its result.json say of that, read back and checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lst_scale.data.measures import number_in
from lst_scale.data.tasks import GLUE
from lst_scale.errors import ArgumentError, fence
from lst_scale.recipe.release import ReleaseTask
from lst_scale.recipe.schema import EvaluationRecipe, Recipe, load_recipe
from lst_scale.recipe.task import FileTask, Task, name_of
from lst_scale.runs.folder import RECIPE, RESULT
from lst_scale.system.durable import sha256_of

_COLUMNS = ("task.source", "task.prompt", "task.messages")
WITH_EFFECT = ("backbone", "evaluation", "data.max_source_length", *_COLUMNS, "task.prefix", "task.template", "task.target_prefix")
LONGEST = 1_000_000  # tokens that a target has at most, to tell a number from damage


class Way(Protocol):
    """How answers are made of a batch, beside the model."""

    @property
    def kind(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...] | None: ...
    @property
    def numbers(self) -> tuple[str, ...] | None: ...
    @property
    def longest(self) -> int | None: ...
    @property
    def evaluation(self) -> EvaluationRecipe: ...
    @property
    def target_prefix(self) -> str: ...
    @property
    def by_first_token(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class ScoredRun:
    """A finished run as `predict` uses it."""

    recipe: Recipe
    task: Task  # the one that is asked, of several
    kind: str  # classification, regression, text
    labels: tuple[str, ...] | None
    numbers: tuple[str, ...] | None  # that an expectation is the mean of; None: a run of an earlier version, or there are too many
    context: str | None  # what stands before every row
    conversational: bool  # rows are conversations
    longest: int | None  # tokens of the longest training target; None: a run of an earlier version, which did not keep it

    @property
    def columns(self) -> Sequence[str]:
        """The fields that the source text is made of."""
        if isinstance(self.task, str):
            return [column for _, column in GLUE[self.task].fields]
        return self.task.text_columns if isinstance(self.task, FileTask) else ()

    @property
    def target_prefix(self) -> str:
        return self.task.target_prefix or "" if isinstance(self.task, FileTask) else ""

    @property
    def by_first_token(self) -> bool:
        return isinstance(self.task, ReleaseTask) and self.task.of.labels is not None

    @property
    def evaluation(self) -> EvaluationRecipe:
        return self.recipe.evaluation_of(self.task)


def read_scored_run(run: Path, overrides: Sequence[str] = (), *, of_several: str | None = None) -> ScoredRun:
    """Read how a finished run answers; `overrides` change its recipe, and task=NAME says which of several tasks is asked.

    Args:
        of_several: what to do with a run on several tasks, where nobody can write task=NAME.

    Raises:
        ArgumentError: it is no finished run, its files are damaged, or an override has no effect on answers.
        RecipeError: its recipe or an override can't be meant.
    """
    if not (run / RECIPE).is_file():
        raise ArgumentError(f"{run} is no run: give a folder that holds {RECIPE} and {RESULT}")
    asked = [override.partition("=")[2] for override in overrides if override.startswith("task=")]
    overrides = [override for override in overrides if not override.startswith("task=")]
    _refuse_without_effect(overrides)
    recipe = load_recipe(str(run / RECIPE), overrides)
    task = _asked_task(run, recipe, asked, of_several)
    result = read_result(run)
    if "ensemble_of" in result:
        raise ArgumentError(f"{run} is an ensemble, which answers by its members: give one of them, and the others by --with")
    with fence(ArgumentError, f"{run / RESULT} is damaged"):
        return ScoredRun(
            recipe=recipe,
            task=task,
            kind=_kind(task),
            labels=_labels(task, _of(result, "labels", task, recipe)),
            numbers=_numbers(task, _of(result, "numbers", task, recipe)),
            context=_context(recipe, result),
            conversational=_conversational(task, _of(result, "conversational", task, recipe)),
            longest=_longest(_of(result, "longest_target", task, recipe)),
        )


def _asked_task(run: Path, recipe: Recipe, asked: Sequence[str], of_several: str | None) -> Task:
    tasks = {name_of(task): task for task in recipe.each_task}
    if len(tasks) == 1 and not asked:
        return recipe.each_task[0]
    if not asked or asked[-1] not in tasks:
        advice = of_several or f"say which of them is asked, such as task={next(iter(tasks))}"
        raise ArgumentError(f"{run} was trained on {', '.join(tasks)}: {advice}")
    return tasks[asked[-1]]


def _of(result: dict[str, Any], key: str, task: Task, recipe: Recipe) -> dict[str, Any]:
    """Return a result as that of one task alone would be, as to `key`."""
    if len(recipe.each_task) == 1 or key not in result:
        return result
    return result | {key: result[key][name_of(task)]}


def read_result(run: Path) -> dict[str, Any]:
    """Return what a finished run's result.json holds.

    Raises:
        ArgumentError: there is none, or it is no JSON object.
    """
    if not (run / RESULT).is_file():
        raise ArgumentError(f"{run} is no finished run: it holds no {RESULT}")
    with fence(ArgumentError, f"{run / RESULT} is damaged"):
        found = json.loads((run / RESULT).read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    return found


def refuse_changed_weights(run: Path, folder: str) -> None:
    """Compare the weights in a folder of a finished run with the digests that its result.json keeps (not of an earlier version).

    Raises:
        ArgumentError: a file of weights is another than the run wrote, or is gone.
    """
    digests = read_result(run).get("saved_sha256", {})
    with fence(ArgumentError, f"{run / RESULT} is damaged"):
        wanted = {name: digest for name, digest in digests.items() if Path(name).name == name}
    for name, digest in wanted.items():
        file = run / folder / name
        with fence(ArgumentError, f"{file} is damaged"):
            if sha256_of(file) != digest:
                raise ValueError("it is not what the run wrote")


def _refuse_without_effect(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0]
        if key.startswith("backbone.context"):
            raise ArgumentError(f"{key} has no effect on predictions, which are made after the context of the run's training: remove it")
        if not any(key == known or key.startswith(f"{known}.") for known in WITH_EFFECT):
            raise ArgumentError(f"{key} has no effect on predictions: remove it (what has: {', '.join(WITH_EFFECT)})")


def _kind(task: Task) -> str:
    if isinstance(task, str):
        return "regression" if GLUE[task].labels is None else "classification"
    return task.kind if isinstance(task, FileTask) else task.of.kind


def _labels(task: Task, result: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the labels that the run was trained with, which its recipe may not list."""
    if _kind(task) != "classification":
        return None
    own = task if not isinstance(task, ReleaseTask) else task.of
    listed = GLUE[own].labels if isinstance(own, str) else own.labels
    if "labels" not in result:  # an earlier version wrote it
        return listed
    labels = result["labels"]
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) and label for label in labels):
        raise ValueError("'labels' is no list of labels")
    if len(set(labels)) < len(labels):
        raise ValueError("'labels' names one twice")
    if listed is not None and tuple(labels) != listed:
        raise ValueError("'labels' are not those of the run's recipe")
    return tuple(labels)


def _numbers(task: Task, result: dict[str, Any]) -> tuple[str, ...] | None:
    numbers = result.get("numbers")
    if numbers is None or _kind(task) != "regression":
        return None
    if not isinstance(numbers, list) or not numbers or not all(isinstance(each, str) and number_in(each) is not None for each in numbers):
        raise ValueError("'numbers' is no list of numbers")
    return tuple(numbers)


def _context(recipe: Recipe, result: dict[str, Any]) -> str | None:
    context = result.get("context")
    if (recipe.backbone.context is None) != (context is None):
        raise ValueError(f"'context' is {'missing' if context is None else 'there'}, which the run's recipe has otherwise")
    if context is not None and not isinstance(context, str):
        raise ValueError("'context' is no text")
    return context


def _conversational(task: Task, result: dict[str, Any]) -> bool:
    found = result.get("conversational", False)
    if type(found) is not bool or (found and (not isinstance(task, FileTask) or task.source is not None)):
        raise ValueError(f"'conversational' is {found!r}, which the run's recipe has otherwise")
    return found


def _longest(result: dict[str, Any]) -> int | None:
    longest = result.get("longest_target")
    if longest is not None and (type(longest) is not int or not 0 < longest <= LONGEST):
        raise ValueError(f"'longest_target' is {longest!r}, no number of tokens")
    return longest

"""Tasks: where rows come from, how they become text, which splits they have and how answers are scored.

GLUE follows the paper's protocol, which is that of the original release: text with field names, digit labels, and test sets made
from what is labelled. One's own files are described in the recipe.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from lst_scale.data import files
from lst_scale.data.chat import Chat, Writer
from lst_scale.data.columns import Numbers
from lst_scale.data.own_rows import is_conversational, rows_of, source_text
from lst_scale.data.prompts import APART, Way
from lst_scale.data.release import endings_of, release_rows
from lst_scale.data.rows import Row, first_of_each_target, keep_rows, known_rows, select_rows, targets_of
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.errors import DataError, printable
from lst_scale.recipe.backbone import BackboneRecipe
from lst_scale.recipe.release import EPOCHS as RELEASE_EPOCHS
from lst_scale.recipe.release import ReleaseTask
from lst_scale.recipe.schema import Recipe
from lst_scale.recipe.task import FileTask, Task, metrics_misfit

SPLIT_SEED = 42
HELD_OUT_ROWS = 1000
FILE_TASK_EPOCHS = 3
BYTES_A_ROW = 200  # of data sets that don't say how large they are
LEAST_BYTES = 200_000  # of a file that may hold as many rows as are kept in a table
MOST_NUMBERS = 256  # that an answer may be the mean of
STREAM_SAMPLE = 2000  # rows of a stream that stand for all where something is looked at before training
FILE_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task with its rows. `labels` is None unless it is a classification, `numbers` unless it is a regression with few targets."""

    name: str
    kind: str  # classification, regression, text
    labels: tuple[str, ...] | None
    numbers: tuple[str, ...] | None = None
    target_prefix: str = ""  # written before every target, not part of the answer
    metrics: tuple[str, ...]
    epochs: int
    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row] | None
    loss: Literal["token_mean", "example_mean"] = "token_mean"
    scored: bool = True  # with example_mean: a row's mean is multiplied by its score
    source_length: int | None = None  # in tokens, where the task has its own limit
    target_length: int | None = None
    by_first_token: bool = False  # labels are told apart by their first token alone, where the likeliest is chosen
    way: Way = APART  # how its rows are tokenized
    chat: Chat | None = None  # of conversations

    def choices(self, method: str) -> tuple[str, ...] | None:
        """Return what an answer by an `evaluation.method` is chosen from, or the mean of; None: it is written freely."""
        return self.numbers if method == "expectation" else self.labels

    def splits(self) -> dict[str, Sequence[Row]]:
        """Return the splits there are, by name."""
        found = {"train": self.train, "validation": self.validation}
        return found | ({"test": self.test} if self.test is not None else {})


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """One line of GLUE. `fields` maps the text's field name to the data set's column."""

    fields: tuple[tuple[str, str], ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    epochs: int
    splitting: str  # "halve" the validation set, "hold out" of training, or "mnli"


# The release writes MNLI's second field without a colon; its numbers, and checkpoints trained with it, depend on that.
GLUE = {
    "cola": GlueTask(fields=(("sentence:", "sentence"),), labels=("0", "1"), metrics=("matthews",), epochs=20, splitting="halve"),
    "sst2": GlueTask(fields=(("sentence:", "sentence"),), labels=("0", "1"), metrics=("accuracy",), epochs=10, splitting="hold out"),
    "mrpc": GlueTask(
        fields=(("sentence1:", "sentence1"), ("sentence2:", "sentence2")),
        labels=("0", "1"),
        metrics=("accuracy", "f1"),
        epochs=20,
        splitting="halve",
    ),
    "qqp": GlueTask(
        fields=(("question1:", "question1"), ("question2:", "question2")),
        labels=("0", "1"),
        metrics=("accuracy", "f1"),
        epochs=10,
        splitting="hold out",
    ),
    "stsb": GlueTask(
        fields=(("sentence1:", "sentence1"), ("sentence2:", "sentence2")),
        labels=None,
        metrics=("pearson", "spearman"),
        epochs=20,
        splitting="halve",
    ),
    "mnli": GlueTask(
        fields=(("premise:", "premise"), ("hypothesis", "hypothesis")),
        labels=("0", "1", "2"),
        metrics=("accuracy",),
        epochs=10,
        splitting="mnli",
    ),
    "qnli": GlueTask(
        fields=(("question:", "question"), ("sentence:", "sentence")),
        labels=("0", "1"),
        metrics=("accuracy",),
        epochs=10,
        splitting="hold out",
    ),
    "rte": GlueTask(
        fields=(("sentence1:", "sentence1"), ("sentence2:", "sentence2")),
        labels=("0", "1"),
        metrics=("accuracy",),
        epochs=20,
        splitting="halve",
    ),
}
DEFAULT_METRICS = {"classification": ("accuracy",), "regression": ("pearson", "spearman"), "text": ("exact_match", "rouge_l")}


def load_tasks(recipe: Recipe) -> list[TaskData]:
    """Return each of the recipe's tasks with all its rows, cut to `data.max_train_rows` and `data.max_eval_rows`.

    Raises:
        DataError: a file, a field or a row is wrong; the message names it.
    """
    return [_load(task, recipe) for task in recipe.each_task]


def load_task(recipe: Recipe) -> TaskData:
    """Return the task of a recipe that has one."""
    (task,) = load_tasks(recipe)
    return task


def _load(task: Task, recipe: Recipe) -> TaskData:
    data = recipe.data
    if isinstance(task, ReleaseTask):
        return _load_release(task, recipe)
    found = _load_glue(task) if isinstance(task, str) else _load_files(task, recipe.backbone)
    train = found.train[: data.max_train_rows]
    return replace(
        found,
        numbers=numbers_of(train) if found.kind == "regression" else None,
        train=train,
        validation=found.validation[: data.max_eval_rows],
        test=None if found.test is None else found.test[: data.max_eval_rows],
    )


def numbers_of(train: Sequence[Row]) -> tuple[str, ...] | None:
    """Return the different targets of a regression's training rows, least first; None: they are too many to be scored one by one."""
    found = set[str]()
    for target in targets_of(train):
        found.add(target)
        if len(found) > MOST_NUMBERS:  # of many rows the rest is not looked at
            return None
    return tuple(sorted(found, key=lambda number: (float(number), number)))


def _load_release(task: ReleaseTask, recipe: Recipe) -> TaskData:
    form, endings = task.of, endings_of(recipe.vision)
    most = {"train": recipe.data.max_train_rows, "validation": recipe.data.max_eval_rows, "test": recipe.data.max_eval_rows}
    train, validation, test = (release_rows(task, split, endings, most[split]) for split in FILE_SPLITS)
    assert train is not None and validation is not None
    return TaskData(
        name=task.format,
        kind=form.kind,
        labels=form.labels,
        metrics=form.metrics,
        epochs=RELEASE_EPOCHS,
        train=train,
        validation=validation,
        test=test,
        loss=form.loss,
        scored=form.scored,
        source_length=form.source_length,
        target_length=form.target_length,
        by_first_token=form.labels is not None,
    )


def glue_row(name: str, record: Mapping[str, Any]) -> Row:
    """Return one GLUE example as the paper writes it: "rte sentence1: ... sentence2: ..." -> "0"."""
    task = GLUE[name]
    # STS-B's target is the score with one decimal; the release means a grid of 0.2 but computes this.
    target = f"{round(float(record['label']), 1)}" if task.labels is None else str(record["label"])
    return Row(source_text(name, task.fields, record), target)


def split_glue(name: str, sets: Mapping[str, Sequence[Row]]) -> dict[str, Sequence[Row]]:
    """Return train, validation and test by the paper's protocol, given GLUE's own labelled sets."""
    rule = GLUE[name].splitting
    if rule == "mnli":
        return {"train": sets["train"], "validation": sets["validation_mismatched"], "test": sets["validation_matched"]}
    if rule == "halve":
        rows, half = sets["validation"], len(sets["validation"]) // 2
        order = _permutation(len(rows))
        return {"train": sets["train"], "validation": select_rows(rows, order[:half]), "test": select_rows(rows, order[half:])}
    rows = sets["train"]
    order = _permutation(len(rows))
    return {
        "train": select_rows(rows, order[HELD_OUT_ROWS:]),
        "validation": select_rows(rows, order[:HELD_OUT_ROWS]),
        "test": sets["validation"],
    }


def _permutation(count: int) -> Numbers:
    import torch

    order: Numbers = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED)).numpy()
    return order


def _load_glue(name: str) -> TaskData:
    task = GLUE[name]
    wanted = ("train", "validation_matched", "validation_mismatched") if name == "mnli" else ("train", "validation")
    sets = files.load_hub_splits("nyu-mll/glue", name, wanted)
    splits = split_glue(name, {split: _glue_rows(name, records) for split, records in sets.items()})
    kind = "regression" if task.labels is None else "classification"
    return TaskData(name=name, kind=kind, labels=task.labels, metrics=task.metrics, epochs=task.epochs, **cast(Any, splits))


def _glue_rows(name: str, records: Any) -> Sequence[Row]:
    rows = (glue_row(name, record) for record in records)
    key = lambda: {"glue": name, "records": records._fingerprint}  # noqa: E731
    return keep_rows(rows, key, tally=False, likely_bytes=BYTES_A_ROW * len(records))


def _load_files(task: FileTask, backbone: BackboneRecipe) -> TaskData:
    chat = chat_of(backbone) if is_conversational(task) else None
    splits = {
        name: file_rows(task, name, STREAM_SAMPLE if task.streaming and name == "train" else None, chat)
        for name in FILE_SPLITS
        if getattr(task, name) is not None
    }
    labels = labels_of(task, splits["train"])
    if labels is not None:
        for name, rows in splits.items():
            refuse_unknown_labels(name if chat is None else f"{name}, each answer a row", rows, labels)
    return TaskData(
        name=task.name,
        kind=task.kind,
        labels=labels,
        target_prefix=task.target_prefix or "",
        metrics=tuple(task.metrics or DEFAULT_METRICS[task.kind]),
        epochs=FILE_TASK_EPOCHS,
        train=splits["train"],
        validation=splits["validation"],
        test=splits.get("test"),
        loss=task.loss,
        way=way_of(task, chat),
        chat=chat,
    )


def chat_of(backbone: BackboneRecipe) -> Chat:
    """Return the chat template of a backbone's tokenizer, as it writes rows after the recipe's context.

    Raises:
        DataError: there is no tokenizer, or no template.
    """
    return Chat(load_tokenizer(backbone.checkpoint, backbone.revision), backbone.checkpoint, backbone.context)


def way_of(task: Task, chat: Chat | None) -> Way:
    """Return how rows of a task are tokenized."""
    if chat is not None:
        return chat.way
    return Way(as_written=True) if isinstance(task, FileTask) and task.prompt is not None else APART


def labels_of(task: FileTask, train: Sequence[Row]) -> tuple[str, ...] | None:
    """Return the labels of a classification, those of its training rows where the recipe names none; None: it is none.

    Raises:
        DataError: a metric can't measure them.
    """
    labels = (task.labels or tuple(sorted(first_of_each_target(train)))) if task.kind == "classification" else None
    if misfit := metrics_misfit(task.kind, task.metrics or DEFAULT_METRICS[task.kind], labels):
        raise DataError(f"task.{misfit}")
    return labels


def file_rows(task: FileTask, split: str, at_most: int | None = None, chat: Writer | None = None) -> Sequence[Row]:
    """Return the rows of one split of one's own files, the first `at_most` of local ones. Many are kept in a table on disk.

    Args:
        chat: writes conversations; None: rows are none.

    Raises:
        DataError: the file, a field or a row is wrong; the message names it.
    """
    name = getattr(task, split)
    rows = (row for found in files.read_records(name, split) for row in rows_of(task, found, chat))
    if at_most is not None:
        return list(itertools.islice(rows, at_most))
    text: dict[str, Any] = {"source": task.source, "target": task.target, "kind": task.kind}
    text |= {"prefix": task.prefix, "template": task.template}
    if name.startswith(files.HUB):
        records = files.hub_split(name, split)
        key, size = {"text": text, "records": records._fingerprint}, BYTES_A_ROW * len(records)
    else:
        states = files.states_of(files.paths_of(name, split))
        key, size = {"text": text, "files": states}, sum(state[1] for state in states)
    if task.source is None:
        text |= {"prompt": task.prompt, "completion": task.completion, "messages": task.messages, "chat": chat and chat.key}
    own = {"images": task.images, "scores": task.score}
    beside = [column for column, given in own.items() if given is not None]
    text |= {column: own[column] for column in beside}
    known = known_rows(key, beside) if size > LEAST_BYTES else None
    tally = task.kind == "classification"
    return known or keep_rows(rows, lambda: key, tally=tally, likely_bytes=size, beside=beside)


def refuse_unknown_labels(split: str, rows: Sequence[Row], labels: Sequence[str]) -> None:
    """Refuse a row whose target is none of the labels.

    Raises:
        DataError: names split, row and label.
    """
    known = frozenset(labels)
    unknown = {number: label for label, number in first_of_each_target(rows).items() if label not in known}
    if unknown:
        raise unknown_label(split, min(unknown), unknown[min(unknown)], labels)


def unknown_label(where: str, number: int, label: str, labels: Sequence[str]) -> DataError:
    return DataError(
        f"{where}: row {number} has the label {printable(repr(label))}; known: {printable(', '.join(labels[:8]))}. "
        "Add it to task.labels, or fix the row"
    )

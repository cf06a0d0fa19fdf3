"""What a recipe says of data: the name of a GLUE task, or the fields of one's own files. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lst_scale.errors import did_you_mean
from lst_scale.recipe.decode import Count, Section
from lst_scale.recipe.release import FORMATS, ReleaseTask
from lst_scale.recipe.template import fields_in
from lst_scale.system.names import Name, PathText

GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
OF_CLASSES = ("f1", "macro_f1", "matthews")
ERRORS = ("mae", "rmse")  # in the targets' unit, less is better
OF_NUMBERS = ("pearson", "spearman", *ERRORS)
OF_TEXTS = ("accuracy", "exact_match", "rouge1", "rouge2", "rougeL", "rouge_l", "bleu", "chrf")
OF_THE_RELEASE = ("vqa_accuracy", "gqa_accuracy", "consistency", "cider")  # of files that hold more than a target a row
METRICS = (*OF_CLASSES, *OF_NUMBERS, *OF_TEXTS)
POSITIVE = "1"  # the label that F1 looks for
_OWN = re.compile(r"([A-Za-z_]\w*(\.[A-Za-z_]\w*)*|.+\.py):[A-Za-z_]\w*")


def _known_metric(name: str) -> str:
    if name in METRICS or _OWN.fullmatch(name):
        return name
    own = " One's own is written module:function." if ":" in name else did_you_mean(name, METRICS)
    raise ValueError(f"{name!r} is not valid.{own}")


def _own_class(name: str) -> str:
    if not _OWN.fullmatch(name):
        raise ValueError(f"{name!r} names no class: write module:Class, or a file beside the recipe as file.py:Class")
    return name


Metric = Annotated[str, AfterValidator(_known_metric)]
OwnName = Annotated[str, AfterValidator(_own_class)]


class FileTask(Section):
    """One's own data: for each split a local .csv, .jsonl or .parquet file, several by a pattern such as data/train-*.csv (csv and jsonl
    may be compressed: .gz, .bz2, .xz, .zst), "embedded:..." or `hub:owner/name[:config][:split]`."""

    name: Name = "custom"  # part of the run's folder
    kind: Literal["classification", "regression", "text"]  # a label, a number, or any text
    train: PathText  # rows to learn from
    validation: PathText  # rows that the best step is chosen by
    test: PathText | None = None  # rows that the result is scored on; None: validation
    streaming: bool = False  # read the rows of train from their files as they are needed: for more than a disk can keep as a table
    # columns that the text is made of. A row is source and target, or prompt and completion, or messages
    source: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    # columns of pictures: paths beside the file, bytes, or `datasets.Image`; the recipe's vision says what is made of them
    images: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    target: str | None = None  # with source: the column of the answer
    prompt: str | None = None  # the column of what stands before an answer: a text, or a list of messages
    completion: str | None = None  # with prompt: the column of the answer, which follows the prompt as it is written; or a list of messages
    messages: str | None = None  # the column of conversations, lists of {role, content}: each turn of the assistant's is an answer
    # over a batch: the mean over all target tokens, or over rows of the mean over a row's own tokens
    loss: Literal["token_mean", "example_mean"] = "token_mean"
    score: str | None = None  # with example_mean: the column of what a row's answer is worth in training
    global_batch_size: Count | None = None  # rows of a step; None: training.global_batch_size
    prefix: str | None = None  # the first words of the text
    template: str | None = None  # the source text with {field}s; None: "prefix field: value field: value"
    target_prefix: str | None = None  # written before every target and cut from answers, such as <extra_id_0> after a template with it
    labels: tuple[str, ...] | None = None  # the classes; None: those of the training rows
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] | None = None  # of METRICS, or one's own as module:function

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that stand before an answer."""
        if self.source is not None:
            return self.source
        return tuple(column for column in (self.prompt or self.messages,) if column is not None)

    @model_validator(mode="after")
    def _a_row_is_said_in_one_way(self) -> FileTask:
        ways = ((self.source, self.target), (self.prompt, self.completion), (self.messages,))
        begun = [way for way in ways if any(columns is not None for columns in way)]
        if len(begun) != 1 or None in begun[0]:
            raise ValueError("a row is source and target, or prompt and completion, or messages: write one of the three, whole")
        for key in ("prefix", "template", "target_prefix"):
            if self.source is None and getattr(self, key) is not None:
                raise ValueError(f"{key} goes with source and target: remove it, and write what it says into {self.text_columns[0]}")
        return self

    @model_validator(mode="after")
    def _template_names_the_source(self) -> FileTask:
        if self.template is None:
            return self
        named, source = set(fields_in(self.template)), set(self.text_columns)
        if named != source:
            wrong = sorted(named ^ source)
            raise ValueError(f"template and source must name the same fields, but {wrong[0]!r} is only in one of them")
        if self.prefix is not None:
            raise ValueError("prefix has no effect beside template: write it into the template")
        return self

    @model_validator(mode="after")
    def _each_metric_once(self) -> FileTask:
        for metric in self.metrics or ():
            if (self.metrics or ()).count(metric) > 1:
                raise ValueError(f"metrics names {metric} twice: remove one")
        return self

    @model_validator(mode="after")
    def _labels_fit_the_kind(self) -> FileTask:
        if self.labels is not None and self.kind != "classification":
            raise ValueError(f"labels has no effect on kind {self.kind}: remove it or write kind: classification")
        for label in self.labels or ():
            if not label.strip():
                raise ValueError(f"labels: {label!r} is empty: a label is a text that can be written")
            if self.labels is not None and self.labels.count(label) > 1:
                raise ValueError(f"labels: {label!r} is there twice: write each label once")
        return self

    @model_validator(mode="after")
    def _columns_are_told_apart(self) -> FileTask:
        if self.score is not None and self.loss != "example_mean":
            raise ValueError(f"score has no effect on loss {self.loss}: remove it or write loss: example_mean")
        answer, source = self.target or self.completion, self.text_columns
        if answer in source:
            named = "source holds" if self.source else "prompt is"
            what = "target" if self.source else "completion"
            raise ValueError(f"{named} {answer!r}, which is the {what}: the answer would stand in the question; remove it there")
        if wrong := {column for column in (answer, *source) if column is not None} & set(self.images or ()):
            raise ValueError(f"images holds {min(wrong)!r}, which is read as text: name columns of pictures there")
        twice = [field for field in source if source.count(field) > 1]
        if twice:
            raise ValueError(f"source names {twice[0]!r} twice: write each field once (template may repeat it)")
        return self

    @model_validator(mode="after")
    def _metrics_fit(self) -> FileTask:
        misfit = metrics_misfit(self.kind, self.metrics or (), self.labels)
        if misfit:
            raise ValueError(misfit)
        return self

    def with_metrics_of(self, folder: Path) -> FileTask:
        """Return the task with each metric of one's own that is a file in `folder` named by that file's whole path."""
        if self.metrics is None:
            return self
        return self.model_copy(update={"metrics": tuple(beside(folder, metric) for metric in self.metrics)})


def which_task(value: Any) -> str:
    """Return the branch that a task as it is written belongs to, as `decode.chosen` calls it."""
    if isinstance(value, str):
        return "<word>"
    is_release = isinstance(value, ReleaseTask) or (isinstance(value, dict) and "format" in value)
    return "<format>" if is_release else "<mapping>"


def written_out(value: Any) -> Any:
    """Return what the short word for a task of the release stands for; anything else as it is."""
    return {"format": value} if value in FORMATS else value


Task = str | FileTask | ReleaseTask


def name_of(task: Task) -> str:
    """Return what a task is called in folders, tables and scores."""
    if isinstance(task, str):
        return task
    return task.name if isinstance(task, FileTask) else task.format


def images_of(task: Task) -> tuple[str, ...]:
    """Return the columns of a task's images, one for each that a row has."""
    if isinstance(task, str):
        return ()
    return task.images or () if isinstance(task, FileTask) else task.of.image_fields


def rows_a_step(task: Task, usual: int) -> int:
    """Return how many rows a step on a task has, given training.global_batch_size."""
    if isinstance(task, str):
        return usual
    share = task.of.share if isinstance(task, ReleaseTask) else 1
    return task.global_batch_size or max(1, int(usual * share))


def method_misfit(kind: str, method: str) -> str | None:
    """Return why such a task can't be answered by an `evaluation.method`, and what to write instead; None: it can."""
    needs = {"likelihood": ("classification", "needs labels"), "expectation": ("regression", "is the mean of numbers")}
    of, why = needs.get(method, (kind, ""))
    if of == kind:
        return None
    instead = {"classification": "likelihood", "regression": "expectation, or generation", "text": "generation"}[kind]
    return f"evaluation.method={method} {why}, which kind {kind} lacks: write evaluation.method={instead}"


def metrics_misfit(kind: str, metrics: Sequence[str], labels: Collection[str] | None) -> str | None:
    """Return why a metric would always say the same of such a task, and what to write instead; None: they fit.

    Args:
        labels: of a classification, as far as they are known.
    """
    for name in metrics:
        if name in OF_CLASSES and kind != "classification":
            return f"metrics: {name} compares classes, which kind {kind} lacks: write {_instead(kind)}"
        if name in OF_TEXTS and kind == "regression":
            return f"metrics: {name} compares texts, and 0.20 is another text than 0.2: write {_instead(kind)}"
        if name in OF_NUMBERS and kind == "text":
            return f"metrics: {name} compares numbers, which kind text lacks: write kind: regression, or {_instead(kind)}"
        if kind == "classification" and labels is not None:
            words = sorted(label for label in labels if not _is_number(label))
            if name in OF_NUMBERS and words:
                return f"metrics: {name} compares numbers, and labels such as {words[0]!r} are none: write {_instead(kind)}"
            if name == "f1" and not (len(labels) == 2 and POSITIVE in labels):
                return (
                    f"metrics: f1 is of two classes, of which {POSITIVE!r} is the positive one: call the labels '0' and '1', "
                    f"or write {_instead(kind)}"
                )
            if name == "matthews" and len(labels) < 2:
                return f"metrics: matthews is 0 for a single label, and there is {min(labels, default='')!r} alone: write {_instead(kind)}"
    return None


def _instead(kind: str) -> str:
    return {
        "classification": "accuracy, macro_f1 or matthews",
        "regression": "pearson, spearman, mae or rmse",
        "text": "exact_match, rougeL, bleu or chrf",
    }[kind]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def beside(folder: Path, metric: str) -> str:
    module, colon, function = metric.rpartition(":")
    if not colon:
        return metric
    file = folder / (module if module.endswith(".py") else f"{module.replace('.', '/')}.py")
    return f"{file.resolve()}:{function}" if file.is_file() else metric

"""What a recipe says of data: the name of a GLUE task, or the fields of one's own files. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal

from pydantic import Field, model_validator

from lst_scale.decode import Section
from lst_scale.names import Name, PathText
from lst_scale.template import fields_in

GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman", "exact_match", "rouge_l", "chrf")
OF_CLASSES = ("f1", "matthews")
OF_NUMBERS = ("pearson", "spearman")
OF_TEXTS = ("accuracy", "exact_match", "rouge_l", "chrf")
POSITIVE = "1"  # the label that F1 looks for


class FileTask(Section):
    """One's own data: a local .csv, .jsonl or .parquet file, "embedded:..." or "hub:owner/name[:config][:split]" for each split."""

    name: Name = "custom"
    kind: Literal["classification", "regression", "text"]
    train: PathText
    validation: PathText
    test: PathText | None = None
    source: tuple[str, ...] = Field(min_length=1)
    target: str
    prefix: str | None = None
    template: str | None = None  # the source text with {field}s; None: "prefix field: value field: value"
    target_prefix: str | None = None  # written before every target and cut from answers, such as <extra_id_0> after a template with it
    labels: tuple[str, ...] | None = None
    metrics: tuple[Literal[METRICS], ...] | None = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _template_names_the_source(self) -> FileTask:
        if self.template is None:
            return self
        named = set(fields_in(self.template))
        if named != set(self.source):
            wrong = sorted(named ^ set(self.source))
            raise ValueError(f"template and source must name the same fields, but {wrong[0]!r} is only in one of them")
        if self.prefix is not None:
            raise ValueError("prefix has no effect beside template: write it into the template")
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
        if self.target in self.source:
            raise ValueError(f"source holds {self.target!r}, which is the target: the answer would stand in the question; remove it there")
        twice = [field for field in self.source if self.source.count(field) > 1]
        if twice:
            raise ValueError(f"source names {twice[0]!r} twice: write each field once (template may repeat it)")
        return self

    @model_validator(mode="after")
    def _metrics_fit(self) -> FileTask:
        misfit = metrics_misfit(self.kind, self.metrics or (), self.labels)
        if misfit:
            raise ValueError(misfit)
        return self


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
            if name in OF_NUMBERS and not all(map(_is_number, labels)):
                return f"metrics: {name} compares numbers, and labels such as {min(labels)!r} are none: write {_instead(kind)}"
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
        "classification": "accuracy or matthews",
        "regression": "pearson and spearman",
        "text": "exact_match, rouge_l or chrf",
    }[kind]


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False

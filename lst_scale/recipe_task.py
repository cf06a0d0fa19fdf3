"""What a recipe says of data: the name of a GLUE task, or the fields of one's own files. Imports no torch."""

from __future__ import annotations

import string
from typing import Literal

from pydantic import Field, model_validator

from lst_scale.decode import Section
from lst_scale.names import Name, PathText

GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman", "exact_match", "rouge_l", "chrf")


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
        try:
            named = {field for _, field, _, _ in string.Formatter().parse(self.template) if field is not None}
        except ValueError as error:
            raise ValueError(f"template {self.template!r}: {error}; write {{{{ for a brace that stands for itself") from error
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
        return self

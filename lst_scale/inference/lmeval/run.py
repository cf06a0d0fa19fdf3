"""`lst-scale eval`: the tasks, then the model, then numbers. What can be wrong with the tasks is found before a backbone is loaded."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lst_scale.errors import ArgumentError
from lst_scale.inference.json_lines import as_json, lines_file
from lst_scale.inference.lmeval.subject import open_subject, refuse_before, refuse_without_template

BOOTSTRAP = 100_000  # draws of standard errors, as in lm_eval


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is evaluated, on what, and how.

    Args:
        folder: of a finished run or a saved side network; None: `checkpoint`, a backbone as it was published, is asked.
        overrides: change how the backbone is held: backbone.precision=nf4.
        include: folders of YAML files with tasks.
        num_fewshot: labelled examples before each question; None: as each task says.
        limit: rows of each task, the first; None: all.
        batch_size: prompts at once; None: as the run was scored.
        most_tokens: of prompt and answer together; None: as many as the backbone has positions.
        with_end: also count the token that ends an answer, as training and `lst-scale predict` do; lm_eval's models don't.
        chat: write prompts as conversations.
        samples: a file for what was answered to each row, as JSON lines.
    """

    folder: Path | None
    checkpoint: str | None = None
    tasks: Sequence[str]
    overrides: Sequence[str] = ()
    include: Sequence[Path] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int | None = None
    most_tokens: int | None = None
    with_end: bool = False
    chat: bool = False
    samples: Path | None = None


def evaluate(asked: Asked, say: Callable[[str], None] = lambda sentence: None) -> dict[str, Any]:
    """Return what lm_eval found, under its own names (`results`, `n-shot`, ...), with `model` and `settings` beside it.

    Raises:
        LstScaleError: the tasks, the run or a file can't be used.
    """
    import lm_eval
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    from lst_scale.inference.lmeval.model import SubjectLM
    from lst_scale.inference.lmeval.tasks import code_of_the_hub_refused, load_tasks, mistakes_of_tasks, refuse_texts_alone

    refuse_before(asked.folder, asked.overrides)
    _seed(DEFAULT_RANDOM_SEED, DEFAULT_OTHER_SEED)
    tasks = load_tasks(asked.tasks, asked.include, asked.num_fewshot, seed=DEFAULT_OTHER_SEED)
    subject = open_subject(asked.folder, asked.checkpoint, asked.overrides)
    with subject.closing, code_of_the_hub_refused():
        if asked.chat:
            refuse_without_template(subject)
        if not subject.model.spec.one_stack:
            refuse_texts_alone(tasks)
        there, batch_size = subject.most_tokens, asked.batch_size or subject.batch_size
        most = there if asked.most_tokens is None else asked.most_tokens
        if not 1 < most <= max(there, 2):
            raise ArgumentError(f"--max-length {most}: prompt and answer have 2 to {there} tokens beside this backbone")
        model = SubjectLM(subject, batch_size=batch_size, most_tokens=most, with_end=asked.with_end, chat=asked.chat)
        with mistakes_of_tasks("a task can't be asked or scored", asked.include, lambda: model.is_asked):
            found = lm_eval.evaluate(
                lm=model,
                task_dict=tasks,
                limit=asked.limit,
                log_samples=asked.samples is not None,
                bootstrap_iters=BOOTSTRAP,
                apply_chat_template=asked.chat,
                fewshot_as_multiturn=asked.chat,
            )
    if model.cut:
        say(f"{model.cut:,} prompts lost their beginning: prompt and answer have {most:,} tokens at most")
    if asked.samples is not None:
        _write_samples(asked.samples, found.pop("samples"))
    settings = {"tasks": list(asked.tasks), "num_fewshot": asked.num_fewshot, "limit": asked.limit, "batch_size": batch_size}
    settings |= {"max_length": most, "cut_prompts": model.cut, "with_end": asked.with_end, "chat": asked.chat}
    kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
    record = {key: found[key] for key in kept if key in found}
    for numbers in (*record["results"].values(), *record.get("groups", {}).values()):
        numbers |= {key: None for key, value in numbers.items() if value == "N/A"}  # a standard error that there is none of
    whole: dict[str, Any] = _in_json({"model": subject.about, "settings": settings, "lm_eval": lm_eval.__version__, **record})
    return whole


@dataclass(frozen=True, kw_only=True)
class Line:
    """One number of a result."""

    task: str
    metric: str
    filter: str
    num_fewshot: int | None
    num_rows: int | None
    value: float | str
    error: float | None  # standard error


def lines_of(record: Mapping[str, Any]) -> Iterator[Line]:
    """Yield the numbers of a result, as a table has them."""
    for task, numbers in record["results"].items():
        for key, value in numbers.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            yield Line(
                task=task,
                metric=metric,
                filter=kind,
                num_fewshot=record["n-shot"].get(task),
                num_rows=record["n-samples"].get(task, {}).get("effective"),
                value=value,
                error=error if isinstance(error, float) else None,
            )


def _seed(first: int, other: int) -> None:
    """Begin what is drawn as lm_eval does, so that a task whose rows are drawn has the same ones."""
    random.seed(first)
    np.random.seed(other)
    torch.manual_seed(other)


def _write_samples(path: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    with lines_file(path) as file:
        for task, rows in samples.items():
            file.write([as_json(_in_json({"task": task, **row}), f"{task}: row {number}") for number, row in enumerate(rows, start=1)])
        file.finish()


def _in_json(record: Mapping[str, Any]) -> Any:
    """Return a record whose values are what JSON has, but for NaN and infinity."""
    return json.loads(json.dumps(record, default=_number_or_text))


def _number_or_text(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else list(value) if isinstance(value, set | tuple) else str(value)

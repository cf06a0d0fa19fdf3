"""The test rows of `llm.py`: answered once by each run, scored alone and together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from llm_recipes import found, validated
from llm_tasks import TASKS

from lst_scale.data.measures import MEASURES
from lst_scale.inference.predict import predict_file
from lst_scale.recipe.schema import Recipe
from lst_scale.serving.batch import answer_file


def line(folder: Path, task: str, title: str, seeds: Sequence[Recipe | tuple[Recipe, ...]]) -> str:
    """Return a row of the table: of each seed a run, or several that answer together."""
    groups = [each if isinstance(each, tuple) else (each,) for each in seeds]
    every = [run for group in groups for run in group]
    answer(folder, every)
    if len(groups[0]) > 1:
        answer(folder, groups[0], "validation")
        validation = score(folder, groups[0], "validation")
    else:
        validation = validated(groups[0][0])
    scores = [score(folder, group) for group in groups]
    rates = ", ".join(f"{run.optimizer.learning_rate:g}" for run in groups[0] if run.method.name != "probe")
    each = " ".join(f"{one:.1f}" for one in scores)
    together = f"{score(folder, every):.1f}" if len(groups) > 1 and TASKS[task].get("kind") != "text" else ""
    trained = sum((found(run) or {})["trainable_parameters"] for run in groups[0])
    return f"| {task} | {title} | {rates} | {validation:.1f} | {statistics.mean(scores):.1f} ({each}) | {together} | {trained:,} |"


def answers_of(folder: Path, run: Recipe, split: str = "test") -> Path:
    return folder / "answers" / f"{run.run_name}{'' if split == 'test' else f'-{split}'}.jsonl"


def answer(folder: Path, runs: Sequence[Recipe], split: str = "test") -> None:
    """Answer the rows of a split; side networks without a context on one pass."""
    missing = [each for each in runs if not answers_of(folder, each, split).exists()]
    if not missing:
        return
    task = missing[0].task_name
    labelled = TASKS[task].get("kind") is None
    asked, folders = folder / task / f"{split}.jsonl", [Path(each.output_dir) / each.run_name for each in missing]
    answers_of(folder, missing[0]).parent.mkdir(exist_ok=True)
    served = all(each.method.name == "lst" and each.backbone.context is None for each in missing)
    if not (served and labelled):
        for each, run in zip(missing, folders, strict=True):
            predict_file([run], asked, answers_of(folder, each, split), probabilities=labelled)
        return
    all_of_them = folder / "answers" / f"{missing[0].run_name}-and-others-{split}.jsonl"
    answer_file(folders, asked, all_of_them, probabilities=True)
    rows = [json.loads(row) for row in all_of_them.read_text().split("\n") if row]
    for each in missing:
        own = [{"probabilities": row[f"probabilities_{each.run_name}"]} for row in rows]
        answers_of(folder, each, split).write_text("".join(json.dumps(row) + "\n" for row in own))


def score(folder: Path, runs: Sequence[Recipe], split: str = "test") -> float:
    """Return the score of a run, or of several whose probabilities, or numbers, are averaged."""
    task = runs[0].task_name
    each = [[json.loads(row) for row in answers_of(folder, run, split).read_text().split("\n") if row] for run in runs]
    targets = [json.loads(row)["target"] for row in (folder / task / f"{split}.jsonl").read_text().split("\n") if row]
    (metric,) = TASKS[task].get("metrics", ("accuracy",))
    if metric == "accuracy":
        chances = [[one["probabilities"] for one in row] for row in zip(*each, strict=True)]
        said = [max(row[0], key=lambda label: sum(one[label] for one in row)) for row in chances]
    elif metric == "pearson" and len(runs) > 1:
        said = [str(statistics.mean(one["prediction"] for one in row)) for row in zip(*each, strict=True)]
    else:
        said = [str(row["prediction"]) for row in each[0]]
    return 100 * MEASURES[metric](said, targets)

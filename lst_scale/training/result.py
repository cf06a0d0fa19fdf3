"""What result.json holds: scores, time, memory, counts, versions and the recipe, enough to compare runs and to repeat one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lst_scale.backbone.taps import Backbone
from lst_scale.data.scores import majority_score, together
from lst_scale.recipe.schema import Recipe
from lst_scale.runs.finished import Finished
from lst_scale.runs.folder import RESULT
from lst_scale.system import distributed
from lst_scale.system.distributed import World
from lst_scale.system.durable import sha256_of, write_file
from lst_scale.training.answering import Answered
from lst_scale.training.checkpoint import Progress
from lst_scale.training.shared import Shared, TaskRows, peak_memory_bytes
from lst_scale.version import __version__

START = "start.json"  # in a run's folder: scores from before training


def result_of(
    recipe: Recipe,
    shared: Shared,
    progress: Progress,
    answered: Answered,
    *,
    start_scores: Mapping[str, float] | None,
    trainable: int,
    saved_bytes: int,
    saved_sha256: Mapping[str, str],
) -> dict[str, Any]:
    """Return the contents of a finished run's result.json. All ranks must call it.

    Args:
        answered: what its answers are worth.
        start_scores: of the same rows before training; None: nobody asked.
        trainable: how many parameters trained.
        saved_bytes: of the files that hold what was trained.
        saved_sha256: digests of those that hold weights, by name, so that damage to them is found.
    """
    return {
        **scored(recipe, shared, answered),
        "start_scores": None if start_scores is None else _rounded(start_scores),
        "validation_score": None if progress.best_score is None else round(progress.best_score, 4),
        "best_step": progress.best_step,
        **_measurements(progress, shared.world, trainable, shared.backbone),
        "saved_bytes": saved_bytes,
        "saved_sha256": dict(saved_sha256),
        **shared.loading,
        **shared.backbone.facts(),
        **_origin(recipe),
    }


def weights_sha256(folder: Path) -> dict[str, str]:
    """Return the digest of each file of weights in a folder."""
    return {file.name: sha256_of(file) for file in sorted(folder.glob("*.safetensors"))}


def scored(recipe: Recipe, shared: Shared, answered: Answered) -> dict[str, Any]:
    """Return what a result says of answers: of a run's, and of an ensemble's."""
    tasks = shared.tasks
    constant = [majority_score(rows.task, rows.splits[rows.scored_split].rows) for rows in tasks]
    return {
        "name": recipe.name,
        "task": recipe.task_name,
        "seed": recipe.seed,
        "split": _of_each(tasks, [rows.scored_split for rows in tasks]),
        "scores": _rounded(answered.scores),
        "majority": _rounded(together([rows.task.name for rows in tasks], constant)),
        "only_answer": _of_each(tasks, [answered.only.get(rows.task.name) for rows in tasks]),
        "labels": _of_each(tasks, [None if rows.task.labels is None else list(rows.task.labels) for rows in tasks]),
        "numbers": _of_each(tasks, [None if rows.task.numbers is None else list(rows.task.numbers) for rows in tasks]),
        "conversational": _of_each(tasks, [rows.task.chat is not None for rows in tasks]),
        "context": None if shared.context is None else shared.context.text,
        "longest_target": _of_each(tasks, [rows.train.longest_target for rows in tasks]),
        "method": recipe.method.name,
    }


def _of_each(tasks: Sequence[TaskRows], values: Sequence[Any]) -> Any:
    """Return a value for the one task there is, or one for each by its name."""
    return values[0] if len(tasks) == 1 else dict(zip((rows.task.name for rows in tasks), values, strict=True))


def write_start(folder: Path, scores: Mapping[str, float]) -> None:
    """Keep the scores from before training where a resume finds them. Rank 0 only."""
    write_file(folder / START, json.dumps(dict(scores)) + "\n")


def read_start(folder: Path) -> dict[str, float] | None:
    """Return them; None where training had begun before they were asked for."""
    path = folder / START
    scores: dict[str, float] | None = json.loads(path.read_text()) if path.exists() else None
    return scores


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write result.json with the present time. Rank 0 only: the file says that the run is over."""
    finished = {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_file(folder / RESULT, json.dumps(result | finished, indent=2) + "\n")


def summary_sentence(result: dict[str, Any], folder: Path) -> str:
    """Return the run in one sentence, for the log."""
    split = result["split"] if isinstance(result["split"], str) else "mean"
    return (
        f"{split} score {result['scores']['score']:.2f} (majority {result['majority']['score']:.2f}), "
        f"{result['train_seconds']:.0f} s of training, peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB a process "
        f"({result['peak_memory_kind']}), {result['trainable_parameters']:,} trainable parameters "
        f"({result['trainable_share_percent']} %); saved in {folder}"
    )


def only_answer_sentences(answered: Answered, shared: Shared) -> Iterator[str]:
    """Yield what is said of a model that answers every row of a task alike."""
    for rows in shared.tasks:
        if rows.task.name in answered.only:
            name = rows.scored_split
            of = f"{name} rows" if len(shared.tasks) == 1 else f"{name} rows of {rows.task.name}"
            count, answer = len(rows.splits[name]), answered.only[rows.task.name]
            yield f"all {count:,} {of} got the answer {answer!r}, which is not right for all"


def ensemble_result(
    recipe: Recipe,
    shared: Shared,
    answered: Answered,
    *,
    members: Mapping[Path, Finished],
    seconds_to_answer: float,
) -> dict[str, Any]:
    """Return the contents of an ensemble's result.json. What it cost to train is what its members cost; it has no steps of its own.

    Args:
        members: what each run's result.json holds, by the run's folder.
    """
    each = list(members.values())
    return {
        **scored(recipe, shared, answered),
        "ensemble_of": [str(run) for run in members],
        "scores_alone": [one.score for one in each],
        "train_seconds": round(sum(one.train_seconds for one in each), 3),
        "seconds_per_step": None,
        "peak_memory_bytes": max(int(one.peak_memory_bytes) for one in each),  # of training
        "peak_memory_bytes_to_answer": max(distributed.gather(peak_memory_bytes(shared.world))),
        "seconds_to_answer": round(seconds_to_answer, 3),
        "trainable_parameters": sum(one.trainable_parameters for one in each),
        "trainable_share_percent": round(sum(one.trainable_share_percent for one in each), 4),
        "saved_bytes": int(sum(one.saved_bytes for one in each)),
        **_circumstances(shared.world, shared.backbone),
        **shared.loading,
        **shared.backbone.facts(),
        **_origin(recipe),
    }


def _measurements(progress: Progress, world: World, trainable: int, backbone: Backbone) -> dict[str, Any]:
    tokens = progress.source_tokens + progress.target_tokens
    peaks = distributed.gather(peak_memory_bytes(world))
    return {
        "steps": progress.step,
        "train_seconds": round(progress.seconds, 3),
        "tokens_per_second": round(tokens / progress.seconds, 1) if progress.seconds else None,
        "seconds_per_step": round(progress.seconds / progress.step, 4) if progress.step else None,
        "peak_memory_bytes": max(peaks),
        "peak_memory_bytes_by_rank": peaks,
        "trainable_parameters": trainable,
        "trainable_share_percent": round(100 * trainable / backbone.num_parameters, 4),
        **_circumstances(world, backbone),
    }


def _circumstances(world: World, backbone: Backbone) -> dict[str, Any]:
    return {
        "peak_memory_kind": "torch.cuda.max_memory_allocated" if world.device.type == "cuda" else "peak resident set",
        "backbone_parameters": backbone.num_parameters,
        "backbone_bytes_by_rank": distributed.gather(backbone.weight_bytes()),
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
    }


def _rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in scores.items()}


def _origin(recipe: Recipe) -> dict[str, Any]:
    """Return what repeats this: versions, command, recipe."""
    return {"versions": _versions(), "command": sys.argv, "recipe": recipe.model_dump(mode="json")}


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "deepspeed", "bitsandbytes")  # ours is not asked for: a checkout need not be installed
    return {"lst_scale": __version__} | {name: version(name) for name in names} | {"python": sys.version.split()[0]}

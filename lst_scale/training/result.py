"""What result.json holds: scores, time, memory, counts, versions and the recipe, enough to compare runs and to repeat one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lst_scale import __version__
from lst_scale.backbone.taps import Backbone
from lst_scale.data.scores import majority_score
from lst_scale.recipe.schema import Recipe
from lst_scale.runs.finished import Finished
from lst_scale.runs.folder import RESULT
from lst_scale.system import distributed
from lst_scale.system.distributed import World
from lst_scale.system.durable import sha256_of, write_file
from lst_scale.training.checkpoint import Progress
from lst_scale.training.shared import Shared, peak_memory_bytes

START = "start.json"  # in a run's folder: scores from before training


def result_of(
    recipe: Recipe,
    shared: Shared,
    progress: Progress,
    scores: Mapping[str, float],
    *,
    split: str,
    start_scores: Mapping[str, float] | None,
    only_answer: str | None,
    trainable: int,
    saved_bytes: int,
    saved_sha256: Mapping[str, str],
) -> dict[str, Any]:
    """Return the contents of a finished run's result.json. All ranks must call it.

    Args:
        scores: of `split`.
        start_scores: of the same rows before training; None: nobody asked.
        only_answer: what every row of `split` got; None: answers differ.
        trainable: how many parameters trained.
        saved_bytes: of the files that hold what was trained.
        saved_sha256: digests of those that hold weights, by name, so that damage to them is found.
    """
    return {
        **scored(recipe, shared, scores, split=split, only_answer=only_answer),
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


def scored(recipe: Recipe, shared: Shared, scores: Mapping[str, float], *, split: str, only_answer: str | None) -> dict[str, Any]:
    """Return what a result says of answers: of a run's, and of an ensemble's."""
    return {
        "name": recipe.name,
        "task": shared.task.name,
        "seed": recipe.seed,
        "split": split,
        "scores": _rounded(scores),
        "majority": _rounded(majority_score(shared.task, shared.splits[split].rows)),
        "only_answer": only_answer,
        "labels": None if shared.task.labels is None else list(shared.task.labels),
        "context": None if shared.context is None else shared.context.text,
        "longest_target": shared.splits["train"].longest_target,
        "method": recipe.method.name,
    }


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
    return (
        f"{result['split']} score {result['scores']['score']:.2f} (majority {result['majority']['score']:.2f}), "
        f"{result['train_seconds']:.0f} s of training, peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB a process "
        f"({result['peak_memory_kind']}), {result['trainable_parameters']:,} trainable parameters "
        f"({result['trainable_share_percent']} %); saved in {folder}"
    )


def only_answer_sentence(answer: str, split: str, count: int) -> str:
    """Return what is said of a model that answers every row alike."""
    return f"all {count:,} {split} rows got the answer {answer!r}, which is not right for all"


def ensemble_result(
    recipe: Recipe,
    shared: Shared,
    scores: Mapping[str, float],
    *,
    split: str,
    only_answer: str | None,
    members: Mapping[Path, Finished],
    seconds_to_answer: float,
) -> dict[str, Any]:
    """Return the contents of an ensemble's result.json. What it cost to train is what its members cost; it has no steps of its own.

    Args:
        members: what each run's result.json holds, by the run's folder.
    """
    each = list(members.values())
    return {
        **scored(recipe, shared, scores, split=split, only_answer=only_answer),
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

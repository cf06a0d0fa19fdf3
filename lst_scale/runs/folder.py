"""A run's folder: the names of what is in it, and making it ready. `run.py` draws it. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from lst_scale.errors import ArgumentError
from lst_scale.recipe.schema import Recipe, to_yaml
from lst_scale.runs.overwrite import RECIPE, refuse_to_overwrite, remove_run
from lst_scale.system.durable import write_file, writing

RESULT, METRICS = "result.json", "metrics.jsonl"


def folder_of(recipe: Recipe) -> Path:
    """Return where a recipe's run lives."""
    return Path(recipe.output_dir) / recipe.run_name


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Look whether a run may use a folder, and change nothing. `prepare_folder` looks again.

    Raises:
        ArgumentError: it holds a run already, and nothing was said of what to do with that; or both things were; or what stands there
            is not to be overwritten.
    """
    if resume and overwrite:
        raise ArgumentError("--resume and --overwrite exclude each other: write one of them")
    if overwrite:
        refuse_to_overwrite(folder)
    elif not resume and (holds_training(folder) or _waits_for_a_job(folder)):
        raise ArgumentError(f"{folder} already holds a run: add --resume to continue it, --overwrite to start again, or change name=")


def holds_training(folder: Path) -> bool:
    """Return whether a run got so far that starting again would lose something; a start that failed before its first step did not."""
    saved = ("checkpoints", "best", "side_network", "trained", "probe")
    return (folder / RESULT).exists() or any(any((folder / name).glob("*")) for name in saved)


def _waits_for_a_job(folder: Path) -> bool:
    """Return whether a job was submitted that will, or may, train in this folder: none of it has failed so far."""
    jobs = folder / "slurm" / "jobs.jsonl"
    return jobs.exists() and not any(jobs.parent.glob("failure-*.json"))


def prepare_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> str | None:
    """Make a folder ready and write the resolved recipe into it; return what there is to say of what was there.

    Rank 0 only, while it holds the folder (`lock.locked`).

    Raises:
        ArgumentError: as `check_folder` does.
        StorageError: the disk refused.
    """
    check_folder(folder, resume=resume, overwrite=overwrite)
    removed = remove_run(folder) if overwrite else None
    write_recipe(folder, recipe)
    return None if removed is None else removed.sentence(folder)


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the resolved recipe into the folder, made first where there is none."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / RECIPE, to_yaml(recipe))


__all__ = ["METRICS", "RECIPE", "RESULT", "check_folder", "folder_of", "holds_training", "prepare_folder", "write_recipe"]

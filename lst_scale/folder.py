"""A run's folder: the names of what is in it, and making it ready. `run.py` draws it. Imports no torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from lst_scale.errors import ArgumentError
from lst_scale.recipe import Recipe, to_yaml

RECIPE, RESULT, METRICS = "recipe.yaml", "result.json", "metrics.jsonl"


def folder_of(recipe: Recipe) -> Path:
    """Return where a recipe's run lives."""
    return Path(recipe.output_dir) / recipe.run_name


def prepare_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Make the folder and write the resolved recipe into it.

    Raises:
        ArgumentError: it holds a run already, and nothing was said of what to do with that; or both things were.
    """
    if resume and overwrite:
        raise ArgumentError("--resume and --overwrite exclude each other: write one of them")
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    elif not resume and (folder / RECIPE).exists():
        raise ArgumentError(f"{folder} already holds a run: add --resume to continue it, --overwrite to start again, or change name=")
    write_recipe(folder, recipe)


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the resolved recipe into the folder, made first where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECIPE).write_text(to_yaml(recipe))

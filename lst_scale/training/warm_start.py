"""Warm start: `training.start_from` names what an earlier run trained, and a new run begins with those weights and nothing else of it.

Its optimizer, schedule, scores and steps are the new run's own. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lst_scale.errors import ArgumentError
from lst_scale.recipe.schema import Recipe
from lst_scale.runs.folder import RECIPE, folder_of

# Where a run puts what it trained, and the files that it, transformers' Trainer or peft leave there.
_FOLDERS = {
    "side_network": ("ladder_config.json", "model.safetensors"),
    "trained": ("trained.safetensors", "adapter_model.safetensors"),
}


def start_folder(recipe: Recipe) -> Path | None:
    """Return the folder whose weights a recipe starts with; None: it starts afresh. Whether they fit is seen when they are loaded.

    Raises:
        ArgumentError: there are no such weights, or they are another method's.
    """
    if recipe.training.start_from is None:
        return None
    given, method = Path(recipe.training.start_from), recipe.method.name
    ours, other = ("side_network", "trained") if method == "lst" else ("trained", "side_network")
    where = f"training.start_from: {given}"
    if not given.is_dir():
        raise ArgumentError(f"{where} is no folder: give the folder of a finished run, or its {ours}/")
    for folder in (given / ours, given):
        if any((folder / name).is_file() for name in _FOLDERS[ours]):
            return folder
    for folder in (given / other, given):
        if any((folder / name).is_file() for name in _FOLDERS[other]):
            raise ArgumentError(f"{where} holds what another method than {method} trained: give a run of the same method.name")
    if (given / RECIPE).is_file():
        raise ArgumentError(f"{where} is a run that is not finished: end it with --resume first, or give another one")
    raise ArgumentError(f"{where} holds no trained weights: give the folder of a finished run, or its {ours}/")


def refuse_overwritten_start(recipes: Sequence[Recipe]) -> None:
    """Refuse to overwrite the runs of these recipes where one of them begins with the weights of such a run.

    Raises:
        ArgumentError: it does, or has no weights to begin with.
    """
    folders = [folder_of(recipe).resolve() for recipe in recipes]
    for recipe in recipes:
        start = start_folder(recipe)
        if start is not None and any(start.resolve().is_relative_to(folder) for folder in folders):
            raise ArgumentError(
                f"training.start_from: {recipe.training.start_from} is in a run that --overwrite removes: write another name="
            )

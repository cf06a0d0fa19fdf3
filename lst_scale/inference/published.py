"""What of a run's folder goes to the hub, and what is read from there: all that its answers depend on but the backbone."""

from __future__ import annotations

import shutil
from pathlib import Path

from lst_scale.inference.scored_run import ScoredRun
from lst_scale.methods.full import WholeModelTrainee
from lst_scale.methods.lst import LadderTrainee
from lst_scale.methods.probe import Probe
from lst_scale.recipe.task import name_of
from lst_scale.runs.folder import RECIPE, RESULT
from lst_scale.side import card, files

CARD = "README.md"
_TRAINED = (LadderTrainee.FOLDER, WholeModelTrainee.FOLDER, Probe.FOLDER)
WANTED = (RECIPE, RESULT, *(f"{folder}/*" for folder in _TRAINED), *files.wanted(""))


def fill(source: Path, name: str, run: ScoredRun | None, target: Path) -> None:
    """Copy the files of a run, or of a side network that was saved by itself, into a new folder, with a card for `name`."""
    if run is None:
        saved = files.read(source)
        files.write(target, saved.weights, saved.config, saved.identity, saved.spec, called=name)
        return
    target.mkdir()
    for file in (RECIPE, RESULT):
        shutil.copyfile(source / file, target / file)
    for folder in _TRAINED:
        if (source / folder).is_dir():
            shutil.copytree(source / folder, target / folder)
            (target / CARD).write_text(_card(run, name, folder))


def _card(run: ScoredRun, name: str, folder: str) -> str:
    recipe = run.recipe
    asked = f", overrides=[{f'task={name_of(run.task)}'!r}]" if len(recipe.each_task) > 1 else ""
    row = dict.fromkeys(run.columns, "...")
    code = card.code_block(["import lst_scale", "", f"pipe = lst_scale.pipeline({name!r}{asked})", f"print(pipe({row!r}))"])
    lines = [card.head(recipe.backbone.checkpoint), f"# {recipe.task_name}, on {recipe.backbone.checkpoint}", "", *code]
    return "\n".join([*lines, "", f"How it was trained, on what, and its scores: [{folder}/{CARD}]({folder}/{CARD})."]) + "\n"

"""`lst-scale ensemble`: several finished runs on one backbone, scored as one model that averages their probabilities."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lst_scale.errors import ArgumentError
from lst_scale.inference.scored_run import read_result, refuse_changed_weights
from lst_scale.methods.lst import LadderTrainee
from lst_scale.recipe.method import LstRecipe
from lst_scale.recipe.schema import Recipe, load_recipe
from lst_scale.recipe.task import FileTask
from lst_scale.runs.finished import Finished, read_finished
from lst_scale.runs.folder import RECIPE, RESULT, check_folder, folder_of, prepare_folder
from lst_scale.runs.lock import locked
from lst_scale.runs.logs import Logger
from lst_scale.side import files
from lst_scale.side.ensemble import LadderEnsemble
from lst_scale.side.model import LadderModel
from lst_scale.system import distributed
from lst_scale.training.answering import answer_tasks
from lst_scale.training.result import ensemble_result, only_answer_sentences, write_result
from lst_scale.training.sessions import run_alone
from lst_scale.training.shared import load_shared


def score_together(runs: Sequence[Path], name: str, *, overwrite: bool = False) -> tuple[Path, dict[str, Any]]:
    """Score finished runs as an ensemble on the split that they were scored on, and write a run of its own: RUNS/NAME-TASK-seedN.

    Its recipe is the first one's under another name; what its side networks cost together is the sum of what each cost.

    Raises:
        LstScaleError: a run is not finished, is no ladder, or differs in backbone, task, text or way of answering.
    """
    recipes, members, splits = _read(runs)
    recipe = recipes[0].renamed(name)
    folder = folder_of(recipe)
    if folder.resolve() in [run.resolve() for run in runs]:
        raise ArgumentError(f"--name {name} is that of {folder}, a run of the ensemble itself: write another name")
    world = distributed.connect()
    with contextlib.ExitStack() as stack:

        def prepare() -> str | None:
            check_folder(folder, resume=False, overwrite=overwrite)
            stack.enter_context(locked(folder))
            return prepare_folder(folder, recipe, resume=False, overwrite=overwrite)

        said = distributed.on_main_rank(world, prepare)
        logger = stack.enter_context(Logger(folder if world.is_main else None))
        if said is not None:
            logger.say(said)
        shared = load_shared(recipes, world, logger)
        sides = [LadderModel.from_pretrained(run / LadderTrainee.FOLDER, shared.backbone).side for run in runs]
        model = LadderEnsemble(shared.backbone, sides)
        start = time.perf_counter()
        answered = run_alone(answer_tasks(model, shared, splits), shared.passes)
        shared.close()
        result = ensemble_result(
            recipe,
            shared,
            answered,
            members=dict(zip(runs, members, strict=True)),
            seconds_to_answer=time.perf_counter() - start,
        )
        alone = result["scores_alone"]
        distributed.on_main_rank(world, lambda: write_result(folder, result))
        of = splits[0] if len(splits) == 1 else "mean"
        logger.say(
            f"{of} score {answered.scores['score']:.2f} of {len(runs)} side networks together; alone {min(alone):.2f} to {max(alone):.2f}, "
            f"mean {sum(alone) / len(alone):.2f}; saved in {folder}"
        )
        for sentence in only_answer_sentences(answered, shared):
            logger.say(sentence)
    return folder, result


_KEY = {"each_task": "task"}  # what a recipe calls a property


def check_ensemble(runs: Sequence[Path], recipes: Sequence[Recipe], keys: Sequence[str]) -> None:
    """Compare runs with the first of them.

    Raises:
        ArgumentError: one is no ladder, or has another value of one of `keys`.
    """
    for run, recipe in zip(runs, recipes, strict=True):
        if not isinstance(recipe.method, LstRecipe):
            raise ArgumentError(f"{run} trained method {recipe.method.name}, which is no side network: give runs of lst")
        for key in keys:
            if _asked(recipe, key) != _asked(recipes[0], key):
                raise ArgumentError(
                    f"{run} has another {_KEY.get(key, key)} than {runs[0]}: an ensemble answers one question on one backbone"
                )


def _asked(recipe: Recipe, key: str) -> object:
    """Return a section of a recipe without what only training depends on."""
    return recipe.data.model_copy(update={"shuffle_seed": None, "max_train_rows": None}) if key == "data" else getattr(recipe, key)


def _read(runs: Sequence[Path]) -> tuple[list[Recipe], list[Finished], list[str]]:
    """Return recipes and results of runs that can answer together, and the split of each task that they were scored on; changes nothing.

    Raises:
        LstScaleError: they can't, or what one of them holds is damaged.
    """
    if len(runs) < 2:
        raise ArgumentError("an ensemble needs two runs or more: give their folders")
    splits = [_split_of(run) for run in runs]
    for run, split in zip(runs, splits, strict=True):
        if split != splits[0]:
            said, first = (" and ".join(sorted(set(each))) for each in (split, splits[0]))
            raise ArgumentError(f"{run} was scored on {said} rows, {runs[0]} on {first} rows: an ensemble answers one question")
    recipes = [load_recipe(str(run / RECIPE)) for run in runs]
    if len(splits[0]) != len(recipes[0].each_task):
        raise ArgumentError(f"{runs[0] / RESULT} is damaged: 'split' is not of its recipe's tasks")
    for name, task in zip(splits[0], recipes[0].each_task, strict=True):
        if name == "test" and isinstance(task, FileTask) and task.test is None:
            raise ArgumentError(f"{runs[0] / RESULT} is damaged: 'split' is test, and its recipe has no task.test")
    check_ensemble(runs, recipes, ("each_task", "backbone", "data", "evaluation"))
    for run in runs:
        files.read(run / LadderTrainee.FOLDER)
        refuse_changed_weights(run, LadderTrainee.FOLDER)
    return recipes, [read_finished(run) for run in runs], splits[0]


def _split_of(run: Path) -> list[str]:
    """Return the split that a run was scored on, of each of its tasks."""
    result = read_result(run)
    if "ensemble_of" in result:
        raise ArgumentError(f"{run} is an ensemble itself: give the runs that it is made of")
    split, found = result.get("split"), []
    for each in split.values() if isinstance(split, dict) else (split,):
        if each not in ("validation", "test"):
            raise ArgumentError(f"{run / RESULT} is damaged: 'split' is {each!r}, neither validation nor test")
        found.append(str(each))
    return found

"""What can be known to be wrong before torch is imported, all of it at once: files, columns, labels, shapes, folders.

Of a large file the first rows are read, of a checkpoint config.json and the files' names. The run looks at everything again, in full.
Imports no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from lst_scale.backbone.spec import refuse_placement
from lst_scale.data.chat import Unwritten, refuse_missing_template
from lst_scale.data.files import HUB
from lst_scale.data.own_rows import is_conversational
from lst_scale.data.release import endings_of, release_rows
from lst_scale.data.tasks import FILE_SPLITS, file_rows, labels_of, refuse_unknown_labels
from lst_scale.data.tokenizer import refuse_missing_tokenizer
from lst_scale.errors import LstScaleError, NotReady
from lst_scale.methods import check_method
from lst_scale.recipe.members import check_shareable
from lst_scale.recipe.release import ReleaseTask
from lst_scale.recipe.schema import Recipe
from lst_scale.recipe.task import FileTask, Task, method_misfit
from lst_scale.runs.callbacks import check_callbacks
from lst_scale.runs.folder import check_folder, folder_of
from lst_scale.side.count import shape_of, trainable_of
from lst_scale.system.assets import load_ds_config
from lst_scale.training.warm_start import refuse_overwritten_start, start_folder

FIRST_ROWS = 2000  # of each file: some hundredths of a second


def check_before_start(recipes: Sequence[Recipe], *, resume: bool, overwrite: bool = False, together: bool = True) -> None:
    """Look at all that some runs need, and change nothing.

    Args:
        together: whether the recipes share one backbone pass, as members do.

    Raises:
        NotReady: every mistake, one line each.
    """
    problems: list[str] = []
    if together and len(recipes) > 1:
        with _gathering(problems):
            check_shareable(recipes)
    for recipe in recipes:
        _check_folder(recipe, problems, resume=resume, overwrite=overwrite)
        with _gathering(problems):
            check_method(recipe)
        with _gathering(problems):
            start_folder(recipe)
        with _gathering(problems):
            check_callbacks(recipe.logging)
    if overwrite:
        with _gathering(problems):
            refuse_overwritten_start(recipes)
    for name in dict.fromkeys(recipe.training.deepspeed for recipe in recipes):
        with _gathering(problems):
            load_ds_config(name)
    for task, vision in dict.fromkeys((task, recipe.vision) for recipe in recipes for task in recipe.each_task):
        if isinstance(task, FileTask):
            _check_files(task, problems)
        elif isinstance(task, ReleaseTask):
            for split in task.of.files:
                with _gathering(problems):
                    release_rows(task, split, endings_of(vision), FIRST_ROWS)
    for way, task in dict.fromkeys((recipe.evaluation.method, task) for recipe in recipes for task in recipe.each_task):
        if isinstance(task, FileTask) and (misfit := method_misfit(task.kind, way)) is not None:
            problems.append(misfit)
    _check_checkpoints(recipes, problems)
    if problems:
        raise NotReady(problems)


def _check_folder(recipe: Recipe, problems: list[str], *, resume: bool, overwrite: bool) -> None:
    with _gathering(problems):
        check_folder(folder_of(recipe), resume=resume, overwrite=overwrite)


def _check_files(task: FileTask, problems: list[str]) -> None:
    """Look at each file, its columns and its first rows, and at the labels as far as they are known from these."""
    chat = Unwritten() if _is_conversational(task) else None
    found = {}
    for split in FILE_SPLITS:
        path = getattr(task, split)
        if path is not None and not path.startswith(HUB):
            with _gathering(problems):
                found[split] = file_rows(task, split, FIRST_ROWS, chat)
    whole = 0 < len(found.get("train", ())) < FIRST_ROWS
    if (not task.labels and not whole) or chat is not None:  # how a template writes labels is not known yet
        return
    with _gathering(problems):
        labels = labels_of(task, found.get("train", ()))
        for split, rows in found.items() if labels is not None else ():
            with _gathering(problems):
                refuse_unknown_labels(split, rows, labels or ())


def _is_conversational(task: Task) -> bool:
    """Whether rows are conversations; no, where that is not known yet: on the hub, or in a file that `_check_files` tells is wrong."""
    if not isinstance(task, FileTask) or (task.prompt is not None and task.train.startswith(HUB)):
        return False
    try:
        return is_conversational(task)
    except LstScaleError:
        return False


def _check_checkpoints(recipes: Sequence[Recipe], problems: list[str]) -> None:
    """Look at each checkpoint's configuration and tokenizer, and whether what trains fits its shape."""
    shapes = {}
    for checkpoint in dict.fromkeys(recipe.backbone.checkpoint for recipe in recipes):
        with _gathering(problems):
            shapes[checkpoint] = shape_of(checkpoint)
        with _gathering(problems):
            refuse_missing_tokenizer(checkpoint)
    for checkpoint in dict.fromkeys(
        recipe.backbone.checkpoint for recipe in recipes for task in recipe.each_task if _is_conversational(task)
    ):
        with _gathering(problems):
            refuse_missing_template(checkpoint)
    for recipe in recipes:
        shape = shapes.get(recipe.backbone.checkpoint)
        if shape is not None:
            with _gathering(problems):
                refuse_placement(shape.spec, recipe.backbone.placement)
            with _gathering(problems):
                trainable_of(recipe, shape)


@contextlib.contextmanager
def _gathering(problems: list[str]) -> Iterator[None]:
    """Note a mistake, once, instead of stopping at it."""
    try:
        yield
    except LstScaleError as error:
        problems += [line for line in map(str.strip, str(error).split("\n")) if line not in problems]

"""One run, top to bottom: recipe -> data -> backbone -> side network -> training -> score -> files. The page to read first.

runs/NAME-TASK-seedN/
    recipe.yaml        the resolved recipe; `--recipe runs/.../recipe.yaml` repeats the run
    log.txt            sentences
    metrics.jsonl      numbers: train, validation, gates
    checkpoints/       the newest ones, to resume from
    best/              weights of the best validation score
    side_network/      the result: `LadderModel.from_pretrained` and `lst-scale predict` read it; of other methods: trained/, or probe/
    result.json        score, time, memory, counts, versions

`training/shared.py` loads data and backbone, once for all members; `training/member.py` builds one member on them and finishes it
(`training/fitted.py` one that takes no steps: a linear probe).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from lst_scale.errors import MembersFailed
from lst_scale.methods import check_method
from lst_scale.recipe.members import check_shareable, expand_members
from lst_scale.recipe.method import ProbeRecipe
from lst_scale.recipe.schema import Recipe
from lst_scale.runs.callbacks import check_callbacks
from lst_scale.runs.folder import check_folder, folder_of, prepare_folder
from lst_scale.runs.lock import locked
from lst_scale.runs.logs import Logger
from lst_scale.system import distributed
from lst_scale.system.assets import load_ds_config
from lst_scale.training.engine import check_ds_config
from lst_scale.training.fitted import FittedMember
from lst_scale.training.member import Member
from lst_scale.training.probe_start import Starts, begins_as_probe, sample_of
from lst_scale.training.sessions import SomeFailed, fit_together
from lst_scale.training.shared import load_data, load_shared
from lst_scale.training.warm_start import refuse_overwritten_start, start_folder


def run(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> list[dict[str, Any]]:
    """Carry out one recipe, or its members side by side, on this process and its peers, and return what each result.json holds.

    Args:
        recipe: what to do.
        resume: continue from the newest whole checkpoint of each folder, or start when there is none.
        overwrite: throw away what the folders hold.

    Raises:
        LstScaleError: anything the user can fix, in one line.
    """
    return run_together(expand_members(recipe), resume=resume, overwrite=overwrite)


def run_together(recipes: Sequence[Recipe], *, resume: bool = False, overwrite: bool = False) -> list[dict[str, Any]]:
    """Carry out recipes that differ in their side networks alone on one backbone pass, each in its own folder as if it were alone.

    Raises:
        RecipeError: they can't share a pass.
        MembersFailed: some failed, for instance on a loss that is not finite; the others are finished.
        LstScaleError: anything else the user can fix, in one line.
    """
    if len(recipes) > 1:
        check_shareable(recipes)
    ds_config = load_ds_config(recipes[0].training.deepspeed)
    for each in recipes:
        check_method(each)
        start_folder(each)
        check_callbacks(each.logging)
    if overwrite:
        refuse_overwritten_start(recipes)
    world = distributed.connect()
    check_ds_config(ds_config, recipes[0].training.deepspeed)
    folders = [folder_of(each) for each in recipes]
    data = load_data(recipes[0])
    if any(map(begins_as_probe, recipes)):
        sample_of([rows.train for rows in data.tasks])

    with contextlib.ExitStack() as stack:

        def prepare_folders() -> list[str | None]:
            for folder in folders:
                check_folder(folder, resume=resume, overwrite=overwrite)
            for folder in folders:
                stack.enter_context(locked(folder))
            return [prepare_folder(*pair, resume=resume, overwrite=overwrite) for pair in zip(folders, recipes, strict=True)]

        said = distributed.on_main_rank(world, prepare_folders)
        loggers = [
            stack.enter_context(
                Logger(
                    folder if world.is_main else None,
                    speaker=each.run_name if len(recipes) > 1 else None,
                )
            )
            for each, folder in zip(recipes, folders, strict=True)
        ]

        def start_callbacks() -> None:
            for logger, each, folder in zip(loggers, recipes, folders, strict=True):
                logger.callbacks.start(each, folder, resume=resume)

        distributed.on_main_rank(world, start_callbacks)
        for logger, sentence in zip(loggers, said, strict=True):
            if sentence is not None:
                logger.say(sentence)
        shared = load_shared(recipes, world, loggers[0], data)
        stack.callback(shared.close)
        starts = Starts([rows.train for rows in shared.tasks], shared.passes, world)
        # Nothing but its session holds a member, so that one that ends is gone.
        sessions = [
            FittedMember(each, folder, logger, shared).session()
            if isinstance(each.method, ProbeRecipe)
            else Member(each, folder, logger, shared, starts, ds_config, resume=resume).session()
            for each, folder, logger in zip(recipes, folders, loggers, strict=True)
        ]
        del starts
        try:
            return fit_together(sessions, shared.passes)
        except SomeFailed as failed:
            raise MembersFailed({folders[number]: str(error) for number, error in failed.failures.items()}, of=len(recipes)) from None

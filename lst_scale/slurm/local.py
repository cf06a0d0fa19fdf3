"""The same jobs on this machine, without Slurm: one submitit job after another, a few at once."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lst_scale.errors import ArgumentError
from lst_scale.folder import RESULT, write_recipe
from lst_scale.recipe import Recipe
from lst_scale.slurm import runs
from lst_scale.slurm.job import TrainJob
from lst_scale.slurm.options import ClusterOptions

FOREVER = 60 * 24 * 365  # minutes


def run(recipes: Sequence[Recipe], options: ClusterOptions, *, at_most: int) -> list[Path]:
    """Run all, `at_most` at once, each with as many processes as a node would have; return the folders of those that failed.

    Raises:
        ArgumentError: more than one node is asked for.
    """
    if options.nodes > 1:
        raise ArgumentError(f"--local has one machine: write --nodes 1 instead of {options.nodes}")
    waiting, failed = list(recipes), []
    running: list[tuple[Path, Any]] = []
    while waiting or running:
        while waiting and len(running) < at_most:
            recipe = waiting.pop(0)
            running.append((runs.folder_of(recipe), _start(recipe, options)))
        time.sleep(0.2)
        for folder, job in [pair for pair in running if pair[1].done()]:
            running.remove((folder, job))
            if not (folder / RESULT).exists():
                failed.append(folder)
    return failed


def _start(recipe: Recipe, options: ClusterOptions) -> Any:
    import submitit

    folder = runs.folder_of(recipe)
    write_recipe(folder, recipe)
    executor = submitit.LocalExecutor(folder=folder / "slurm" / "local")
    # submitit hides all GPUs unless told how many there are.
    executor.update_parameters(
        tasks_per_node=options.tasks,
        timeout_min=FOREVER,
        stderr_to_stdout=True,
        setup=list(options.setup),
        **({"gpus_per_node": options.gpus_per_node} if options.gpus_per_node else {}),
    )
    os.environ.pop("SLURM_JOB_ID", None)
    return executor.submit(
        TrainJob(
            str(folder),
            cpu=options.gpus_per_node == 0,
            threads=max(1, (os.cpu_count() or 1) // options.tasks),
            max_starts_without_progress=options.max_starts_without_progress,
        )
    )

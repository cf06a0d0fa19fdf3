"""The same jobs on this machine, without Slurm: one submitit job after another, a few at once; what they print is shown as it comes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lst_scale.errors import ArgumentError
from lst_scale.recipe.schema import Recipe
from lst_scale.runs.folder import RESULT, write_recipe
from lst_scale.slurm import runs
from lst_scale.slurm.options import ClusterOptions
from lst_scale.slurm.submission import job_of

FOREVER = 60 * 24 * 365  # minutes


class Echo:
    """Shows the whole lines that a job has added to its log, after the job's name where several run at once."""

    def __init__(self, log: Path, name: str) -> None:
        self._log, self._prefix, self._seen, self._rest = log, f"{name}: " if name else "", 0, b""

    def show(self, *, to_the_end: bool = False) -> None:
        if self._log.is_file():
            with self._log.open("rb") as file:
                file.seek(self._seen)
                added = file.read()
            self._seen += len(added)
            self._rest += added
        *whole, self._rest = self._rest.split(b"\n")
        if to_the_end and self._rest:
            whole, self._rest = [*whole, self._rest], b""
        for line in whole:
            print(self._prefix + line.decode(errors="replace"), flush=True)


def run(groups: Sequence[Sequence[Recipe]], options: ClusterOptions, *, at_most: int) -> list[Path]:
    """Run all groups, `at_most` at once, each with as many processes as a node would have; return the folders of runs that failed.

    Raises:
        ArgumentError: more than one node is asked for.
    """
    if options.nodes > 1:
        raise ArgumentError(f"--local has one machine: write --nodes 1 instead of {options.nodes}")
    waiting, failed = list(groups), []
    running: list[tuple[Sequence[Recipe], Any, Echo]] = []
    while waiting or running:
        while waiting and len(running) < at_most:
            group = waiting.pop(0)
            job = _start(group, options)
            running.append((group, job, Echo(job.paths.stdout, "" if len(groups) == 1 else group[0].run_name)))
        time.sleep(0.2)
        for group, job, echo in list(running):
            done = job.done()
            echo.show(to_the_end=done)
            if done:
                running.remove((group, job, echo))
                failed += [folder for folder in map(runs.folder_of, group) if not (folder / RESULT).exists()]
    return failed


def _start(group: Sequence[Recipe], options: ClusterOptions) -> Any:
    import submitit

    for recipe in group:
        write_recipe(runs.folder_of(recipe), recipe)
    executor = submitit.LocalExecutor(folder=runs.folder_of(group[0]) / "slurm" / "local")
    # submitit hides all GPUs unless told how many there are.
    executor.update_parameters(
        tasks_per_node=options.tasks,
        timeout_min=FOREVER,
        stderr_to_stdout=True,
        setup=list(options.setup),
        **({"gpus_per_node": options.gpus_per_node} if options.gpus_per_node else {}),
    )
    os.environ.pop("SLURM_JOB_ID", None)
    return executor.submit(job_of(group, options, threads=max(1, (os.cpu_count() or 1) // options.tasks)))

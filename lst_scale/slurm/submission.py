"""Run folders into the queue: submitit writes the script, one Slurm task a GPU, no launcher in between."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lst_scale.errors import ArgumentError
from lst_scale.recipe.schema import Recipe, to_yaml
from lst_scale.runs.folder import RECIPE, RESULT, holds_training, write_recipe
from lst_scale.slurm import runs, snapshot
from lst_scale.slurm.job import TrainJob
from lst_scale.slurm.options import ClusterOptions
from lst_scale.slurm.records import append
from lst_scale.system.names import has_control_character, shown

MAX_TIMEOUTS = 1000  # submitit gives up after these; long trainings meet their time limit often
# A signal that asks to leave would kill a rank whose Python has not come as far as handling it; what is ignored here stays so until then.
DEAF_WHILE_STARTING = """bash -c 'trap "" USR1 USR2; exec "$@"' rank """


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a submission would do."""

    new: list[list[Recipe]]  # a list for each job: recipes that train together on one backbone pass
    skipped: list[tuple[Recipe, str]]  # with the reason


def plan(groups: Sequence[Sequence[Recipe]], queue: Mapping[str, Any]) -> Plan:
    """Divide the recipes of some jobs into those to submit and those that are finished or in the queue already.

    Raises:
        ArgumentError: two recipes share a folder, or a folder holds a run of another recipe.
    """
    folders = [runs.folder_of(recipe) for group in groups for recipe in group]
    twice = {folder.name for folder in folders if folders.count(folder) > 1}
    if twice:
        raise ArgumentError(f"{len(folders)} members would share the folders {', '.join(sorted(twice))}: sweep name= too")
    new: list[list[Recipe]] = []
    skipped: list[tuple[Recipe, str]] = []
    for group in groups:
        reasons = [(recipe, _reason_to_skip(recipe, queue)) for recipe in group]
        skipped += [(recipe, reason) for recipe, reason in reasons if reason is not None]
        if waiting := [recipe for recipe, reason in reasons if reason is None]:
            new.append(waiting)
    return Plan(new=new, skipped=skipped)


def _reason_to_skip(recipe: Recipe, queue: Mapping[str, Any]) -> str | None:
    folder = runs.folder_of(recipe)
    job, stored = runs.last_job(folder), folder / RECIPE
    waiting = job is not None and job["job"] in queue
    if stored.exists() and (waiting or holds_training(folder)) and stored.read_text() != to_yaml(recipe):
        raise ArgumentError(f"{folder} holds a run of another recipe: change name= or output_dir=, or remove the folder")
    if (folder / RESULT).exists():
        return "finished"
    return f"in the queue as {job['job']}" if job is not None and waiting else None


def submit(groups: Sequence[Sequence[Recipe]], options: ClusterOptions, *, at_most: int, use_snapshot: bool = True) -> list[str]:
    """Queue what `plan` found new, as one job or one job array, and return each group's job id.

    Args:
        at_most: how many of them may run at once.
    """
    root = _root(groups)
    setup = list(options.setup)
    if use_snapshot:
        setup.append(f"export PYTHONPATH={shlex.quote(str(snapshot.take(root / '.snapshots')))}:$PYTHONPATH")
    jobs: list[str] = []
    for start in range(0, len(groups), limit := _largest_array()):
        part = groups[start : start + limit]
        executor = make_executor(root, options, setup, at_most=at_most, name=part[0][0].name)
        for recipe in itertools.chain(*part):
            write_recipe(runs.folder_of(recipe), recipe)
        with sbatch_errors(), outside_any_job(), executor.batch() if len(part) > 1 else contextlib.nullcontext():
            submitted = [executor.submit(job_of(group, options, threads=options.cpus_per_task)) for group in part]
        for group, job in zip(part, submitted, strict=True):
            record = {"job": job.job_id, "time": time.time(), "log": str(job.paths.stdout), "options": options.model_dump(mode="json")}
            for recipe in group:
                append(runs.folder_of(recipe) / runs.JOBS, record)
            jobs.append(job.job_id)
    return jobs


def script(groups: Sequence[Sequence[Recipe]], options: ClusterOptions, *, at_most: int, use_snapshot: bool = True) -> str:
    """Return the sbatch script that `submit` would hand in, without writing anything."""
    root = _root(groups)
    setup = list(options.setup)
    if use_snapshot:
        setup.append(f"export PYTHONPATH={shlex.quote(str(root / '.snapshots'))}/HASH-OF-THE-CODE:$PYTHONPATH")
    executor = make_executor(root, options, setup, at_most=at_most, name=groups[0][0].name)
    if len(groups) > 1:
        executor.parameters["map_count"] = len(groups)
    text: str = executor._make_submission_file_text(executor._submitit_command_str, uuid.uuid4().hex)
    return text


def make_executor(root: Path, options: ClusterOptions, setup: list[str], *, at_most: int, name: str) -> Any:
    """Return a submitit executor for these options."""
    import submitit

    folder = root / ".slurm" / "%j"
    python = DEAF_WHILE_STARTING + (options.python or shlex.quote(sys.executable))
    with _srun_present():
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=MAX_TIMEOUTS, python=python)
    named = {key: getattr(options, key) for key in ("partition", "account", "qos", "constraint")}
    executor.update_parameters(
        job_name=name,
        time=options.minutes,
        nodes=options.nodes,
        ntasks_per_node=options.tasks,
        cpus_per_task=options.cpus_per_task,
        **{key: value for key, value in named.items() if value is not None},
        **({"gpus_per_node": options.gpus_per_node} if options.gpus_per_node else {}),
        array_parallelism=at_most,
        signal_delay_s=options.signal_delay,
        stderr_to_stdout=True,
        setup=setup,
        # A dead rank ends the job; CPUs are not inherited from sbatch since Slurm 22.05; sites set --export=NONE.
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={options.cpus_per_task}", "--export=ALL"],
        additional_parameters={"requeue": True} | ({"mem": options.memory} if options.memory else {}) | options.further,
    )
    _refuse_control_characters([str(folder), executor._submitit_command_str, executor.parameters])
    return executor


def _refuse_control_characters(values: Any) -> None:
    """All that a script is made of comes through here: a line break in any value would begin a line of its own, which a shell runs.

    Raises:
        ArgumentError: names the value.
    """
    if isinstance(values, str):
        if has_control_character(values):
            raise ArgumentError(f"{shown(values)} holds a control character, which a job's script must not: write it on one line")
    elif isinstance(values, Mapping):
        _refuse_control_characters([*values.keys(), *values.values()])
    elif isinstance(values, list | tuple | set):
        for value in values:
            _refuse_control_characters(value)


def job_of(group: Sequence[Recipe], options: ClusterOptions, *, threads: int) -> TrainJob:
    """Return what each task of one job runs."""
    return TrainJob(
        [str(runs.folder_of(recipe)) for recipe in group],
        cpu=options.gpus_per_node == 0,
        threads=threads,
        max_starts_without_progress=options.max_starts_without_progress,
    )


def _root(groups: Sequence[Sequence[Recipe]]) -> Path:
    return Path(groups[0][0].output_dir).resolve()


def _largest_array() -> int:
    """Return how many elements a job array may have here; 1000 where Slurm does not say."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=20, check=False)
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", done.stdout, re.MULTILINE)
        if found:
            return max(1, int(found[1]) - 1)
    return 1000


@contextlib.contextmanager
def outside_any_job() -> Iterator[None]:
    """Hide the variables of a surrounding job from sbatch; submitit would hide SLURM_CONF too, and find no cluster."""
    prefixes = ("SLURM", "SRUN_", "SBATCH_", "SUBMITIT_")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    wanted = [name for name in os.environ if (name.startswith(prefixes) or name in names) and name != "SLURM_CONF"]
    hidden = {name: os.environ.pop(name) for name in wanted}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def sbatch_errors() -> Iterator[None]:
    """Turn sbatch's refusal into one line."""
    from submitit.core.utils import FailedJobError

    try:
        yield
    except FailedJobError as error:
        lines = [line for line in str(error).splitlines() if "sbatch: error:" in line] or [str(error).strip().splitlines()[-1]]
        raise ArgumentError(f"sbatch refused: {lines[0].split('error: ')[-1]}") from error


@contextlib.contextmanager
def _srun_present() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ArgumentError("there is no srun on this machine: submit from a login node, or add --local") from error

"""Run folders: their names, what is in them, and what Slurm knows of their jobs."""

from __future__ import annotations

import contextlib
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lst_scale.errors import ArgumentError, printable
from lst_scale.recipe.schema import Recipe
from lst_scale.runs import folder
from lst_scale.slurm.records import Fields, count, finite, job_id, mapping, read, text

JOBS, STARTS = "slurm/jobs.jsonl", "slurm/starts.jsonl"
JOB: Fields = {"job": job_id, "time": finite, "log": text, "options": mapping}
START: Fields = {"job": text, "step": count}
FAILURE: Fields = {"time": finite, "line": text}
SECONDS_TO_ANSWER = 20


@dataclass(frozen=True, kw_only=True)
class QueueEntry:
    """One job in squeue."""

    state: str
    reason: str
    nodes: str
    left: str


def folder_of(recipe: Recipe) -> Path:
    """Return where a recipe's run lives, wherever a job is started."""
    return folder.folder_of(recipe).resolve()


def find_runs(output_dir: Path, names: list[str]) -> list[Path]:
    """Return the run folders in `output_dir`, all or those whose name contains one of `names`.

    Raises:
        ArgumentError: there are none, or a name matches none.
    """
    runs = sorted(path.parent for path in output_dir.glob(f"*/{folder.RECIPE}"))
    if not runs:
        raise ArgumentError(f"{output_dir.resolve()} holds no runs: give the output_dir of the recipe")
    for name in names:
        if not any(name in run.name for run in runs):
            raise ArgumentError(f"no run in {output_dir} is called {name}: {', '.join(run.name for run in runs[:6])}")
    return [run for run in runs if not names or any(name in run.name for name in names)]


def last_job(run: Path, odd: list[str] | None = None) -> dict[str, Any] | None:
    """Return the run's latest submission; lines that can't be read are named in `odd`."""
    jobs = read(run / JOBS, JOB, odd)
    return jobs[-1] if jobs else None


def first_failure(run: Path, since: float = 0.0, odd: list[str] | None = None) -> str | None:
    """Return why the run failed, in one line: the earliest rank's word, since later ones only lost contact with it."""
    records = (record for path in sorted(run.glob("slurm/failure-*.json")) for record in read(path, FAILURE, odd))
    found = [record for record in records if record["time"] >= since]
    return str(min(found, key=lambda record: record["time"])["line"]) if found else None


def queue() -> dict[str, QueueEntry]:
    """Return all jobs of this user in squeue by id ("12", "13_4"); none where there is no squeue.

    Raises:
        ArgumentError: squeue does not answer.
    """
    entries = {}
    for line in _ask(["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r|%N|%L"]).splitlines():
        job, state, reason, nodes, left = (line.strip().split("|") + [""] * 5)[:5]
        entries[job] = QueueEntry(state=state, reason=reason, nodes=nodes, left=left)
    return entries


def known_queue(odd: list[str]) -> dict[str, QueueEntry] | None:
    """Return `queue()`; None where squeue does not answer, which is told in `odd`."""
    try:
        return queue()
    except ArgumentError as error:
        odd.append(str(error))
        return None


def accounted(jobs: list[str]) -> dict[str, tuple[str, str]]:
    """Return (state, nodes) of ended jobs by id, from sacct; nothing where there is no accounting."""
    if not jobs:
        return {}
    answer = ""
    with contextlib.suppress(ArgumentError):
        answer = _ask(["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,NodeList", f"--jobs={','.join(jobs)}"])
    rows = [line.split("|") for line in answer.splitlines()]
    return {row[0]: (row[1].split()[0], row[2]) for row in rows if len(row) == 3 and row[1]}


def _ask(command: list[str]) -> str:
    """Return what a program of Slurm's prints; nothing where there is no such program.

    Raises:
        ArgumentError: it does not answer.
    """
    for attempt in range(2):
        time.sleep(attempt)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=False)
        except FileNotFoundError:
            return ""
        except subprocess.TimeoutExpired:
            raise ArgumentError(f"{command[0]} does not answer: {SECONDS_TO_ANSWER} s have passed; try again later") from None
        if done.returncode == 0:
            return done.stdout
    told = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    raise ArgumentError(f"{command[0]} does not answer: {printable(told[-1])}; try again later")

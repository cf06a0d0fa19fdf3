"""What every run is doing, in one line each: from its folder first, from squeue and sacct for what a folder can't know."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lst_scale.folder import METRICS, RESULT
from lst_scale.slurm import runs

RESUBMITTED = ("FAILED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE", "MISSING")


@dataclass(frozen=True, kw_only=True)
class Status:
    """One run. `state` is DONE, NEW (never submitted) or MISSING (submitted, and nobody knows of it any more), or Slurm's own word."""

    run: Path
    state: str
    job: str | None
    step: int | None
    total_steps: int | None
    loss: float | None
    score: float | None
    left: str  # time
    node: str
    why: str  # it failed or waits

    @property
    def needs_resubmission(self) -> bool:
        return self.state in RESUBMITTED


def look(folders: list[Path]) -> list[Status]:
    """Return the status of every run."""
    queue = runs.queue()
    jobs = {run: runs.last_job(run) for run in folders}
    ended = [job["job"] for job in jobs.values() if job is not None and job["job"] not in (queue or {})]
    accounted = runs.accounted(ended)
    return [_status(run, jobs[run], queue, accounted) for run in folders]


def _status(
    run: Path, job: dict[str, Any] | None, queue: dict[str, runs.QueueEntry] | None, accounted: dict[str, tuple[str, str]]
) -> Status:
    metrics = runs.read(run / METRICS)
    train = next((line for line in reversed(metrics) if line["kind"] == "train"), None)
    plan = next((line for line in reversed(metrics) if line["kind"] == "plan"), None)
    scored = next((line for line in reversed(metrics) if line["kind"] == "validation"), None)
    state, node, left, why, score = "NEW", "", "", "", scored["score"] if scored else None
    if (run / RESULT).exists():
        state, score = "DONE", json.loads((run / RESULT).read_text())["scores"]["score"]
    elif job is not None:
        entry = (queue or {}).get(job["job"])
        if entry is not None:
            state, node, left = entry.state, entry.nodes, _left(train, plan) if entry.state == "RUNNING" else ""
            why = entry.reason if entry.state == "PENDING" and entry.reason != "None" else ""
        else:
            state, node = accounted.get(job["job"], ("MISSING", ""))
            why = runs.first_failure(run, since=job["time"]) or ""
            state = "FAILED" if why or state == "COMPLETED" else state  # completed without a result has failed
            why = why or _last_words(job["log"])
    return Status(
        run=run,
        state=state,
        job=job["job"] if job else None,
        step=train["step"] if train else None,
        total_steps=plan["total_steps"] if plan else None,
        loss=train["loss"] if train else None,
        score=score,
        left=left,
        node=node,
        why=why,
    )


def table(found: list[Status]) -> Table:
    """Return the statuses as a table for a terminal."""
    view = Table(box=None, pad_edge=False)
    for column in ("run", "state", "job", "step", "loss", "score", "left", "node", "why"):
        view.add_column(column, overflow="fold", no_wrap=column in ("run", "state"))
    for status in found:
        step = "" if status.step is None else f"{status.step}/{status.total_steps}" if status.total_steps else str(status.step)
        loss = "" if status.loss is None else f"{status.loss:.4f}"
        score = "" if status.score is None else f"{status.score:.2f}"
        view.add_row(status.run.name, status.state, status.job or "", step, loss, score, status.left, status.node, status.why)
    return view


def _left(train: dict[str, Any] | None, plan: dict[str, Any] | None) -> str:
    if train is None or plan is None:
        return ""
    seconds = int((plan["total_steps"] - train["step"]) * train["seconds"])
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _last_words(log: str) -> str:
    """Return the last line of a job's log that tells something."""
    path = Path(log)
    if not path.is_file():
        return ""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()[-50:]]
    telling = [line for line in lines if line.startswith(("error:", "slurmstepd: error", "srun: error"))] or [
        line for line in lines if line
    ]
    return telling[-1][:200] if telling else ""

"""What every run is doing, in one line each: from its folder first, from squeue and sacct for what a folder can't know."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from lst_scale.errors import LstScaleError
from lst_scale.runs.folder import METRICS, RESULT
from lst_scale.slurm import runs
from lst_scale.slurm.records import Fields, count, finite, mapping, number, read, read_one, text

RESUBMITTED = ("FAILED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE", "MISSING")
KINDS: dict[str, Fields] = {
    "train": {"step": count, "loss": number, "seconds": finite},
    "plan": {"total_steps": count},
    "validation": {"step": count, "score": number},
}
LAST_WORDS = 1 << 16  # bytes of a log's end
LONGEST_WHY = 300


@dataclass(frozen=True, kw_only=True)
class Status:
    """One run.

    `state` is DONE, NEW (never submitted), MISSING (submitted, and nobody knows of it), UNKNOWN (submitted, and squeue does not answer),
    DAMAGED, or Slurm's own word.
    """

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


def look(folders: list[Path], odd: list[str] | None = None) -> list[Status]:
    """Return the status of every run; what could not be read in their folders is named in `odd` and left out."""
    odd = [] if odd is None else odd
    jobs = {run: runs.last_job(run, odd) for run in folders}
    queue = runs.known_queue(odd) if any(jobs.values()) else {}
    ended = [] if queue is None else [job["job"] for job in jobs.values() if job is not None and job["job"] not in queue]
    accounted = runs.accounted(ended)
    return [_status(run, jobs[run], queue, accounted, odd) for run in folders]


def _status(
    run: Path,
    job: dict[str, Any] | None,
    queue: dict[str, runs.QueueEntry] | None,
    accounted: dict[str, tuple[str, str]],
    odd: list[str],
) -> Status:
    metrics = read(run / METRICS, {"kind": text}, odd, kinds=KINDS)
    train, plan, scored = (next((line for line in reversed(metrics) if line["kind"] == kind), None) for kind in KINDS)
    state, node, left, why, score = "NEW", "", "", "", scored["score"] if scored else None
    step = max((line["step"] for line in (train, scored) if line), default=None)
    if os.path.lexists(run / RESULT):
        state, score, step, why = _ended(run, score, step, odd)
    elif job is None:
        why = _last_log_line(run / "log.txt") or ("" if metrics else "never started")
    elif queue is None:
        state = "UNKNOWN"
    else:
        entry = queue.get(job["job"])
        if entry is not None:
            state, node, left = entry.state, entry.nodes, _left(train, plan) if entry.state == "RUNNING" else ""
            why = entry.reason if entry.state == "PENDING" and entry.reason != "None" else ""
        else:
            state, node = accounted.get(job["job"], ("MISSING", ""))
            why = runs.first_failure(run, since=job["time"], odd=odd) or ""
            state = "FAILED" if why or state == "COMPLETED" else state  # completed without a result has failed
            why = why or _last_log_line(Path(job["log"]))
    return Status(
        run=run,
        state=state,
        job=job["job"] if job else None,
        step=step,
        total_steps=plan["total_steps"] if plan else None,
        loss=train["loss"] if train else None,
        score=score,
        left=left,
        node=node,
        why=why,
    )


def _ended(run: Path, score: float | None, step: int | None, odd: list[str]) -> tuple[str, float | None, int | None, str]:
    """Return state, score, step and why of a run with a result."""
    try:
        result = read_one(run / RESULT, {"scores": mapping})
        if not number(result["scores"].get("score")):
            raise LstScaleError(f"{run / RESULT}: 'scores' holds no score")
    except LstScaleError as error:
        odd.append(str(error))
        return "DAMAGED", score, step, f"{RESULT} can't be read: remove it to let the run go on"
    return "DONE", result["scores"]["score"], result["steps"] if count(result.get("steps")) else step, ""


def table(found: list[Status]) -> Table:
    """Return the statuses as a table for a terminal. What a folder or a message is called is shown as it is, never as markup."""
    view = Table(box=None, pad_edge=False)
    for column in ("run", "state", "job", "step", "loss", "score", "left", "node", "why"):
        view.add_column(column, overflow="fold", no_wrap=column in ("run", "state"))
    for status in found:
        step = "" if status.step is None else f"{status.step}/{status.total_steps}" if status.total_steps else str(status.step)
        loss = "" if status.loss is None else f"{status.loss:.4f}"
        score = "" if status.score is None else f"{status.score:.2f}"
        cells = (status.run.name, status.state, status.job or "", step, loss, score, status.left, status.node, status.why)
        view.add_row(*(Text(printable(cell)) for cell in cells))
    return view


def printable(line: str) -> str:
    """Return a text on one line of bounded length, without anything that a terminal would obey or refuse."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in line)
    return plain if len(plain) <= LONGEST_WHY else f"{plain[:LONGEST_WHY]}..."


def _left(train: dict[str, Any] | None, plan: dict[str, Any] | None) -> str:
    if train is None or plan is None:
        return ""
    seconds = int(max(plan["total_steps"] - train["step"], 0) * train["seconds"])
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _last_log_line(log: Path) -> str:
    """Return the last line of a log that tells something; nothing where there is none that can be read."""
    try:
        if not log.is_file():
            return ""
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_WORDS))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()[-50:]]
    except (OSError, ValueError):
        return ""
    telling = [line for line in lines if line.startswith(("error:", "slurmstepd: error", "srun: error"))] or [
        line for line in lines if line
    ]
    return telling[-1][:200] if telling else ""

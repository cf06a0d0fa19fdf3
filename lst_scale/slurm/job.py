"""What a Slurm task runs, one on each GPU: ranks from Slurm, the same `train.carry_out` underneath, leaving in time when asked to.

submitit pickles a `TrainJob` at submission. It holds paths and nothing of the runs' state, because a requeue by an administrator and a
node failure run that first pickle again: where to continue is looked up on disk, each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lst_scale.errors import LstScaleError, MembersFailed
from lst_scale.runs.folder import RECIPE, RESULT
from lst_scale.slurm import runs
from lst_scale.slurm.records import append, read
from lst_scale.system.durable import write_file


class TrainJob:
    """Train the runs of some folders, on one backbone pass, to their ends, from wherever they are."""

    def __init__(self, folders: Sequence[str], *, cpu: bool, threads: int, max_starts_without_progress: int) -> None:
        self.folders, self.cpu, self.threads = list(folders), cpu, threads
        self.max_starts_without_progress = max_starts_without_progress

    def __call__(self) -> None:
        # submitit's own handler, which requeues; from now on signals only set a flag (lst_scale/system/preemption.py).
        requeue = signal.getsignal(signal.SIGUSR2)
        export_ranks(cpu=self.cpu, threads=self.threads)
        rank = int(os.environ["RANK"])
        unfinished = [run for run in map(Path, self.folders) if not (run / RESULT).exists()]
        for run in unfinished:
            (run / "slurm" / f"failure-{rank}.json").unlink(missing_ok=True)
        if not unfinished:
            return
        try:
            if rank == 0:
                self._note_start(unfinished)
            from lst_scale.recipe.schema import load_recipe
            from lst_scale.train import run_recipes

            again = (lambda: requeue(signal.SIGUSR2, None)) if callable(requeue) else None
            run_recipes([load_recipe(str(run / RECIPE)) for run in unfinished], resume=True, requeue=again)
        except MembersFailed as error:
            for run, reason in error.failures.items():
                _note_failure(run, rank, reason)
            raise
        except Exception as error:
            for run in unfinished:
                _note_failure(run, rank, one_line(error))
            raise

    def checkpoint(self) -> Any:
        """Called by submitit on rank 0, after all ranks have saved: the job is queued again as it was submitted."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _note_start(self, unfinished: Sequence[Path]) -> None:
        """Record this start, and refuse to go round in circles.

        Raises:
            LstScaleError: the last starts of this job all began at the same step, of every run.
        """
        job = os.environ.get("SLURM_ARRAY_JOB_ID", "") + os.environ.get("SLURM_ARRAY_TASK_ID", "")
        job = job or os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID", "local")
        stuck = True
        for run in unfinished:
            step = newest_step(run)
            append(run / runs.STARTS, {"job": job, "step": step, "time": time.time(), "host": socket.gethostname()})
            started = [start["step"] for start in read(run / runs.STARTS, runs.START) if start["job"] == job]
            latest = started[-self.max_starts_without_progress - 1 :]
            stuck = stuck and len(latest) > self.max_starts_without_progress and set(latest) == {step}
        if stuck:
            raise LstScaleError(
                f"started {self.max_starts_without_progress + 1} times without getting past step {step}: give more time between signal "
                "and limit (--signal-delay) or save more often (training.save_every_steps), then resubmit"
            )


def _note_failure(run: Path, rank: int, line: str) -> None:
    """Leave word of why a run failed where `status` looks for it."""
    path = run / "slurm" / f"failure-{rank}.json"
    path.parent.mkdir(exist_ok=True)
    write_file(path, json.dumps({"time": time.time(), "rank": rank, "line": line}) + "\n")


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint, whole or not; 0 without one."""
    steps = (path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*"))
    return max((int(step) for step in steps if step.isdecimal() and len(step) < 19), default=0)


def export_ranks(*, cpu: bool, threads: int) -> None:
    """Set what torch and DeepSpeed read: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT."""
    from submitit.helpers import TorchDistributedEnvironment

    os.environ["MASTER_PORT"] = str(port_of(os.environ.get("SLURM_JOB_ID", str(os.getppid()))))
    # Not set_cuda_visible_devices: Slurm has chosen the devices already, and DeepSpeed counts on seeing all of a node's.
    environment = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    os.environ["MASTER_ADDR"] = reachable(environment.master_addr)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def port_of(job: str) -> int:
    """Return a port that all ranks of a job derive alike, below the range from which systems draw ports for outgoing connections."""
    return 10000 + int(hashlib.sha256(job.encode()).hexdigest(), 16) % 11000


def reachable(host: str) -> str:
    """Return `host` if its name resolves, else the address that Slurm knows it by."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        done = subprocess.run(["scontrol", "show", "node", host, "--oneliner"], capture_output=True, text=True, check=False)
        address = next((word.removeprefix("NodeAddr=") for word in done.stdout.split() if word.startswith("NodeAddr=")), None)
        return address or os.environ.get("SLURM_LAUNCH_NODE_IPADDR", host)


def one_line(error: Exception) -> str:
    """Return an error as a person wants to read it in a table."""
    if isinstance(error, LstScaleError):
        return str(error).split("\n")[0]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}{where}"

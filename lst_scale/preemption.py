"""Leaving in time: a signal asks, all ranks agree, save together at the next safe point, and one of them requeues the job.

A handler only sets a flag: a collective inside it would hang, since signals reach ranks at different moments. Ranks compare their
flags wherever they meet anyway (each step, each evaluation batch, between the phases of loading) and raise `Interrupted` together.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from enum import IntEnum
from types import FrameType

from lst_scale.errors import LstScaleError


class Request(IntEnum):
    """What a signal asked for; the greater one wins, since SIGTERM often arrives before USR2."""

    NONE = 0
    STOP = 1  # SIGTERM: save; whoever sent it will end the process
    REQUEUE = 2  # SIGUSR1, SIGUSR2: save and put the job back into the queue


class Interrupted(LstScaleError):
    """Raised on every rank at the same point once any was asked to leave."""

    same_on_all_ranks = True

    def __init__(self, request: Request) -> None:
        super().__init__("stopped by a signal: continue with --resume")
        self.request = request


_request = Request.NONE


def listen() -> None:
    """Let SIGTERM, SIGUSR1 and SIGUSR2 set the flag from now on, and forget earlier ones."""
    global _request
    _request = Request.NONE
    signal.signal(signal.SIGTERM, _note)
    signal.signal(signal.SIGUSR1, _note)
    signal.signal(signal.SIGUSR2, _note)


def requested() -> Request:
    """Return what this rank alone has been asked for."""
    return _request


def leave_if(agreed: int) -> None:
    """Raise `Interrupted` when `agreed`, the largest request of all ranks, is one."""
    if agreed:
        raise Interrupted(Request(int(agreed)))


def requeue_by_scontrol() -> None:
    """Put this Slurm job back into the queue; Slurm will end all its processes.

    Raises:
        LstScaleError: Slurm refused.
    """
    job = os.environ["SLURM_JOB_ID"]
    if os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LstScaleError(f"scontrol requeue {job} failed: {done.stderr.strip() or done.returncode}; resubmit with --resume")


def leave(interrupted: Interrupted, *, is_main: bool, requeue: Callable[[], None] | None, patience: float = 120.0) -> None:
    """End a saved run: rank 0 requeues when that was asked for; the others wait to be killed, since one that returned would look done.

    Returns when nobody killed this process within `patience` seconds, or when nothing can requeue.
    """
    if interrupted.request is Request.REQUEUE and requeue is None:
        return
    if interrupted.request is Request.REQUEUE and is_main and requeue is not None:
        requeue()
    if "SLURM_JOB_ID" in os.environ:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:  # sleep() returns early at each further signal
            time.sleep(1)


def _note(number: int, _frame: FrameType | None) -> None:
    global _request
    _request = max(_request, Request.STOP if number == signal.SIGTERM else Request.REQUEUE)

"""Leaving in time: a signal asks, all ranks agree, save together at the next safe point, and one of them requeues the job.

A handler only sets a flag: a collective inside it would hang, since signals reach ranks at different moments. Ranks compare their
flags wherever they meet anyway (each step, each evaluation batch, between the phases of loading) and raise `Interrupted` together.

Ctrl-C, and a terminal that closes, ask like a SIGTERM. Asked a second time a process leaves where it is, as if killed: what is on the
disk is whole at any moment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType

from lst_scale.errors import LstScaleError


class Request(IntEnum):
    """What a signal asked for; the greater one wins, since SIGTERM often arrives before USR2."""

    NONE = 0
    LEAVE = 1  # SIGINT, SIGHUP: a person asks to save and to end
    STOP = 2  # SIGTERM: save; whoever sent it will end the process
    REQUEUE = 3  # SIGUSR1, SIGUSR2: save and put the job back into the queue


class Interrupted(LstScaleError):
    """Raised on every rank at the same point once any was asked to leave."""

    same_on_all_ranks = True

    def __init__(self, request: Request) -> None:
        super().__init__(f"stopped by a signal: {_asked.then}")
        self.request = request


ECHO_SECONDS = 1.0  # within which a launcher passes on to its ranks the Ctrl-C that the terminal sent them already
_PERSON = (signal.SIGINT, signal.SIGHUP)


@dataclass
class _Asked:
    """What this process has been asked for, and when a person last did."""

    request: Request = Request.NONE
    by_hand: float | None = None
    then: str = "continue with --resume"
    launched: bool = False


_asked = _Asked()


def listen(then: str = "continue with --resume") -> None:
    """Let signals set the flag from now on, and forget earlier ones; `then` says how to go on after one.

    A signal that whoever started this process wants ignored (nohup) stays ignored.
    """
    global _asked
    _asked = _Asked(then=then, launched="RANK" in os.environ)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, *_PERSON):
        if number not in _PERSON or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _note)


def leave_on_ctrl_c() -> None:
    """Let Ctrl-C end the process in one line while it has nothing to save: while it imports, or makes a table."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, _frame: _leave_at_once(number, "stopped"))


def exit_status(error: LstScaleError) -> int:
    """Return the exit status of a command that ended in `error`: a shell's for Ctrl-C, otherwise 1."""
    return 128 + signal.SIGINT if isinstance(error, Interrupted) and error.request is Request.LEAVE else 1


def requested() -> Request:
    """Return what this rank alone has been asked for."""
    return _asked.request


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
    if interrupted.request is Request.LEAVE or (interrupted.request is Request.REQUEUE and requeue is None):
        return
    if interrupted.request is Request.REQUEUE and is_main and requeue is not None:
        requeue()
    if "SLURM_JOB_ID" in os.environ:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:  # sleep() returns early at each further signal
            time.sleep(1)


def _note(number: int, _frame: FrameType | None) -> None:
    if number not in _PERSON:
        _asked.request = max(_asked.request, Request.STOP if number == signal.SIGTERM else Request.REQUEUE)
        return
    now, before = time.monotonic(), _asked.by_hand
    _asked.request, _asked.by_hand = max(_asked.request, Request.LEAVE), now
    if before is None:
        _tell("stopping at the next safe point; once more leaves at once")
    elif not _asked.launched or now - before > ECHO_SECONDS:
        _leave_at_once(number, f"left at once: {_asked.then}")


def _leave_at_once(number: int, sentence: str) -> None:
    if os.isatty(2):
        sentence = f"\x1b[?25h{sentence}"  # a progress bar had hidden the cursor
    _tell(sentence)
    os._exit(128 + number)


def _tell(sentence: str) -> None:
    """Print from within a handler, where Python's own streams may be in the middle of a line."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{sentence}\n".encode())

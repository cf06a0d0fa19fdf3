"""Ranks that start in a second: each is forked from one server that has imported torch, transformers, DeepSpeed and the package.

    pytest --- starts once ---> server (has imported everything, has run nothing)
                                  |--- fork ---> rank 0
                                  '--- fork ---> rank 1

A rank is a process like any other: its own session, environment, working directory, output, exit status; a signal reaches it alone.
It differs in one thing: at its end the interpreter is not torn down, which `launchers.py` is for.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from helpers.launchers import free_port, fresh
from helpers.paths import ROOT, TESTS

Program = Callable[[list[str]], int | None]
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = "helpers.preloaded"
PATIENCE = 600  # seconds after which a rank is taken to hang, on a machine however busy


class Rank:
    """A started process; the methods are those of `subprocess.Popen`."""

    started = 0  # of all, in this process

    def __init__(self, program: Program, arguments: Sequence[str | Path], **environment: str) -> None:
        _start_server()
        self._output = Path(tempfile.mkdtemp(prefix="rank-"))
        weakref.finalize(self, shutil.rmtree, self._output, ignore_errors=True)
        self._process = CONTEXT.Process(
            target=_begin, args=(program, [str(each) for each in arguments], fresh() | environment, str(self._output)), daemon=True
        )
        self._process.start()
        Rank.started += 1

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait until it ends, by itself or because it was killed, and return its exit status, negative for a signal."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.kill()
            self._process.join()
            raise AssertionError(f"a rank hung for {seconds} s\n{self.stderr[-3000:]}")
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # its parent, the server, may have reaped it before its exit status has come here
            if self.poll() is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @property
    def stdout(self) -> str:
        return self._read("stdout")

    @property
    def stderr(self) -> str:
        return self._read("stderr")

    def _read(self, name: str) -> str:
        path = self._output / name
        return path.read_text(errors="replace") if path.exists() else ""  # it may not have begun


@dataclass(frozen=True)
class Finished:
    """What ranks that worked together left: the first exit status that is not 0, and their output, by rank."""

    returncode: int
    stdout: str
    stderr: str


def start(
    program: Program,
    arguments: Sequence[str | Path] | Callable[[int], Sequence[str | Path]],
    *,
    processes: int = 1,
    environment_of: Mapping[str, Callable[[int], str]] = MappingProxyType({}),
) -> list[Rank]:
    """Start the ranks of one world, as a launcher would, but one that does not end the others when one fails.

    Args:
        program: a function of a module, called with the arguments; it returns the exit status.
        arguments: its arguments, or a function from a rank to those of that rank.
        processes: 1 starts it as plain Python does, without a rank in the environment.
        environment_of: further variables, each by a function of the rank.
    """
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(processes):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        own |= {name: of_rank(rank) for name, of_rank in environment_of.items()}
        ranks.append(Rank(program, arguments(rank) if callable(arguments) else arguments, **own))
    return ranks


def finish(ranks: Sequence[Rank], seconds: float = PATIENCE) -> Finished:
    """Wait for all ranks and return what they left."""
    with ended(ranks):
        codes = [rank.wait(seconds) for rank in ranks]
    stdout, stderr = ("".join(getattr(rank, name) for rank in ranks) for name in ("stdout", "stderr"))
    return Finished(next((code for code in codes if code), 0), stdout, stderr)


def wait_for(condition: Callable[[], object], alive: Sequence[Rank] = (), seconds: float = PATIENCE) -> None:
    """Wait until the condition holds, and fail at once when one of the ranks that must bring it about has ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        for rank in alive:
            assert rank.poll() is None or condition(), f"a rank ended with {rank.poll()}\n{rank.stderr[-3000:]}"
        assert time.monotonic() < deadline, f"waited {seconds} s\n" + "".join(rank.stderr[-3000:] for rank in alive)
        time.sleep(0.01)


@contextmanager
def ended(ranks: Sequence[Rank]) -> Iterator[None]:
    """Kill whatever still runs at the end of the block."""
    try:
        yield
    finally:
        for rank in ranks:
            rank.kill()


def run(program: Program, *arguments: str | Path, processes: int = 1) -> Finished:
    """Run a program on so many ranks to its end."""
    return finish(start(program, arguments, processes=processes))


def _start_server() -> None:
    """Let it find `helpers` and the package by its environment: before Python 3.13 a server does not get the path of its starter."""
    CONTEXT.set_forkserver_preload([PRELOADED])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{TESTS}"
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _begin(program: Program, arguments: list[str], environment: dict[str, str], output: str) -> None:
    os.setsid()
    # As in a process of a shell's own, even where the tests run in the background or under nohup and these are ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        with open(f"{output}/{name}", "wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    if PRELOADED not in sys.modules:
        importlib.import_module(PRELOADED)  # it fails again, and says why
    sys.exit(program(arguments))

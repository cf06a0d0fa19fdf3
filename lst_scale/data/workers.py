"""Many pieces of work dealt out to forked processes, and their results in order.

A worker is a fork: it has the parent's tokenizer and mapped rows at once, and touches no device. It ends with its parent, however that
ends, and leaves signals to it. When one is killed the work fails in one line.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from lst_scale.errors import StorageError

T = TypeVar("T")
R = TypeVar("R")
MOST = 16  # workers: the parent writes down what they make, and more than so many it can't keep up with
AHEAD = 2  # pieces a worker that are done or under way and not taken yet
_PR_SET_PDEATHSIG = 1

_work: Callable[..., object]  # of this worker


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0))


def in_order(work: Callable[[T], R], pieces: Iterable[T], workers: int) -> Iterator[R]:
    """Yield `work` of each piece, in order; with fewer than two workers, here.

    Raises:
        StorageError: a worker was killed, for instance because memory ran out.
    """
    if workers < 2:
        yield from map(work, pieces)
        return
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)  # Python 3.12: this process has threads
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(work, os.getpid())) as pool:
            under_way: deque[Future[R]] = deque()
            try:
                for piece in pieces:
                    under_way.append(pool.submit(_do, piece))
                    if len(under_way) >= AHEAD * workers:
                        yield under_way.popleft().result()
                while under_way:
                    yield under_way.popleft().result()
            except BrokenProcessPool as error:
                raise StorageError("a process that encoded rows was killed, perhaps for want of memory: start again") from error
            finally:
                for future in under_way:
                    future.cancel()


def _begin(work: Callable[..., object], parent: int) -> None:
    global _work
    _work = work
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _do(piece: object) -> Any:
    return _work(piece)

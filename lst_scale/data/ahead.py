"""What is asked for by number, one after another, made by a thread before it is asked for, so that the device does not wait for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Things number 0 to `count` - 1, of which the one asked for and its neighbours are kept. All are made in one thread, in turn.

    What fails in the thread is raised where the thing is asked for.
    """

    def __init__(self, make: Callable[[int], T], count: int) -> None:
        self._make, self._count = make, count
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._made: dict[int, Future[T]] = {}

    def __getitem__(self, number: int) -> T:
        """Return one, and begin with the next."""
        kept = {each: made for each, made in self._made.items() if each >= number - 1}
        new = [each for each in (number, number + 1) if each not in kept and each < self._count]
        self._made = kept | {each: self._thread.submit(self._make, each) for each in new}
        return self._made[number].result()

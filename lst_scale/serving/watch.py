"""A folder of side networks that is looked at again and again: what is new, changed or gone there is so here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lst_scale.errors import ArgumentError, LstScaleError, reason_of
from lst_scale.runs.folder import RECIPE, RESULT
from lst_scale.serving.networks import SIDE, Networks
from lst_scale.side import files


class Watcher:
    """Adds, replaces and removes side networks as their folders come and go. One that is broken is told once, and the others answer on.

    Args:
        say: is told what happened.
    """

    def __init__(self, folder: Path, networks: Networks, say: Callable[[str], None]) -> None:
        self._folder, self._networks, self._say = folder, networks, say
        self._known: dict[str, tuple[int, ...]] = {}
        self._ours: set[str] = set()
        self._end = threading.Event()

    def look(self) -> None:
        """Do once what is done again and again."""
        there = {path.name: _stamp(path) for path in sorted(self._folder.iterdir()) if _holds_one(path)}
        for name, stamp in there.items():
            if self._known.get(name) != stamp:
                self._known[name] = stamp
                self._add(name)
        for name in self._known.keys() - there.keys():
            del self._known[name]
            if name in self._ours:
                self._ours.discard(name)
                with suppress(ArgumentError):  # it may have been removed by a request before
                    self._networks.remove(name)
                self._say(f"{name} is gone, and no longer served")

    def _add(self, name: str) -> None:
        try:
            self._networks.add(name, self._folder / name)
        except LstScaleError as error:
            self._say(f"{name} is not served: {error}")
        except Exception as error:  # such as no memory for it; the others are watched on
            self._say(f"{name} is not served: {type(error).__name__}: {reason_of(error)}")
        else:
            self._ours.add(name)
            self._say(f"{name} is served")

    def start(self, seconds: float) -> None:
        """Look every so many seconds, in a thread of its own."""
        threading.Thread(target=self._repeat, args=(seconds,), name="watcher", daemon=True).start()

    def stop(self) -> None:
        self._end.set()

    def _repeat(self, seconds: float) -> None:
        while not self._end.wait(seconds):
            try:
                self.look()
            except OSError as error:  # the folder may be moved away and come back
                self._say(f"{self._folder} can't be read: {error}")


def _holds_one(path: Path) -> bool:
    """Whether a folder is a finished run or a saved side network. What is being written has a hidden name."""
    return not path.name.startswith(".") and path.is_dir() and bool(_weights_of(path))


def _weights_of(path: Path) -> list[Path]:
    folder = path / SIDE if (path / RECIPE).is_file() else path
    return [file for file in (folder / files.WEIGHTS, folder / files.CONFIG) if file.is_file()]


def _stamp(path: Path) -> tuple[int, ...]:
    there = [*_weights_of(path), path / RESULT]  # a result comes after the weights
    found = [file.stat() for file in there if file.is_file()]
    return tuple(number for stat in found for number in (stat.st_mtime_ns, stat.st_size, stat.st_ino))

"""Callbacks that tests give to runs, named helpers.own_callbacks:NAME."""

from __future__ import annotations

import json
import os
import signal
from typing import Any


class Writes:
    """Writes down what it is told, beside the run's own files."""

    def __init__(self, about: Any) -> None:
        self._file = about.folder / "told.jsonl"
        self._write("begin", name=about.name, resumed=about.resumed, id=about.id, backbone=about.recipe["backbone"]["precision"])

    def on_step(self, step: int, values: Any) -> None:
        self._write("step", step=step, **values)

    def on_evaluate(self, step: int, values: Any) -> None:
        self._write("evaluate", step=step, **values)

    def on_end(self, result: Any, error: BaseException | None) -> None:
        self._write("end", score=None if result is None else result["scores"]["score"], error=type(error).__name__)

    def _write(self, what: str, **values: Any) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps({"what": what} | values) + "\n")


class Fails(Writes):
    """Fails at the third step."""

    def on_step(self, step: int, values: Any) -> None:
        if step == 3:
            raise ConnectionError("no route to\nhost")


class Leaves(Writes):
    def on_evaluate(self, step: int, values: Any) -> None:
        raise SystemExit("I am done")


class Stops(Writes):
    """Asks the process to leave at the third step, as a cluster does, but not again after a resume."""

    def __init__(self, about: Any) -> None:
        super().__init__(about)
        self._resumed = about.resumed

    def on_step(self, step: int, values: Any) -> None:
        super().on_step(step, values)
        if step == 3 and not self._resumed:
            os.kill(os.getpid(), signal.SIGTERM)


class NeverBegins:
    on_step = on_evaluate = on_end = print

    def __init__(self, about: Any) -> None:
        raise PermissionError("no key")


class Lacks:
    on_step = on_evaluate = print

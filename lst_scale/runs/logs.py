"""What a run says: numbers to metrics.jsonl and to its callbacks, sentences to the console and log.txt. Rank 0 only writes.

On a terminal there is a progress bar; in a file, or when the output is piped, there are plain lines and no control characters.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from lst_scale.errors import StorageError, fence
from lst_scale.runs.callbacks import Callbacks
from lst_scale.runs.folder import METRICS
from lst_scale.system.durable import append_line, write_file, writing

LOG = "log.txt"


class Logger:
    """The voice of one run. On ranks other than 0 (`folder=None`) every call does nothing.

    Args:
        speaker: stands before each line on the console, where several runs speak; they have no bar.
    """

    def __init__(self, folder: Path | None, *, speaker: str | None = None) -> None:
        self._folder, self._speaker = folder, speaker
        self._console = Console(file=sys.stderr, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self.callbacks = Callbacks(self.say)
        if folder is not None:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        self.callbacks.on_end(None, error)  # nobody is left to tell where the end was told

    def say(self, sentence: str) -> None:
        """Print a sentence and append it, with the time, to log.txt."""
        if self._folder is None:
            return
        shown = sentence if self._speaker is None or sentence.startswith(self._speaker) else f"{self._speaker}: {sentence}"
        with contextlib.suppress(OSError):  # the terminal, or what read from the pipe, is gone: the file still hears it
            (self._bar.console if self._bar is not None else self._console).print(shown, markup=False, soft_wrap=True)
        append_line(self._folder / LOG, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}")

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one line of numbers to metrics.jsonl, flushed to disk so that a kill loses none."""
        if self._folder is None:
            return
        line = json.dumps({"kind": kind, "step": step, "time": round(time.time(), 3)} | values)
        append_line(self._folder / METRICS, line, flushed=True)

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Record the numbers of a training step, and tell them."""
        self.record("train", step, values)
        self.callbacks.on_step(step, values)

    def evaluated(self, step: int, scores: dict[str, Any], openings: dict[str, float]) -> None:
        """Record what an evaluation found and how far gates are open, and tell both."""
        self.record("validation", step, scores)
        self.record("gates", step, openings)
        self.callbacks.on_evaluate(step, scores | {f"gates/{name}": value for name, value in openings.items()})

    def truncate_after(self, step: int, evaluated_at: int) -> None:
        """Drop the numbers of steps past `step`, and of evaluations past `evaluated_at`: a resumed run will write them again."""
        if self._folder is None or not (self._folder / METRICS).exists():
            return
        path = self._folder / METRICS
        with fence(StorageError, f"can't read {path}"):
            lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _step_of(line) <= (step if _kind_of(line) == "train" else evaluated_at)]
        write_file(path, "".join(line + "\n" for line in kept))

    def start_bar(self, total: int, done: int) -> None:
        """Show a bar over `total` steps when the console is a terminal."""
        if self._folder is None or self._speaker is not None or not self._console.is_terminal:
            return
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=self._console)
        self._task = self._bar.add_task("", total=total, completed=done)
        self._bar.start()

    def advance(self, step: int, text: str, *, say: bool) -> None:
        """Move the bar to `step`; without a bar, print `text` as a line when `say`."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif say:
            self.say(f"step {step}: {text}")


@contextlib.contextmanager
def progress_of(total: int | None, done: int, *, shown: bool, what: str = "row") -> Iterator[Callable[[int], None]]:
    """Show a bar over rows, with rows a second and the time left, when the console is a terminal; give what moves it on by some.

    Args:
        total: None: nobody knows how many there will be.
    """
    console = Console(file=sys.stderr, highlight=False)
    columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(), _Speed(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda count: bar.advance(task, count)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f} a second")


def _kind_of(line: str) -> str:
    return "train" if '"kind": "train"' in line else "evaluation"


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        return float("inf")  # a line cut short by a kill, or damaged

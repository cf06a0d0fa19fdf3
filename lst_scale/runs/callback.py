"""What is told how a run goes, and what it is made with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Callback(Protocol):
    """What is told how a run goes. It is made with an `About`, on rank 0, before the backbone is loaded."""

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """A step was taken whose numbers are logged (logging.log_every_steps): loss, learning_rate, seconds, gradient_norm where known."""
        ...

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        """The validation rows were scored: score, each metric, seconds, and how far each gate is open as gates/NAME."""
        ...

    def on_end(self, result: Mapping[str, Any] | None, error: BaseException | None) -> None:
        """The run has ended: with what result.json holds, or with an error, such as a signal after which --resume goes on."""
        ...


@dataclass(frozen=True, kw_only=True)
class About:
    """What a callback is made with."""

    name: str  # of the run
    project: str | None  # logging.project
    folder: Path
    recipe: Mapping[str, Any]  # resolved, as JSON has it
    resumed: bool  # --resume: it may have been told of earlier steps
    id: str  # the same when a run is resumed
    keep_id: Callable[[str], None]  # for a tool that gives names itself: `id` is then that name

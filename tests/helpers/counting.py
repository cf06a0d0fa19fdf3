"""How many processes the tests start: nearly all of a suite's minutes went into starting them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from helpers.ranks import Rank


@dataclass
class Started:
    """What this process has started so far."""

    programs: int = 0  # each imports what it needs anew

    def __call__(self, event: str, _: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen":
            self.programs += 1

    def now(self) -> tuple[int, int]:
        return self.programs, Rank.started


def watch() -> Started:
    """Count from now on."""
    started = Started()
    sys.addaudithook(started)
    return started

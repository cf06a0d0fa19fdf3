"""Training by recipe files."""

from __future__ import annotations

from pathlib import Path

from helpers import programs, ranks


def train(*arguments: str | Path, processes: int = 1, timeout: float = ranks.PATIENCE) -> str:
    """Carry out recipes one after another in one world of so many ranks, and return what they said; arguments: [--resume] PATH..."""
    done = ranks.finish(ranks.start(programs.recipes, arguments, processes=processes), timeout)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return done.stderr

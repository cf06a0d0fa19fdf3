"""Errors a user can act on.

Every mistake that a person can make ends in a subclass of `LstScaleError` whose message is one line: what is wrong, where,
and what to write instead. The console shows that line alone; a traceback means a bug of ours.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path


class LstScaleError(Exception):
    """Base of all errors whose message is meant for the person at the keyboard."""

    same_on_all_ranks = False  # then one voice is enough


class RecipeError(LstScaleError):
    """A recipe, an override or a DeepSpeed file says something that can't be meant. May carry several lines, one a mistake."""

    same_on_all_ranks = True


class ArgumentError(LstScaleError):
    """A command-line argument or a function argument is wrong."""


class DataError(LstScaleError):
    """A data file, a field of it or a row of it is wrong."""


class BackboneError(LstScaleError):
    """A backbone checkpoint can't be used as asked."""


class LadderError(LstScaleError):
    """A side network can't be built, loaded or saved as asked."""


class CheckpointError(LstScaleError):
    """A training checkpoint is missing, broken, or belongs to another run."""


class TrainingError(LstScaleError):
    """Training had to stop, for instance on a loss that is not finite."""


class MembersFailed(LstScaleError):
    """Some members of a run failed; the others are finished. One line each."""

    same_on_all_ranks = True

    def __init__(self, failures: Mapping[Path, str], *, of: int) -> None:
        lines = [f"{folder.name}: {reason}" for folder, reason in failures.items()]
        first = f"{len(failures)} of {of} members failed, the others are finished" if len(failures) < of else f"all {of} members failed"
        super().__init__("\n       ".join([first, *lines]))
        self.failures = dict(failures)


def tell(error: LstScaleError) -> None:
    """Print an error's line on stderr; of one that all ranks raise, rank 0's alone."""
    if not error.same_on_all_ranks or os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest valid name, or a list of the valid names when none is near."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Valid: {', '.join(names)}." if names else ""

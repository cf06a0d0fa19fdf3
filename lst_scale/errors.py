"""Errors a user can act on.

Every mistake that a person can make ends in a subclass of `LstScaleError` whose message is one line: what is wrong, where,
and what to write instead. The console shows that line alone; a traceback means a bug of ours.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

LONGEST_REASON = 300


class LstScaleError(Exception):
    """Base of all errors whose message is meant for the person at the keyboard."""

    same_on_all_ranks = False  # then one voice is enough
    once_a_machine = False  # or one on each machine


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


class StorageError(LstScaleError):
    """A disk refuses what has to be written: it is full, read-only or gone, or something else is in the way."""


class TrainingError(LstScaleError):
    """Training had to stop, for instance on a loss that is not finite."""


class NotReady(LstScaleError):
    """A run can't start: what was found before anything heavy was loaded. One line a mistake."""

    same_on_all_ranks = True
    once_a_machine = True  # a file may be missing on one of them alone

    def __init__(self, problems: Iterable[str]) -> None:
        super().__init__("\n       ".join(problems))


class MembersFailed(LstScaleError):
    """Some members of a run failed; the others are finished. One line each."""

    same_on_all_ranks = True

    def __init__(self, failures: Mapping[Path, str], *, of: int) -> None:
        lines = [f"{folder.name}: {reason}" for folder, reason in failures.items()]
        first = f"{len(failures)} of {of} members failed, the others are finished" if len(failures) < of else f"all {of} members failed"
        super().__init__("\n       ".join([first, *lines]))
        self.failures = dict(failures)


@contextlib.contextmanager
def fence(error_class: type[LstScaleError], what: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into `error_class` with the line "what: reason".

    Put it around all reading of what a user or an earlier run wrote. Parsers raise dozens of kinds (a damaged file has found each of
    them), so none is listed: only our own errors, which say more, and Ctrl-C pass. `what` names the file, and the row if it is known:

        with fence(DataError, f"{path}: row {number}"):
            ...
    """
    try:
        yield
    except LstScaleError:
        raise
    except BaseException as error:
        # A panic of a library in Rust (tokenizers, safetensors) is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise error_class(f"{what}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """Return why something failed, in one printable line of bounded length."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    if isinstance(error, UnicodeError):
        return f"not UTF-8 text ({error})"
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"{error.msg} at {line}character {error.colno}"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return printable(line)


def printable(text: str) -> str:
    """Return a text from a user's file as part of a line: without line breaks and control characters, and not endless."""
    shown = "".join(character if character.isprintable() else "?" for character in text[: LONGEST_REASON + 1])
    return shown if len(shown) <= LONGEST_REASON else f"{shown[:LONGEST_REASON]}..."


def print_error(error: LstScaleError) -> None:
    """Print an error's line on stderr; of one that all ranks raise, rank 0's alone, or the first one's on each machine."""
    one_voice = os.environ.get("LOCAL_RANK" if error.once_a_machine else "RANK", "0") == "0"
    if not error.same_on_all_ranks or one_voice:
        with contextlib.suppress(OSError):  # nobody listens any more
            print(f"error: {error}", file=sys.stderr, flush=True)


def did_you_mean(name: str, valid: Iterable[str], nearness: float = 0.6) -> str:
    """Return " Did you mean 'x'?" for the nearest valid name, or a list of the valid names when none is near."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=nearness)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Valid: {printable(', '.join(names))}." if names else ""

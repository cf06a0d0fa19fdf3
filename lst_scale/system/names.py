"""Names and paths that people write and that become folders and files: one rule for each. Imports no torch.

A name never leaves the folder that it names a thing in: no separator, no "..", nothing that a terminal, a shell or a job script reads
as a command. A path may lead anywhere, but holds no control character and fits what file systems take.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Annotated

from pydantic import AfterValidator

LONGEST_NAME = 100  # letters: a run's folder is NAME-TASK-seedN, and file systems end a name at 255 bytes
LONGEST_PART, LONGEST_PATH = 255, 4000  # bytes of UTF-8; Linux ends a path at 4096, and names of ours come after it

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CONTROL = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, lone surrogates, line and paragraph separators


def checked_name(text: str) -> str:
    """Return a name that is fit for a folder.

    Raises:
        ValueError: it is not; says why, in one line.
    """
    if not _NAME.fullmatch(text):
        raise ValueError(f"{shown(text)} names a folder: letters, digits, '.', '_' and '-' only, starting with a letter or digit")
    if len(text) > LONGEST_NAME:
        raise ValueError(f"{shown(text)} has {len(text)} letters: a name has {LONGEST_NAME} at most")
    return text


def checked_path(text: str) -> str:
    """Return a path that file systems, terminals and job scripts take as it is.

    Raises:
        ValueError: it is none; says why, in one line.
    """
    if not text.strip():
        raise ValueError(f"{shown(text)} is empty: write a path (. is the present folder)")
    if has_control_character(text):
        raise ValueError(f"{shown(text)} holds a control character: a path is plain text on one line")
    size, longest = len(text.encode()), max(len(part.encode()) for part in text.split("/"))
    if longest > LONGEST_PART or size > LONGEST_PATH:
        raise ValueError(f"{shown(text)} is too long: {LONGEST_PART} bytes a part, {LONGEST_PATH} in all")
    return text


def checked_line(text: str) -> str:
    """Return a text that stays on the line on which a job script has it.

    Raises:
        ValueError: it does not.
    """
    if has_control_character(text):
        raise ValueError(f"{shown(text)} holds a control character: write it on one line, without tabs")
    return text


def has_control_character(text: str) -> bool:
    """Whether a terminal, a shell or a job script could read part of `text` as a command of its own, or as another line."""
    return any(unicodedata.category(letter) in _CONTROL for letter in text)


def fitting_name(text: str) -> str:
    """Return a name made of any text: what a name can't hold becomes "_", and one too long ends in a digest of the whole."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_").lstrip("._-")
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return checked_name(name)


def shown(text: str, most: int = 60) -> str:
    """Return a text in quotes and on one line, a long one cut."""
    return repr(text if len(text) <= most else f"{text[:most]}...")


Name = Annotated[str, AfterValidator(checked_name)]
Line = Annotated[str, AfterValidator(checked_line)]
PathText = Annotated[str, AfterValidator(checked_path)]

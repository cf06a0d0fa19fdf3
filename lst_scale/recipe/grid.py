"""Products of values: `key=a,b key2=c,d` of a command line, and the grid that `members:` of a recipe may be. Imports no torch."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from collections.abc import Sequence
from typing import Any

from lst_scale.errors import RecipeError

MOST_MEMBERS = 1000
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./:-]*")  # a word that YAML reads as itself
_NOT_A_WORD = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return the members of `key=a,b key2=c,d`: every combination, the last key changing fastest. Commas in brackets do not divide."""
    axes = []
    for override in overrides:
        key, equals, value = override.partition("=")
        axes.append([f"{key}{equals}{part}" for part in _split(value)])
    if too_many := _too_many(axes):
        raise RecipeError(too_many)
    return [list(member) for member in itertools.product(*axes)]


def grid_as_lines(members: Any) -> Any:
    """Return a grid, {key: values}, as lines of overrides: every combination, the last key changing fastest. Anything else as it is."""
    if not isinstance(members, dict):
        return members
    axes = []
    for key, values in members.items():
        if not isinstance(values, tuple) or not values:
            raise ValueError(f"{key} needs a list of values, such as {key}: [1, 2]")
        axes.append([f"{key}={_written(value)}" for value in values])
    if not axes:
        raise ValueError("needs a key and its values, such as seed: [0, 1, 2]")
    if too_many := _too_many(axes):
        raise ValueError(too_many)
    return tuple(shlex.join(member) for member in itertools.product(*axes))


def _too_many(axes: Sequence[Sequence[str]]) -> str | None:
    """Return what is wrong with the number of members, before they are made."""
    count = math.prod(map(len, axes))
    return f"{count:,} members, and {MOST_MEMBERS:,} are the most: give fewer values" if count > MOST_MEMBERS else None


def _written(value: Any) -> str:
    """Return a value as an override says it: a plain word as it is, anything else as JSON, which YAML reads too."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _NOT_A_WORD:
        return value
    return json.dumps(value, ensure_ascii=False)


def _split(value: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for character in value:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts

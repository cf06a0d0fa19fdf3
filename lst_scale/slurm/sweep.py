"""A sweep: the product of overrides with several values, or a list of members, each a whole recipe with a name of its own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from lst_scale.errors import RecipeError
from lst_scale.recipe import Recipe, load_recipe

_IN_THE_FOLDER_NAME_ALREADY = ("task", "seed", "name", "output_dir")


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return the members of `key=a,b key2=c,d`: every combination, the last key changing fastest. Commas in brackets do not divide."""
    axes = []
    for override in overrides:
        key, equals, value = override.partition("=")
        axes.append([f"{key}{equals}{part}" for part in _split(value)])
    return [list(member) for member in itertools.product(*axes)]


def read_list(text: str) -> list[list[str]]:
    """Return the members of a list file: one a line, overrides divided by spaces; empty lines and # comments are skipped."""
    import shlex

    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [shlex.split(line) for line in lines if line]


def load_members(recipe: str, members: Sequence[Sequence[str]]) -> list[Recipe]:
    """Return every member's recipe, named by what distinguishes it.

    Raises:
        RecipeError: the mistakes of all members, each said once.
    """
    swept = _swept_keys(members)
    found: list[Recipe] = []
    problems: list[str] = []
    for member in members:
        try:
            loaded = load_recipe(recipe, member)
        except RecipeError as error:
            problems += [line for line in str(error).split("\n") if line.strip() not in (seen.strip() for seen in problems)]
            continue
        values = dict(override.split("=", 1) for override in member)
        parts = [f"{_short(key, swept)}-{values[key]}" for key in swept if key in values]
        name = "-".join([loaded.name, *parts])
        found.append(loaded.model_copy(update={"name": re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("_")}))
    if problems:
        raise RecipeError("\n       ".join(line.strip() for line in problems))
    return found


def _swept_keys(members: Sequence[Sequence[str]]) -> list[str]:
    """Return the keys that do not have one value for all members and that no folder name shows otherwise."""
    values: dict[str, set[str | None]] = {}
    for member in members:
        for override in member:
            values.setdefault(override.partition("=")[0], set())
    for key in values:
        for member in members:
            values[key].add(dict(o.partition("=")[::2] for o in member).get(key))
    return [key for key, seen in values.items() if len(seen) > 1 and key not in _IN_THE_FOLDER_NAME_ALREADY]


def _short(key: str, swept: Sequence[str]) -> str:
    """Return the last part of a dotted key, or more of it where two would look the same."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in swept) == 1 else key


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

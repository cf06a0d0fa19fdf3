"""Many recipes out of one: lists of overrides, and a name for each that says what distinguishes it. Imports no torch."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence

from lst_scale.errors import RecipeError
from lst_scale.recipe.grid import MOST_MEMBERS
from lst_scale.recipe.marks import ONE_FOR_MEMBERS, marked
from lst_scale.recipe.schema import Recipe, load_recipe, parse_recipe, to_yaml
from lst_scale.system.names import fitting_name, shown

# What stands before a # that begins a word, as in a shell, outside of quotes.
_BEFORE_COMMENT = re.compile(r"""(?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|(?<=\S)\#|[^#])*""")
_IN_THE_FOLDER_NAME_ALREADY = ("task", "seed", "name", "output_dir")


def read_list(text: str) -> list[list[str]]:
    """Return the members of a list file: one a line, overrides divided by spaces; empty lines and # comments are skipped."""
    lines = (_BEFORE_COMMENT.match(line)[0].strip() for line in text.splitlines())  # type: ignore[index]  # it matches everything
    return [words_of(line, f"line {number}") for number, line in enumerate(lines, start=1) if line]


def words_of(line: str, where: str) -> list[str]:
    """Return the overrides of one member, written as a shell divides words.

    Raises:
        RecipeError: a quote is not closed.
    """
    try:
        return shlex.split(line)
    except ValueError as error:
        raise RecipeError(f"{where}: {shown(line)}: {str(error).lower()}") from error


def load_members(recipe: str, members: Sequence[Sequence[str]]) -> list[Recipe]:
    """Return every member of a shipped recipe or a file, named by what distinguishes it.

    Raises:
        RecipeError: the mistakes of all members, each said once.
    """
    return _named(members, lambda member: load_recipe(recipe, member))


def members_of(recipe: Recipe) -> list[Recipe]:
    """Return the recipes that `members:` of one recipe stands for.

    Raises:
        RecipeError: the mistakes of all members, or members that can't share a backbone pass.
    """
    assert recipe.members is not None
    text = to_yaml(recipe.model_copy(update={"members": None}))
    if len(recipe.members) > MOST_MEMBERS:
        raise RecipeError(f"members: {len(recipe.members):,} of them, and {MOST_MEMBERS:,} are the most")
    found = _named([words_of(line, "members") for line in recipe.members], lambda member: _alone(parse_recipe(text, "members", member)))
    check_shareable(found)
    return found


def _named(members: Sequence[Sequence[str]], load: Callable[[Sequence[str]], Recipe]) -> list[Recipe]:
    swept = _swept_keys(members)
    names = Counter(_values(member).get("name") for member in members)
    found: list[Recipe] = []
    problems: list[str] = []
    for member in members:
        try:
            loaded = load(member)
        except RecipeError as error:
            problems += [line for line in str(error).split("\n") if line.strip() not in (seen.strip() for seen in problems)]
            continue
        values = _values(member)
        has_its_own = "name" in values and names[values["name"]] == 1  # then it needs no other
        parts = [] if has_its_own else [f"{_short(key, swept)}-{values[key]}" for key in swept if key in values]
        found.append(loaded.renamed(fitting_name("-".join([loaded.name, *parts]))))
    if problems:
        raise RecipeError("\n       ".join(line.strip() for line in problems))
    return found


def _alone(member: Recipe) -> Recipe:
    if member.members is not None:
        raise RecipeError("members: a member has no members of its own: write each as a line")
    return member


def expand_members(recipe: Recipe) -> list[Recipe]:
    """Return the recipes that one recipe stands for: its members, or itself."""
    return [recipe] if recipe.members is None else members_of(recipe)


def share_passes(recipes: Sequence[Recipe], most: int) -> list[list[Recipe]]:
    """Put recipes that can train on the same taps together, `most` (two or more) at once, in order.

    Raises:
        RecipeError: no two of them can; says why the first two can't.
    """
    groups: list[list[Recipe]] = []
    for recipe in recipes:
        fitting = (group for group in groups if len(group) < most and not _differences(group[0], recipe))
        group = next(fitting, None)
        if group is None:
            groups.append([recipe])
        else:
            group.append(recipe)
    if len(recipes) > 1 and len(groups) == len(recipes):
        check_shareable(recipes[:2])
    return groups


def check_shareable(members: Sequence[Recipe]) -> None:
    """Members train on the same taps: what taps and batches depend on must be one value for all.

    Raises:
        RecipeError: says which value is not.
    """
    problems = [f"members: {problem}" for member in members for problem in _differences(members[0], member)]
    folders = [member.run_name for member in members]
    twice = sorted({folder for folder in folders if folders.count(folder) > 1})
    problems += [f"members: two of them would share the folder {folder}: write name= for one" for folder in twice]
    if problems:
        raise RecipeError("\n       ".join(dict.fromkeys(problems)))


def _differences(first: Recipe, other: Recipe) -> list[str]:
    """Return why two recipes can't share a backbone pass; nothing when they can."""
    ours, theirs = (marked(recipe, ONE_FOR_MEMBERS) for recipe in (first, other))
    different = (key for key in ours | theirs if theirs.get(key) != ours.get(key))
    problems = [f"{key} must be the same for all" for key in different]
    for method in {method.name: method for method in (first.method, other.method)}.values():
        if not method.beside_backbone:
            problems.append(f"method {method.name} changes the backbone and can't share its pass: write method.name=lst")
    if (first.method.name == "probe") != (other.method.name == "probe"):
        problems.append("method probe goes through the rows once and others in steps: run it by itself")
    if other.seed != first.seed and other.data.shuffle_seed is None:
        problems.append("seeds differ, so batches would: write data.shuffle_seed=0 for one order of batches")
    return problems


def _swept_keys(members: Sequence[Sequence[str]]) -> list[str]:
    """Return the keys that do not have one value for all members and that no folder name shows otherwise."""
    values: dict[str, set[str | None]] = {}
    for member in members:
        for override in member:
            values.setdefault(override.partition("=")[0], set())
    for key in values:
        for member in members:
            values[key].add(_values(member).get(key))
    return [key for key, seen in values.items() if len(seen) > 1 and key not in _IN_THE_FOLDER_NAME_ALREADY]


def _values(member: Sequence[str]) -> dict[str, str]:
    """Return what a member's overrides say, by key."""
    return {key: value for key, _, value in (override.partition("=") for override in member)}


def _short(key: str, swept: Sequence[str]) -> str:
    """Return the last part of a dotted key, or more of it where two would look the same."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in swept) == 1 else key

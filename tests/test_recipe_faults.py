"""What a recipe may not say, however it is written: one line each, and at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lst_scale.errors import RecipeError
from lst_scale.members import load_members
from lst_scale.names import LONGEST_NAME, fitting_name
from lst_scale.recipe import parse_recipe

RECIPE = """
name: t
task: rte
backbone: {checkpoint: x}
method: {name: lst}
"""
TASK = "task: {kind: classification, train: t.csv, validation: v.csv, source: [x], target: y, labels: [a, b]}"
OWN_DATA = RECIPE.replace("task: rte", TASK)
NO_NAMES = ["", ".", "..", "../victim", "a/b", "/etc", "-rf", ".hidden", "a b", "a\nb", "a\n", "\x00", "<img src=x>", "ä", "x" * 300]
NO_PATHS = ["", " ", "/x/o\ntouch FILE #", "a\x00b", "a\x1b[2J", "a\u2028b", "a\x85b", "/" + "x" * 300, "/tmp/" + "x/" * 2500]
PATHS = ["output_dir", "backbone.checkpoint", "cache.folder", "training.deepspeed", "task.train", "task.validation", "task.test"]


def mistake(text: str, *overrides: str) -> str:
    """Return the message of a recipe that is refused."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "t.yaml", overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", NO_NAMES, ids=repr)
@pytest.mark.parametrize("key", ["name", "task.name"])
def test_what_names_a_folder_can_not_leave_it(key: str, name: str) -> None:
    message = mistake(OWN_DATA, f"{key}={json.dumps(name)}")
    assert message.startswith(f"{key}: ") and "\n" not in message and len(message) < 250


@pytest.mark.parametrize("path", NO_PATHS, ids=lambda path: repr(path[:12]))
@pytest.mark.parametrize("key", PATHS)
def test_a_path_holds_no_control_character_and_fits_a_file_system(key: str, path: str) -> None:
    message = mistake(OWN_DATA, f"{key}={json.dumps(path)}")
    assert message.startswith(f"{key}: ") and "\n" not in message and len(message) < 250


@pytest.mark.parametrize("path", ["runs", "/a b/ü/日本", "../x", "~/y", "a'b\"c;d$(e)", "C:\\x"])
def test_a_path_may_be_any_plain_text(path: str) -> None:
    assert parse_recipe(RECIPE, "t.yaml", [f"output_dir={json.dumps(path)}"]).output_dir == path


@pytest.mark.parametrize("name", NO_NAMES, ids=repr)
def test_a_recipe_is_not_renamed_to_what_it_could_not_be_called(name: str) -> None:
    with pytest.raises(RecipeError, match=r"^name: "):
        parse_recipe(RECIPE, "t.yaml").renamed(name)


def test_the_name_of_a_member_is_fit_for_a_folder_whatever_its_values(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(RECIPE)
    values = ["../x", "/" + "y" * 200, "/" + "y" * 201, "ü"]
    members = load_members(str(tmp_path / "t.yaml"), [[f"backbone.checkpoint={value}"] for value in values])
    names = [each.renamed(each.name).name for each in members]
    assert len(set(names)) == len(values) and max(map(len, names)) <= LONGEST_NAME


@pytest.mark.parametrize("text", ["a/../../b", "x" * 400, "__a__", "..a", "a=b,c"])
def test_a_fitting_name_is_a_name(text: str) -> None:
    assert parse_recipe(RECIPE, "t.yaml").renamed(fitting_name(text)).name == fitting_name(text)

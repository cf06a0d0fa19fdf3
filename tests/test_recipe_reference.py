"""docs/recipe.md says what the classes of a recipe say."""

from __future__ import annotations

import importlib.util
from typing import Any

from helpers.paths import ROOT


def maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_recipe_md", ROOT / "docs" / "make_recipe_md.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_recipes_is_fresh() -> None:
    made = maker()
    assert made.PAGE.read_text() == made.page(), "run: python docs/make_recipe_md.py"


def test_every_key_of_a_recipe_is_explained() -> None:
    made = maker()
    unexplained = [(n, f) for n in made.SECTIONS.values() for f in made._class(n).model_fields if not made.meanings(n).get(f)]
    assert not unexplained, "write a comment at the key's line, or above it"
    schemas = {name for name in made.recipe.Recipe.model_json_schema()["$defs"]} | {"Recipe"}
    assert schemas == set(made.SECTIONS.values())  # no section is left out

"""docs/recipe.md says what the classes of a recipe say."""

from __future__ import annotations

import importlib.util
from typing import Any

from helpers.paths import ROOT
from lst_scale.recipe.marks import KEPT_BY_RESUME, ONE_FOR_MEMBERS
from lst_scale.recipe.schema import Recipe, TrainingRecipe


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


def test_every_key_of_a_run_says_whether_members_share_it_and_whether_a_resume_keeps_it() -> None:
    """A new key is under a mark, or here, where somebody has thought about it."""
    free_of_members = {"name", "seed", "output_dir", "method", "optimizer", "training", "logging", "members"}
    free_of_resume = {"name", "output_dir", "backbone", "training", "evaluation", "cache", "logging", "members"}
    assert {key for key, field in Recipe.model_fields.items() if ONE_FOR_MEMBERS not in field.metadata} == free_of_members
    assert {key for key, field in Recipe.model_fields.items() if KEPT_BY_RESUME not in field.metadata} == free_of_resume
    pace = {"epochs", "max_steps", "evaluate_every", "patience", "save_every_steps", "keep_checkpoints"}
    training = TrainingRecipe.model_fields.items()
    assert {key for key, field in training if ONE_FOR_MEMBERS not in field.metadata} == pace | {"start_from", "result"}
    assert {key for key, field in training if KEPT_BY_RESUME not in field.metadata} == pace | {"micro_batch_size", "deepspeed"}

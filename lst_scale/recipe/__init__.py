"""What can be set: a recipe is one YAML file a run. Imports no torch."""

from lst_scale.recipe.schema import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]

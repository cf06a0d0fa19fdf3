"""A metric of one's own: `metrics: [module:function]`, function(predictions: list[str], references: list[str]) -> float.

The module is a file beside the recipe (the loaded recipe then holds its whole path, so that a run's own recipe.yaml finds it too), or
on Python's path. The number is told as it is, and more is better: return minus an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lst_scale.errors import RecipeError, fence
from lst_scale.system.own_code import own


def short_name(name: str) -> str:
    """Return what stands in logs and results: of a file no folders, and any other name as it is."""
    module, colon, function = name.rpartition(":")
    return f"{Path(module).stem}:{function}" if colon and module.endswith(".py") else name


def measured(name: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return what a metric of one's own says.

    Raises:
        RecipeError: it is not there, fails, or returns no finite number.
    """
    function = own(name, asked_by="task.metrics", what="function")
    with fence(RecipeError, f"task.metrics: {short_name(name)} failed"):
        value = function(list(predictions), list(references))
    with fence(RecipeError, f"task.metrics: {short_name(name)} must return a number"):
        number = float(value)
    if not math.isfinite(number):
        raise RecipeError(f"task.metrics: {short_name(name)} returned {number}, which nothing can be compared with: return a finite number")
    return number

"""A metric of one's own: `metrics: [module:function]`, function(predictions: list[str], references: list[str]) -> float.

The module is a file beside the recipe (the loaded recipe then holds its whole path, so that a run's own recipe.yaml finds it too), or
on Python's path. The number is told as it is, and more is better: return minus an error.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lst_scale.errors import RecipeError, did_you_mean, fence


def short_name(name: str) -> str:
    """Return what stands in logs and results: of a file no folders, and any other name as it is."""
    module, colon, function = name.rpartition(":")
    return f"{Path(module).stem}:{function}" if colon and module.endswith(".py") else name


def measured(name: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return what a metric of one's own says.

    Raises:
        RecipeError: it is not there, fails, or returns no finite number.
    """
    function = _function(name)
    with fence(RecipeError, f"task.metrics: {short_name(name)} failed"):
        value = function(list(predictions), list(references))
    with fence(RecipeError, f"task.metrics: {short_name(name)} must return a number"):
        number = float(value)
    if not math.isfinite(number):
        raise RecipeError(f"task.metrics: {short_name(name)} returned {number}, which nothing can be compared with: return a finite number")
    return number


def _function(name: str) -> Any:
    where, _, wanted = name.rpartition(":")
    module = _module(where)
    function = getattr(module, wanted, None)
    if not callable(function):
        names = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise RecipeError(f"task.metrics: {where} has no function {wanted!r}.{did_you_mean(wanted, names)}")
    return function


@functools.cache
def _module(where: str) -> Any:
    with fence(RecipeError, f"task.metrics: {where} can't be imported"):
        try:
            return _module_in(where) if where.endswith(".py") else importlib.import_module(where)
        except SystemExit as error:
            raise ImportError("it ends the process when it is imported") from error


def _module_in(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"own_metric_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module

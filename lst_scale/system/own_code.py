"""Code of a user's own, named `module:name`: a module on Python's path, or a .py file by its path. Imports no torch."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from lst_scale.errors import RecipeError, did_you_mean, fence


def own(name: str, *, asked_by: str, what: str) -> Any:
    """Return what `module:name` names, which can be called.

    Args:
        asked_by: the key of the recipe, for messages.
        what: a function or a class, for messages.

    Raises:
        RecipeError: the module can't be imported, or has none of that name.
    """
    where, _, wanted = name.rpartition(":")
    module = _module(where, asked_by)
    found = getattr(module, wanted, None)
    if not callable(found):
        names = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise RecipeError(f"{asked_by}: {where} has no {what} {wanted!r}.{did_you_mean(wanted, names)}")
    return found


@functools.cache
def _module(where: str, asked_by: str) -> Any:
    with fence(RecipeError, f"{asked_by}: {where} can't be imported"):
        try:
            return _module_in(where) if where.endswith(".py") else importlib.import_module(where)
        except SystemExit as error:
            raise ImportError("it ends the process when it is imported") from error


def _module_in(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"own_{Path(file).stem}", file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module

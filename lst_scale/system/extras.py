"""What is installed only on request: `pip install 'lst_scale[tensorboard]'`. Imports no torch."""

from __future__ import annotations

import importlib.util

from lst_scale.errors import ArgumentError


def require(module: str, extra: str, *, asked_by: str) -> None:
    """Refuse what needs a module that is not installed, before anything is computed for it.

    Raises:
        ArgumentError: says how to install it.
    """
    if importlib.util.find_spec(module) is None:
        raise ArgumentError(f"{asked_by} needs {module}: pip install 'lst_scale[{extra}]'")

"""What a shell completes beside commands and options: names of recipes. A shell offers files where none of them fits."""

from __future__ import annotations

from lst_scale.system.assets import available_recipes


def recipe_names(incomplete: str) -> list[str]:
    return [name for name in available_recipes() if name.startswith(incomplete)]

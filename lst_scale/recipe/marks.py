"""What a key's value must not do, said where the key stands: `global_batch_size: Annotated[Rows, ONE_FOR_MEMBERS, KEPT_BY_RESUME]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class Mark:
    """A rule that a field of a recipe is under."""

    meaning: str  # as docs/recipe.md says it


ONE_FOR_MEMBERS = Mark("one value for all members")  # their taps and batches depend on it
KEPT_BY_RESUME = Mark("a resume keeps it")


def marked(section: BaseModel, mark: Mark, above: str = "") -> dict[str, Any]:
    """Return the values under `mark` as JSON has them, by dotted key. Where a section as a whole is marked, its keys are not looked at."""
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if mark in field.metadata:
            values[above + name] = section.model_dump(mode="json", include={name})[name]
        elif isinstance(value, BaseModel):
            values |= marked(value, mark, f"{above}{name}.")
    return values

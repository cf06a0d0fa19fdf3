"""The source text as a pattern with {field}s: plain names only, so that neither a recipe nor a row can say how a value is formatted."""

from __future__ import annotations

import string
from collections.abc import Mapping
from functools import lru_cache
from typing import Any


def fields_in(template: str) -> list[str]:
    """Return the names in a template, in order.

    Raises:
        ValueError: its braces are not balanced, or there is more in them than a name.
    """
    return [field for _, field in _pieces(template) if field is not None]


def fill(template: str, record: Mapping[str, Any]) -> str:
    """Return the template with each {field} replaced by the record's value."""
    return "".join(text if field is None else f"{text}{record[field]}" for text, field in _pieces(template))


@lru_cache(maxsize=8)
def _pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    """Return pairs of a text and the field after it; a field of None: there is none."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; write {{{{ for a brace that stands for itself") from error
    for _, field, spec, conversion in parsed:
        if spec or conversion:
            written = f"{{{field}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}}}"
            raise ValueError(f"template {template!r}: {written} says how to format a value; write {{{field}}} alone")
    return tuple((text, field) for text, field, _, _ in parsed)

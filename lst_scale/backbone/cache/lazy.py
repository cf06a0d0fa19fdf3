"""A backbone that is loaded when it is first needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

B = TypeVar("B")


class LazyBackbone(Generic[B]):
    """What `load` gives; it is called at most once, unless the backbone is dropped."""

    def __init__(self, load: Callable[[], B]) -> None:
        self._load = load
        self._loaded: B | None = None

    def get(self) -> B:
        """Return the backbone, loaded now if it wasn't."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    @property
    def loaded(self) -> B | None:
        """Return the backbone if it is in memory."""
        return self._loaded

    def drop(self) -> None:
        self._loaded = None

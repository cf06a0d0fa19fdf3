"""A row's tokens as text that grows, and ends before a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "�"  # how a tokenizer writes the beginning of a character whose end has not come


class GrowingText:
    """What can be told so far: nothing that a later token may still change, or that may be the beginning of a stop text."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._told = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """Return what can be told after one more token."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._tell(text[: min(found)])
        if text.endswith(UNFINISHED):
            return ""
        return self._tell(text[: len(text) - self._held_back(text)])

    def finish(self) -> str:
        """Return the rest."""
        return "" if self.stopped else self._tell(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _held_back(self, text: str) -> int:
        """Return how many characters at the end may be the beginning of a stop text."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        return next((n for n in range(min(longest, len(text)), 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)

    def _tell(self, text: str) -> str:
        new, self._told = text[self._told :], max(self._told, len(text))
        return new

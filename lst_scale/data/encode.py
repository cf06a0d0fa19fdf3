"""Rows to token ids, once, before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lst_scale.data.tasks import Row
from lst_scale.errors import DataError


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    """Token ids of a split. Both sides end with </s>; nothing is padded yet."""

    rows: Sequence[Row]
    input_ids: list[list[int]]
    labels: list[list[int]]
    pad_token_id: int

    @property
    def longest_target(self) -> int:
        """How many tokens the longest target has, </s> among them."""
        return max(map(len, self.labels))


def encode(
    rows: Sequence[Row], tokenizer: Any, max_source_length: int, max_target_length: int | None, target_prefix: str = ""
) -> EncodedSplit:
    """Tokenize every row; sources are cut at `max_source_length` tokens, targets at `max_target_length` when given.

    Raises:
        DataError: a target has no token at all.
    """
    sources = tokenizer([row.source for row in rows], truncation=True, max_length=max_source_length).input_ids
    truncated = {"truncation": True, "max_length": max_target_length} if max_target_length is not None else {}
    targets = tokenizer(text_target=[written_target(row.target, target_prefix) for row in rows], **truncated).input_ids
    for number, target in enumerate(targets, start=1):
        if not any(token != tokenizer.eos_token_id for token in target):
            raise DataError(f"row {number} has the empty target {rows[number - 1].target!r}; fill it in or remove the row")
    return EncodedSplit(rows=rows, input_ids=sources, labels=targets, pad_token_id=tokenizer.pad_token_id)


def written_target(answer: str, prefix: str) -> str:
    """Return the text that stands for an answer."""
    return f"{prefix} {answer}" if prefix else answer


def answer_in(text: str, prefix: str) -> str:
    """Return the answer in a generated text, from which special tokens such as <extra_id_0> were taken already."""
    return text.strip().removeprefix(prefix).strip()

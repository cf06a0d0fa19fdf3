"""Rows to token ids, once, before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lst_scale.data.tasks import Row
from lst_scale.errors import DataError, fence, printable


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    """Token ids of a split. Both sides end with </s>; nothing is padded yet."""

    rows: Sequence[Row]
    input_ids: list[list[int]]
    labels: list[list[int]]  # empty where targets are not known
    pad_token_id: int
    cut_sources: int = 0  # rows whose source was longer than the limit
    cut_targets: int = 0

    @property
    def longest_target(self) -> int:
        """How many tokens the longest target has, </s> among them."""
        return max(map(len, self.labels))

    def part(self, first: int, end: int) -> EncodedSplit:
        """Return some rows that follow one another, as a split of its own."""
        return replace(self, rows=self.rows[first:end], input_ids=self.input_ids[first:end], labels=self.labels[first:end])


def encode(
    rows: Sequence[Row], tokenizer: Any, max_source_length: int, max_target_length: int | None, target_prefix: str = ""
) -> EncodedSplit:
    """Tokenize every row; sources are cut at `max_source_length` tokens, targets at `max_target_length` when given.

    Raises:
        DataError: a target has no token at all.
    """
    texts, written = [row.source for row in rows], [target_text(row.target, target_prefix) for row in rows]
    with fence(DataError, "the rows can't be tokenized"):
        sources = tokenizer(texts, truncation=True, max_length=max_source_length).input_ids
        truncated = {"truncation": True, "max_length": max_target_length} if max_target_length is not None else {}
        targets = tokenizer(text_target=written, **truncated).input_ids
        cut_sources = _count_cut(texts, sources, tokenizer, max_source_length)
        cut_targets = _count_cut(written, targets, tokenizer, max_target_length)
    for number, target in enumerate(targets, start=1):
        if not any(token != tokenizer.eos_token_id for token in target):
            answer = printable(repr(rows[number - 1].target))
            if max_target_length == 1:
                raise DataError(
                    f"data.max_target_length=1 leaves nothing of the target {answer} but its end: write 2 or more, or remove it"
                )
            raise DataError(f"row {number} has the empty target {answer}; fill it in or remove the row")
    return EncodedSplit(
        rows=rows,
        input_ids=sources,
        labels=targets,
        pad_token_id=tokenizer.pad_token_id,
        cut_sources=cut_sources,
        cut_targets=cut_targets,
    )


def _count_cut(texts: Sequence[str], ids: Sequence[Sequence[int]], tokenizer: Any, limit: int | None) -> int:
    """Return how many texts have more tokens than the limit left of them. Only those that reach it are tokenized again, whole."""
    if limit is None:
        return 0
    full = [text for text, tokens in zip(texts, ids, strict=True) if len(tokens) >= limit]
    return sum(len(tokens) > limit for tokens in tokenizer(full, verbose=False).input_ids) if full else 0


def encode_sources(texts: Sequence[str], tokenizer: Any, max_source_length: int) -> EncodedSplit:
    """Tokenize the sources of rows whose targets are not known, as `encode` does."""
    with fence(DataError, "the rows can't be tokenized"):
        sources = tokenizer(list(texts), truncation=True, max_length=max_source_length).input_ids
        cut = _count_cut(texts, sources, tokenizer, max_source_length)
    rows = [Row(text, "") for text in texts]
    return EncodedSplit(rows=rows, input_ids=sources, labels=[], pad_token_id=tokenizer.pad_token_id, cut_sources=cut)


def target_text(answer: str, prefix: str) -> str:
    """Return the text that stands for an answer."""
    return f"{prefix} {answer}" if prefix else answer


def answer_in(text: str, prefix: str) -> str:
    """Return the answer in a generated text, from which special tokens such as <extra_id_0> were taken already."""
    return text.strip().removeprefix(prefix).strip()

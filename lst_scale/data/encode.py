"""Rows to token ids, once, before training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lst_scale.data.columns import CHUNK, Chunk, Ids, Numbers, by_chunks, chunk_of, chunk_of_arrays, join_chunks
from lst_scale.data.draws import Draws
from lst_scale.data.rows import Row, StoredRows, questions_of, scores_of
from lst_scale.data.tables import Facts, Write, digest_of, stored_table
from lst_scale.data.tokenizer import tokenizer_digest
from lst_scale.data.workers import in_order, usable_cores
from lst_scale.errors import DataError, fence, printable
from lst_scale.inputs.images import Images
from lst_scale.inputs.keys import KeyTable
from lst_scale.runs.logs import progress_of

COLUMNS = {"input_ids": "ids", "labels": "ids"}
BYTES_OF_IDS = 100  # that a source or target is likely to take
AT_ONCE = 1024  # rows that the tokenizer is given: it needs 25 KB a row while it works


class ImagesOfRows(Protocol):
    """What a frozen image model made of the images of all rows."""

    @property
    def digest(self) -> str:
        """What changes when any image does, or which row has it."""
        ...

    def of(self, rows: Sequence[int]) -> Images:
        """Return those of a batch; filler rows have any."""
        ...


@dataclass(frozen=True, kw_only=True)
class EncodedSplit:
    """Token ids of a split. Both sides end with </s>; nothing is padded yet."""

    rows: Sequence[Row]
    input_ids: Ids
    labels: Ids  # empty where targets are not known
    pad_token_id: int
    cut_sources: int = 0  # rows whose source was longer than the limit
    cut_targets: int = 0
    known_digest: str | None = None  # of all ids, where a table says it
    keys: KeyTable | None = None  # by what a tap cache knows each row; None: there is no cache
    images: ImagesOfRows | None = None  # features of each row's images; None: rows are text alone
    weights: NDArray[np.float32] | None = None  # of a token's loss, by its row, where the loss is a mean over rows
    draws: Draws | None = None  # which rows an epoch takes, where several are answers to one question; None: all

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_questions(self) -> int:
        """How many rows an epoch has."""
        return len(self) if self.draws is None else len(self.draws)

    def rows_of_epoch(self, epoch: int, seed: int) -> Numbers:
        """Return the rows that an epoch has, in order."""
        return np.arange(len(self)) if self.draws is None else self.draws.of_epoch(epoch, seed)

    @property
    def digest(self) -> str:
        """What changes when any id of any row does, or any image, or what is drawn."""
        if self.draws is not None:
            drawn = hashlib.sha256(self.draws.starts.tobytes() + self.draws.totals.tobytes()).hexdigest()
            return hashlib.sha256(f"{replace(self, draws=None).digest} {drawn}".encode()).hexdigest()
        if self.images is not None:
            return hashlib.sha256(f"{replace(self, images=None).digest} {self.images.digest}".encode()).hexdigest()
        if self.known_digest is not None:
            return self.known_digest
        ids = hashlib.sha256()
        for chunks in zip(self.input_ids.chunks, self.labels.chunks, strict=True):
            _add_to(ids, *chunks)
        return ids.hexdigest()

    @property
    def longest_target(self) -> int:
        """How many tokens the longest target has, </s> among them."""
        return int(self.labels.lengths.max())


@dataclass(frozen=True, kw_only=True)
class EncodedRows:
    """Token ids of some rows that follow one another."""

    input_ids: Chunk
    labels: Chunk
    cut_sources: int
    cut_targets: int


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How texts become ids: sources are cut at `max_source_length` tokens, targets at `max_target_length` when given.

    `before` stands before each source and does not count.
    """

    tokenizer: Any
    max_source_length: int
    max_target_length: int | None = None
    target_prefix: str = ""
    before: tuple[int, ...] = ()

    def chunks(self, rows: Sequence[Row], workers: int = 1) -> Iterator[EncodedRows]:
        """Yield the ids of CHUNK rows at a time, encoded by so many processes.

        Raises:
            DataError: a target has no token at all.
            StorageError: a worker was killed.
        """
        return in_order(lambda first: self._chunk(rows, first), range(0, len(rows), CHUNK), workers)

    def _chunk(self, rows: Sequence[Row], first: int) -> EncodedRows:
        """Return the ids of CHUNK rows from number `first` on, counted from 0; the tokenizer is given fewer at once."""
        starts = range(first, min(first + CHUNK, len(rows)), AT_ONCE)
        parts = [self._encode(rows[start : min(start + AT_ONCE, first + CHUNK)], start + 1) for start in starts]
        return EncodedRows(
            input_ids=join_chunks([part.input_ids for part in parts]),
            labels=join_chunks([part.labels for part in parts]),
            cut_sources=sum(part.cut_sources for part in parts),
            cut_targets=sum(part.cut_targets for part in parts),
        )

    def sources(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Return the ids of sources, and how many of these were cut."""
        with fence(DataError, "the rows can't be tokenized"):
            ids = self.tokenizer(list(texts), truncation=True, max_length=self.max_source_length).input_ids
            cut = _count_cut("text", texts, ids, self.tokenizer, self.max_source_length)
            return [[*self.before, *row] for row in ids] if self.before else ids, cut

    def _encode(self, rows: Sequence[Row], first: int) -> EncodedRows:
        sources, cut_sources = self.sources([row.source for row in rows])
        targets, cut_targets = self._targets(rows, first)
        return EncodedRows(input_ids=chunk_of(sources), labels=chunk_of(targets), cut_sources=cut_sources, cut_targets=cut_targets)

    def _targets(self, rows: Sequence[Row], first: int) -> tuple[list[list[int]], int]:
        """Return the ids of targets, and how many of these were cut; `first` is the number of the first one's row."""
        texts = [target_text(row.target, self.target_prefix) for row in rows]
        truncated = {"truncation": True, "max_length": self.max_target_length} if self.max_target_length is not None else {}
        with fence(DataError, "the rows can't be tokenized"):
            ids = self.tokenizer(text_target=texts, **truncated).input_ids
            cut = _count_cut("text_target", texts, ids, self.tokenizer, self.max_target_length)
        for number, (target, row) in enumerate(zip(ids, rows, strict=True), start=first):
            may_be_empty = not row.target and (row.score == 0 or row.reference)  # nothing is learned of it
            if not may_be_empty and not any(token != self.tokenizer.eos_token_id for token in target):
                raise self._empty(row.target, number)
        return ids, cut

    def _empty(self, answer: str, number: int) -> DataError:
        shown = printable(repr(answer))
        if self.max_target_length == 1:
            return DataError(f"data.max_target_length=1 leaves nothing of the target {shown} but its end: write 2 or more, or remove it")
        return DataError(f"row {number} has the empty target {shown}; fill it in or remove the row")


def encode(
    rows: Sequence[Row],
    tokenizer: Any,
    max_source_length: int,
    max_target_length: int | None,
    target_prefix: str = "",
    before: tuple[int, ...] = (),
) -> EncodedSplit:
    """Tokenize every row; sources are cut at `max_source_length` tokens, targets at `max_target_length` when given.

    Raises:
        DataError: a target has no token at all.
    """
    encoding = Encoding(
        tokenizer=tokenizer,
        max_source_length=max_source_length,
        max_target_length=max_target_length,
        target_prefix=target_prefix,
        before=before,
    )
    if isinstance(rows, StoredRows):
        return _stored(rows, encoding)
    return encode_some(rows, encoding)


def encode_some(rows: Sequence[Row], encoding: Encoding) -> EncodedSplit:
    """Return the ids of rows in a list, encoded here."""
    chunks = list(encoding.chunks(rows))
    return EncodedSplit(
        rows=rows,
        input_ids=Ids([chunk.input_ids for chunk in chunks]),
        labels=Ids([chunk.labels for chunk in chunks]),
        pad_token_id=encoding.tokenizer.pad_token_id,
        cut_sources=sum(chunk.cut_sources for chunk in chunks),
        cut_targets=sum(chunk.cut_targets for chunk in chunks),
    )


def _stored(rows: StoredRows, encoding: Encoding) -> EncodedSplit:
    """Return the ids of many rows, written to a table first where none holds them."""
    limits: dict[str, Any] = {"source": encoding.max_source_length, "target": encoding.max_target_length, "prefix": encoding.target_prefix}
    if encoding.before:
        limits["before"] = encoding.before
    key = digest_of({"rows": rows.key, "tokenizer": tokenizer_digest(encoding.tokenizer), "limits": limits})

    def fill(write: Write) -> Facts:
        cut_sources = cut_targets = 0
        ids = hashlib.sha256()
        with progress_of(len(rows), 0, shown=True, what="encoding row") as advance:
            for chunk in encoding.chunks(rows, workers=usable_cores()):
                write({"input_ids": chunk.input_ids, "labels": chunk.labels})
                _add_to(ids, chunk.input_ids, chunk.labels)
                cut_sources, cut_targets = cut_sources + chunk.cut_sources, cut_targets + chunk.cut_targets
                advance(len(chunk.input_ids.ends) - 1)
        return {"cut_sources": cut_sources, "cut_targets": cut_targets, "digest": ids.hexdigest()}

    table = stored_table(key, COLUMNS, fill, likely_bytes=2 * BYTES_OF_IDS * len(rows))
    return EncodedSplit(
        rows=rows,
        input_ids=table.ids("input_ids"),
        labels=table.ids("labels"),
        pad_token_id=encoding.tokenizer.pad_token_id,
        cut_sources=table.facts["cut_sources"],
        cut_targets=table.facts["cut_targets"],
        known_digest=table.facts["digest"],
    )


def stored_keys(split: EncodedSplit, like: Sequence[bytes], make: Callable[[], KeyTable]) -> KeyTable:
    """Return what `make` does; of rows in a table it is made once a machine.

    Args:
        like: digests of rows, which say how a backbone's targets are made from labels.
    """
    if split.known_digest is None:
        return make()
    key = digest_of({"ids": split.known_digest, "like": [digest.hex() for digest in like]})

    def fill(write: Write) -> Facts:
        for rows in by_chunks(make().numbers):
            write({"numbers": chunk_of_arrays(rows)})
        return {}

    numbers = stored_table(key, {"numbers": "ids"}, fill, likely_bytes=BYTES_OF_IDS * len(split)).ids("numbers")
    keys = KeyTable.of_numbers(np.concatenate([chunk.values for chunk in numbers.chunks]))
    numbers.let_go()
    return keys


def _add_to(ids: Any, *chunks: Chunk) -> None:
    for chunk in chunks:
        ids.update(chunk.ends.tobytes())
        ids.update(chunk.values.tobytes())


def encode_sources(texts: Sequence[str], tokenizer: Any, max_source_length: int, before: tuple[int, ...] = ()) -> EncodedSplit:
    """Tokenize the sources of rows whose targets are not known, as `encode` does."""
    encoding = Encoding(tokenizer=tokenizer, max_source_length=max_source_length, before=before)
    found = [encoding.sources(some) for some in by_chunks(texts, AT_ONCE)]
    return EncodedSplit(
        rows=[Row(text, "") for text in texts],
        input_ids=Ids.of(row for ids, _ in found for row in ids),
        labels=Ids([]),
        pad_token_id=tokenizer.pad_token_id,
        cut_sources=sum(cut for _, cut in found),
    )


def _count_cut(side: str, texts: Sequence[str], ids: Sequence[Sequence[int]], tokenizer: Any, limit: int | None) -> int:
    """Return how many texts have more tokens than the limit left of them. Only those that reach it are tokenized again, whole."""
    if limit is None:
        return 0
    full = [text for text, tokens in zip(texts, ids, strict=True) if len(tokens) >= limit]
    return sum(len(tokens) > limit for tokens in tokenizer(**{side: full}, verbose=False).input_ids) if full else 0


def for_training(split: EncodedSplit, loss: str, *, scored: bool) -> EncodedSplit:
    """Return the split that is trained on: of which an epoch draws rows where several answer one question, and whose loss is a mean over
    tokens, or over rows: of each the mean over its tokens, times its score where rows are `scored`."""
    questions = questions_of(split.rows)
    if loss == "token_mean" and questions is None:
        return split
    scores = np.fromiter(scores_of(split.rows), np.float64, count=len(split))
    weights = ((scores if scored else 1.0) / split.labels.lengths).astype(np.float32) if loss == "example_mean" else None
    return replace(split, weights=weights, draws=None if questions is None else Draws.of(questions, scores))


def target_text(answer: str, prefix: str) -> str:
    """Return the text that stands for an answer."""
    return f"{prefix} {answer}" if prefix else answer


def answer_in(text: str, prefix: str) -> str:
    """Return the answer in a generated text, from which special tokens such as <extra_id_0> were taken already."""
    return text.strip().removeprefix(prefix).strip()

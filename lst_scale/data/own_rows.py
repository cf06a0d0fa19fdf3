"""Rows of one's own files, from a record to texts: columns of fields, a prompt and its completion, or a conversation.

Of a conversation each turn of the assistant's becomes a row, whose source is all before it. What can't be meant is one line that names file
and row.
"""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lst_scale.data import files
from lst_scale.data.chat import Writer
from lst_scale.data.conversations import USER, Message, answers_in, asked_in, messages_in, refuse_wrong_order
from lst_scale.data.files import Found
from lst_scale.data.pictures import picture_of
from lst_scale.data.rows import Row
from lst_scale.errors import DataError, printable
from lst_scale.recipe.task import FileTask
from lst_scale.recipe.template import fill

WRITABLE = (str, int, float, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta)  # cells whose text says what they are


def is_conversational(task: FileTask) -> bool:
    """Whether rows are conversations: their column says so, or of prompts the first training row.

    Raises:
        DataError: that can't be read.
    """
    if task.prompt is None:
        return task.messages is not None
    first = next(files.read_records(task.train, "train"))
    return isinstance(first.record.get(task.prompt), list | tuple)


def rows_of(task: FileTask, found: Found, chat: Writer | None) -> Iterator[Row]:
    """Yield the rows that a record is: one, or of a conversation as many as it has answers.

    Args:
        chat: writes conversations; None: the record is none.

    Raises:
        DataError: a field is missing or can't be meant; names file and row.
    """
    record, path, number = found.record, found.path, found.number
    for source, target in _texts(task, found) if chat is None else _turns(task, found, chat):
        if not target.strip():
            raise DataError(f"{path}: row {number} has an empty {task.target or task.completion}; fill it in or remove the row")
        if task.kind == "regression" and not _is_finite(target):
            field = task.target or task.completion or task.messages
            raise DataError(f"{path}: row {number}: {field} is {printable(repr(target))}, not a number; kind regression needs numbers")
        images = file_images(task, record, path, number)
        yield Row(source, target, images, 1.0 if task.score is None else _score(record, task.score, path, number))


def _texts(task: FileTask, found: Found) -> list[tuple[str, str]]:
    answer = task.target or task.completion or ""
    refuse_bad_cells(found.record, (*task.text_columns, answer), found.path, found.number)
    return [(file_source(task, found.record), str(found.record[answer]))]


def _turns(task: FileTask, found: Found, chat: Writer) -> Iterator[tuple[str, str]]:
    """Yield each answer of a conversation after all that is written before it."""
    where = f"{found.path}: row {found.number}"
    if task.messages is not None:
        messages, first, field = _cell(task.messages, found), 0, task.messages
    else:
        field, prompt = str(task.completion), _prompt(task, found)
        messages, first = prompt + _cell(field, found), len(prompt)
    refuse_wrong_order(messages, where)
    for before, answer in answers_in(messages, first, field, where):
        yield chat.source(before, where), chat.target(answer)


def asked_source(task: FileTask, found: Found, chat: Writer) -> str:
    """Return all that is written before the answer that a row asks for: after its last message, or in place of an answer that is there.

    Raises:
        DataError: the row is no conversation, or nobody asks in it.
    """
    where = f"{found.path}: row {found.number}"
    messages = _prompt(task, found) if task.messages is None else asked_in(_cell(task.messages, found))
    refuse_wrong_order(messages, where)
    return chat.source(messages, where)


def _prompt(task: FileTask, found: Found) -> tuple[Message, ...]:
    messages = _cell(str(task.prompt), found)
    if messages[-1].role != USER:
        raise DataError(f"{found.path}: row {found.number}: {task.prompt} ends with the role {messages[-1].role}: the user asks last")
    return messages


def _cell(field: str, found: Found) -> tuple[Message, ...]:
    if field not in found.record:
        raise DataError(files.missing_field(found.path, found.number, field, found.record))
    return messages_in(found.record[field], field, f"{found.path}: row {found.number}")


def _score(record: Mapping[str, Any], field: str, path: str, number: int) -> float:
    refuse_bad_cells(record, (field,), path, number)
    if not _is_finite(str(record[field])) or float(record[field]) < 0:
        raise DataError(
            f"{path}: row {number}: {field} is {printable(repr(record[field]))}, not a number of at least 0: a score weighs a row"
        )
    return float(record[field])


def file_images(task: FileTask, record: Mapping[str, Any], path: str, number: int) -> tuple[str, ...]:
    """Return the files of a row's pictures.

    Raises:
        DataError: a column is missing, or holds no picture; names file and row.
    """
    for field in task.images or ():
        if field not in record:
            raise DataError(files.missing_field(path, number, field, record))
    return tuple(picture_of(record[field], field, path, number) for field in task.images or ())


def refuse_bad_cells(record: Mapping[str, Any], fields: Sequence[str], path: str, number: int) -> None:
    """Refuse a row of which a field is missing, empty, no text or number, or no text that can be written.

    Raises:
        DataError: names file, row and field.
    """
    for field in fields:
        if field not in record:
            raise DataError(files.missing_field(path, number, field, record))
        value = record[field]
        if value is None or value != value:
            raise DataError(f"{path}: row {number} has no {field}; fill it in or remove the row")
        if not isinstance(value, WRITABLE):
            raise DataError(f"{path}: row {number}: {field} holds {_spoken_type(value)}; write a text or a number there")
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise DataError(f"{path}: row {number}: {field} holds half a character (a lone surrogate); mend the text or remove the row")


def _spoken_type(value: Any) -> str:
    kinds: dict[type, str] = {bytes: "bytes", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def file_source(task: FileTask, record: Mapping[str, Any]) -> str:
    """Return the source text of one row of one's own files."""
    if task.prompt is not None:
        return str(record[task.prompt])
    if task.template is not None:
        return fill(task.template, record)
    return source_text(task.prefix, [(f"{field}:", field) for field in task.text_columns], record)


def source_text(prefix: str | None, fields: Sequence[tuple[str, str]], record: Mapping[str, Any]) -> str:
    """Return "prefix field: value field: value"; `fields` pairs what is written before a value with the record's column."""
    return " ".join([*([prefix] if prefix else []), *(f"{written} {record[column]}" for written, column in fields)])

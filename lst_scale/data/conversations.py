"""Conversations in a row: lists of {role, content}, as chat templates take them, and what can't be one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lst_scale.errors import DataError, did_you_mean, fence, printable

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, USER, ASSISTANT)


class Message(NamedTuple):
    role: str
    content: str


def messages_in(value: Any, field: str, where: str) -> tuple[Message, ...]:
    """Return the messages of a cell: a list, or its JSON, as a .csv file has it.

    Args:
        where: file and row, as a message of an error names them.

    Raises:
        DataError: it is no list of messages, or one of them has an unknown role, no text, or more than the two.
    """
    if isinstance(value, str):
        with fence(DataError, f"{where}: {field} is a text, and no JSON of a list of messages"):
            value = json.loads(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise DataError(f'{where}: {field} is no list of messages: write [{{"role": "user", "content": ...}}, ...]')
    return tuple(_message(each, f"{where}: message {number} of {field}") for number, each in enumerate(value, start=1))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping) or not {"role", "content"} <= value.keys():
        raise DataError(f'{where} is no {{"role": ..., "content": ...}}')
    more = sorted(str(key) for key, given in value.items() if key not in Message._fields and given is not None)
    if more:
        raise DataError(f"{where} has {printable(repr(more[0]))}, which is not read: remove it from all messages")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise DataError(f"{where} has the role {printable(repr(role))}.{did_you_mean(str(role), ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where} has a content that is no text: write a text there")
    if any("\ud800" <= character <= "\udfff" for character in content if not character.isascii()):
        raise DataError(f"{where} holds half a character (a lone surrogate); mend the text or remove the row")
    return Message(role, content)


def refuse_wrong_order(messages: Sequence[Message], where: str) -> None:
    """Refuse what no chat template writes; a template may refuse more, such as two turns of one role.

    Raises:
        DataError: a system message is not the first, or nobody asks before the assistant answers.
    """
    for number, message in enumerate(messages, start=1):
        if message.role == SYSTEM and number > 1:
            raise DataError(f"{where}: message {number} is of the role system: only the first one may be")
    first = next((message.role for message in messages if message.role != SYSTEM), None)
    if first is None:
        raise DataError(f"{where} has no turn of the user: write a message of the role user before the answer")
    if first != USER:
        raise DataError(f"{where} begins with the assistant's turn: write a message of the role user before it")


def answers_in(messages: Sequence[Message], first: int, field: str, where: str) -> list[tuple[Sequence[Message], str]]:
    """Return the assistant's turns from message number `first` on, counted from 0, each after the messages before it.

    Raises:
        DataError: there is none, or one is empty.
    """
    turns = [number for number, message in enumerate(messages) if message.role == ASSISTANT and number >= first]
    if not turns:
        raise DataError(f"{where}: {field} has no turn of the assistant, so nothing is learned of it: add one, or remove the row")
    for number in turns:
        if not messages[number].content.strip():
            raise DataError(f"{where}: message {number - first + 1} of {field} is an empty answer; fill it in or remove it")
    return [(messages[:number], messages[number].content) for number in turns]


def asked_in(messages: Sequence[Message]) -> Sequence[Message]:
    """Return the messages before the answer that is asked for: all, or those before an answer that stands at the end."""
    return messages[:-1] if messages and messages[-1].role == ASSISTANT else messages

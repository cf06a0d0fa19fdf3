"""What a pipeline may be given, and how it becomes the source that the run was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lst_scale.data.answers import cut_inputs
from lst_scale.data.chat import Chat
from lst_scale.data.context import Reading
from lst_scale.data.encode import EncodedSplit, encode_sources
from lst_scale.data.files import Found
from lst_scale.data.prompts import chat_text, going_on
from lst_scale.errors import ArgumentError
from lst_scale.inference.predict import text_of_row
from lst_scale.inference.scored_run import LONGEST, ScoredRun

Message = Mapping[str, str]
Given = str | Mapping[str, Any] | Sequence[Message]  # a text, the fields of a row, or a conversation


def is_one(given: Any) -> bool:
    """Return whether this is one input, and not several."""
    return isinstance(given, str | Mapping) or is_conversation(given)


def is_conversation(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and not isinstance(given, str)
        and bool(given)
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in given)
    )


class Prompts:
    """Makes sources of what is given.

    Args:
        run: whose template and limits are kept to; None: a side network that was saved by itself, which takes a text as it is.
        chat: writes conversations as in training, where that was on some.
    """

    def __init__(self, run: ScoredRun | None, reading: Reading, chat: Chat | None) -> None:
        self._run, self._reading, self._chat = run, reading, chat

    def encoded(self, several: Sequence[Given]) -> EncodedSplit:
        """Return token ids; warns of those that are cut.

        Raises:
            ArgumentError: one is nothing that can be asked here.
            DataError: a field of a row is missing, or holds no text.
        """
        talks = [is_conversation(given) for given in several]
        if any(talks) and not all(talks):
            raise ArgumentError("conversations and other inputs are told apart by their form: give them in two calls")
        tokenizer = self._reading.tokenizer
        if any(talks):
            texts = [self._conversation(given, number) for number, given in enumerate(several, start=1)]
            tokenizer = going_on(tokenizer)  # a chat template writes the beginning of a text itself
        else:
            texts = [self._text(given, number) for number, given in enumerate(several, start=1)]
        most = LONGEST if self._run is None else self._run.recipe.data.max_source_length
        split = encode_sources(texts, tokenizer, most, self._reading.before)
        if self._run is not None and (sentence := cut_inputs(split.cut_sources, len(split), self._run.recipe.data)) is not None:
            warnings.warn(sentence, stacklevel=4)
        return split

    def _text(self, given: Given, number: int) -> str:
        if self._run is None:
            if isinstance(given, str):
                return given
            raise ArgumentError("a side network that was saved by itself knows no template: give a text, or the folder of its run")
        columns = self._run.columns
        if self._chat is not None and not isinstance(given, Mapping):
            raise ArgumentError(f"this run reads conversations: give a list of messages, or a dictionary with {columns[0]}")
        if isinstance(given, str):
            if len(columns) != 1:
                raise ArgumentError(f"this run reads the fields {', '.join(columns)}: give a dictionary of them")
            given = {columns[0]: given}
        if not isinstance(given, Mapping):
            raise ArgumentError(
                f"input {number} is of type {type(given).__name__}: give a text, a dictionary of fields, or a list of messages"
            )
        return text_of_row(self._run, Found(given, "inputs", number), self._chat)

    def _conversation(self, given: Any, number: int) -> str:
        if self._chat is not None:
            return self._chat.asked(given, f"inputs: row {number}")
        return chat_text(self._reading.tokenizer, given)

"""A tokenizer's chat template: how it writes a conversation up to an answer, and what ends the answer.

    <|im_start|>user                       source: all that the template writes before the answer's own words
    Is it a person?<|im_end|>
    <|im_start|>assistant
    yes <|im_end|>                         target: the answer, and the token that the template ends it with

What is written before an answer does not depend on it: a stand-in is written in its place, and the text is cut there. So a prompt in
training is the prompt that an answer is asked for with, whatever a template adds between the two (an empty thought, for instance).

With a context (`backbone.context`) all rows go on from one conversation, whose beginning is cut off from each: what a template writes
before the first user's words, a system message among it. Examples are turns of the user and the assistant there.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from lst_scale.data.conversations import ASSISTANT, SYSTEM, USER, Message, messages_in, refuse_wrong_order
from lst_scale.data.prompts import Way
from lst_scale.data.tokenizer import SETTINGS
from lst_scale.errors import DataError, fence
from lst_scale.recipe.backbone import ContextRecipe
from lst_scale.system.assets import resolve

STAND_IN = "\ue000answer\ue000"  # characters that mean nothing to anybody
TODAY = datetime.date(2024, 7, 26)  # of templates that write the date: rows must not differ from day to day
_DATE = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<form>.*?)(?P=quote)\s*\)""")
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")  # files of a checkpoint


class Writer(Protocol):
    """What makes text of messages."""

    @property
    def key(self) -> str:
        """What changes when any text may."""
        ...

    def source(self, messages: Sequence[Message], where: str) -> str:
        """Return all that is written before the answer to some messages.

        Raises:
            DataError: the template refuses them; begins with `where`.
        """
        ...

    def target(self, answer: str) -> str:
        """Return an answer as the template writes it."""
        ...


class Unwritten:
    """Of rows that are only looked at, before there is a tokenizer: no template is asked."""

    key = "unwritten"

    def source(self, messages: Sequence[Message], where: str) -> str:
        return ""

    def target(self, answer: str) -> str:
        return answer


class Chat:
    """The chat template of a tokenizer.

    Args:
        checkpoint: the tokenizer's, as errors name it.
        context: stands before every row.

    Raises:
        DataError: there is no template, or it can't write a system message.
    """

    def __init__(self, tokenizer: Any, checkpoint: str, context: ContextRecipe | None = None) -> None:
        if not tokenizer.chat_template:
            raise DataError(without_template(checkpoint))
        with fence(DataError, f"the chat template of {checkpoint} can't be used"):
            template = tokenizer.get_chat_template()
        self._tokenizer, self._checkpoint = tokenizer, checkpoint
        self._template = _DATE.sub(lambda found: repr(TODAY.strftime(found["form"])), template)
        self._opening = [] if context is None or context.text is None else [Message(SYSTEM, context.text)]
        where = "backbone.context.text" if self._opening else "task"
        asked = [[*self._opening, Message(USER, word)] for word in "01"]
        self._stand_in = f" {STAND_IN} " if f" {STAND_IN} " in self._text(asked[0], f" {STAND_IN} ", where) else STAND_IN
        self.head = "" if context is None else _common(*(self._divided(each, where)[0] for each in asked))
        self._after = self._divided(asked[0], where)[1]
        self._has_context = context is not None

    @cached_property
    def key(self) -> str:
        tokenizer = self._tokenizer
        what = [self._template, tokenizer.special_tokens_map, self._opening, self.head]
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def between(self) -> str:
        """What is written between an answer and the words of the next user."""
        turns = [*self._opening, Message(USER, "0"), Message(ASSISTANT, STAND_IN)]
        both = (self._text([*turns, Message(USER, word)], "0", "backbone.context.examples") for word in "01")
        return _common(*(text.partition(STAND_IN)[2] for text in both))

    @property
    def way(self) -> Way:
        """How rows are tokenized: the template writes what begins a text, and what ends an answer."""
        ids = self._tokenizer(self._after, add_special_tokens=False).input_ids
        return Way(begins_texts=False, as_written=True, end=next(filter(self._is_no_text, ids), None))

    def _is_no_text(self, token: int) -> bool:
        """Whether a token leaves answers with the tokens that end them."""
        return bool(self._tokenizer.decode([token]).strip() and not self._tokenizer.decode([token], skip_special_tokens=True).strip())

    def source(self, messages: Sequence[Message], where: str) -> str:
        if self._has_context and messages[0].role == SYSTEM:
            raise DataError(f"{where} has a system message, and backbone.context stands before it: remove one of them")
        before, _ = self._divided([*self._opening, *messages], where)
        if not before.startswith(self.head):
            raise DataError(f"{where}: the chat template of {self._checkpoint} writes it otherwise after backbone.context: remove that")
        return before.removeprefix(self.head)

    def asked(self, messages: Any, where: str) -> str:
        """Return all that is written before the answer to a conversation that somebody sends.

        Raises:
            DataError: it is no conversation, or the template refuses it; begins with `where`.
        """
        found = messages_in(messages, "messages", where)
        refuse_wrong_order(found, where)
        return self.source(found, where)

    def target(self, answer: str) -> str:
        return answer.strip() if self._stand_in == STAND_IN else answer

    def _divided(self, messages: Sequence[Message], where: str) -> tuple[str, str]:
        """Return what is written before and after an answer to some messages."""
        before, found, after = self._text(messages, self._stand_in, where).rpartition(self._stand_in)
        if not found:
            raise DataError(f"{where}: the chat template of {self._checkpoint} does not write the assistant's words: it can't be used")
        return before, after

    def _text(self, messages: Sequence[Message], answer: str, where: str) -> str:
        turns = [message._asdict() for message in (*messages, Message(ASSISTANT, answer))]
        with fence(DataError, f"{where}: the chat template of {self._checkpoint} refuses this conversation"):
            return str(self._tokenizer.apply_chat_template(turns, chat_template=self._template, tokenize=False))


def _common(one: str, other: str) -> str:
    """Return how two texts begin that end differently."""
    return one[: next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])]


def without_template(checkpoint: str) -> str:
    return (
        f"the tokenizer of {checkpoint} has no chat template, which messages are written by: choose a checkpoint made for chat, "
        f"put its {TEMPLATES[0]} into the folder, or write prompt and completion as texts"
    )


def refuse_missing_template(checkpoint: str) -> None:
    """Refuse a folder without a chat template. Imports nothing heavy.

    Raises:
        DataError: says what to do instead.
    """
    folder = Path(resolve(checkpoint))
    if not folder.is_dir() or any((folder / name).exists() for name in TEMPLATES):
        return
    settings: Any = {}
    if (folder / SETTINGS).is_file():
        with fence(DataError, f"{folder / SETTINGS} can't be read"):
            settings = json.loads((folder / SETTINGS).read_bytes())
    if not isinstance(settings, dict) or not settings.get("chat_template"):
        raise DataError(without_template(checkpoint))

"""`lst-scale chat`: a finished run, or a saved side network, on a terminal, its text as it comes.

What was trained on conversations holds one, by the chat template of its model. Beside any other each line is a question of its own, written
as the rows of the run's training were.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lst_scale.backbone.families import family_of
from lst_scale.data.prompts import chat_text, going_on
from lst_scale.errors import ArgumentError
from lst_scale.inference.opened import Opened, open_folder
from lst_scale.inference.prompts import Prompts, is_conversation
from lst_scale.serving.text import GrowingText
from lst_scale.training.evaluation import ends_of

ANSWER_TOKENS = 256  # of a conversation, where nothing else is said


@dataclass(frozen=True, kw_only=True)
class Style:
    """How answers are made.

    Args:
        max_tokens: None: as many as a training target had at most, in a conversation `ANSWER_TOKENS`.
        system: how a conversation begins.
        conversation: whether lines are one; None: where training was on conversations, or nobody knows what it was on.
        prompt_tokens: of a conversation, whose oldest turns are forgotten beyond.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    system: str | None = None
    conversation: bool | None = None
    prompt_tokens: int = 4096


class Talk:
    """What is talked to."""

    def __init__(self, opened: Opened, style: Style) -> None:
        self._opened, self._style = opened, style
        self._prompts = Prompts(opened.run, opened.reading, opened.chat)
        has_template = getattr(opened.reading.tokenizer, "chat_template", None) is not None
        if style.conversation and not has_template:
            raise ArgumentError(f"--conversation: the tokenizer of {opened.model.spec.model_type} has no chat template: leave it out")
        usual = has_template and (opened.run is None or opened.chat is not None)
        self.is_conversation = usual if style.conversation is None else style.conversation
        if style.system is not None and not self.is_conversation:
            raise ArgumentError("--system begins a conversation, and these are single questions: leave it out")
        self._turns: list[dict[str, str]] = []
        self._most = style.max_tokens or (ANSWER_TOKENS if self.is_conversation else opened.way.longest or ANSWER_TOKENS)
        if style.seed is not None:
            torch.manual_seed(style.seed)

    def forget(self) -> None:
        """Begin a new conversation."""
        self._turns = []

    def answer(self, line: str, show: Callable[[str], None]) -> str:
        """Return the answer to a line, which `show` is given piece by piece.

        Raises:
            ArgumentError: the line has no tokens, or more than fit.
            DataError: a row of fields lacks one.
        """
        said = {"role": "user", "content": line}
        ids = self._conversation(said) if self.is_conversation else self._question(line)
        text = self._generate(ids, show)
        if self.is_conversation:
            self._turns += [said, {"role": "assistant", "content": text}]
        return text

    def _conversation(self, said: dict[str, str]) -> list[int]:
        """Return the ids of the conversation so far and what was said now, without its oldest turns where it is too long."""
        begin = [] if self._style.system is None else [{"role": "system", "content": self._style.system}]
        reading, chat = self._opened.reading, self._opened.chat
        for first in range(0, len(self._turns) + 1, 2):
            turns = self._turns[first:]
            messages = [*begin, *turns, said]
            text = chat_text(reading.tokenizer, messages) if chat is None else chat.asked(messages, "what was typed")
            ids = going_on(reading.tokenizer)([text]).input_ids[0]  # the template writes what begins a text
            if len(ids) <= self._style.prompt_tokens:
                self._turns = turns
                return [*reading.before, *ids]
        raise ArgumentError(f"that has {len(ids):,} tokens; {self._style.prompt_tokens:,} at most: write less, or --prompt-tokens")

    def _question(self, line: str) -> list[int]:
        """Return the ids of a question as those of a row in training: the row's fields as JSON, the one field that the run reads, or a
        whole text."""
        record: Any = None
        if self._opened.run is not None:
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
        if self._opened.chat is not None and not isinstance(record, dict):
            record = [{"role": "user", "content": line}]
        given = record if isinstance(record, dict) or is_conversation(record) else line
        return list(self._prompts.encoded([given]).input_ids[0])

    def _generate(self, ids: Sequence[int], show: Callable[[str], None]) -> str:
        if not ids:
            raise ArgumentError("that has no tokens: write something")
        model, style, tokenizer = self._opened.model, self._style, self._opened.reading.tokenizer
        streamer = _Streamer(tokenizer, show)
        draw = {"do_sample": True, "temperature": style.temperature, "top_p": style.top_p} if style.temperature else {"do_sample": False}
        ids_1S = torch.tensor([list(ids)], device=model.device)
        with torch.no_grad():
            family_of(model.spec.model_type, "this model").answers(
                model.generate,
                ids_1S,
                torch.ones_like(ids_1S),
                num_beams=1,
                max_new_tokens=self._most,
                source=None,
                streamer=streamer,
                **ends_of(model, tokenizer),
                **draw,
            )
        return streamer.text


class _Streamer:
    """What transformers' generation tells of each token, as text that can be shown at once."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self._growing, self._show = GrowingText(tokenizer), show
        self._prompt_is_told = False
        self.text = ""

    def put(self, ids: Any) -> None:
        if not self._prompt_is_told:  # the first call gives what was there before
            self._prompt_is_told = True
            return
        for token in ids.flatten().tolist():
            self._tell(self._growing.add(token))

    def end(self) -> None:
        self._tell(self._growing.finish())

    def _tell(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._show(piece)


@contextlib.contextmanager
def talking(folder: Path, overrides: Sequence[str], style: Style) -> Iterator[Talk]:
    """Load a finished run, of any method, or a saved side network, and talk to it.

    Raises:
        LstScaleError: it is neither, is damaged, reads pictures, or needs several processes.
    """
    opened = open_folder(folder, overrides, None, None, None, None)
    with opened.closing:
        yield Talk(opened, style)

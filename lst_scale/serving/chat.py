"""`lst-scale chat`: a finished run on a terminal, its text as it comes.

Beside a model with a chat template the lines are one conversation. Beside any other, and with `single`, each is a question of its own,
written as the rows of the run's training were.
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
from lst_scale.data.context import Reading, reading_after
from lst_scale.errors import ArgumentError
from lst_scale.inference.predict import answering, asked_of, text_of
from lst_scale.inference.scored_run import ScoredRun
from lst_scale.methods.base import Predictor
from lst_scale.serving.text import GrowingText
from lst_scale.system import distributed
from lst_scale.training.shared import load_tokenizer_of

ANSWER_TOKENS = 256  # of a conversation, where nothing else is said


@dataclass(frozen=True, kw_only=True)
class Style:
    """How answers are made. `max_tokens` None: as many as a training target had at most, in a conversation `ANSWER_TOKENS`."""

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    system: str | None = None  # how a conversation begins
    single: bool = False  # questions of their own, whatever the model
    prompt_tokens: int = 4096  # of a conversation, whose oldest turns are forgotten beyond


class Talk:
    """One run that is talked to."""

    def __init__(self, model: Predictor, asked: ScoredRun, reading: Reading, tokenizer: Any, style: Style) -> None:
        self._model, self._asked, self._reading, self._tokenizer, self._style = model, asked, reading, tokenizer, style
        has_template = getattr(tokenizer, "chat_template", None) is not None
        self.is_conversation = has_template and not style.single
        if style.system is not None and not self.is_conversation:
            raise ArgumentError("--system begins a conversation, and these are single questions: leave it out")
        self._turns: list[dict[str, str]] = []
        self._most = style.max_tokens or (ANSWER_TOKENS if self.is_conversation else asked.longest or ANSWER_TOKENS)
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
        for first in range(0, len(self._turns) + 1, 2):
            turns = self._turns[first:]
            text = self._tokenizer.apply_chat_template([*begin, *turns, said], tokenize=False, add_generation_prompt=True)
            ids = self._reading.tokenizer(text, add_special_tokens=False).input_ids  # the template writes what begins a text
            if len(ids) <= self._style.prompt_tokens:
                self._turns = turns
                return [*self._reading.before, *ids]
        raise ArgumentError(f"that has {len(ids):,} tokens; {self._style.prompt_tokens:,} at most: write less, or --prompt-tokens")

    def _question(self, line: str) -> list[int]:
        """Return the ids of a question as those of a row in training: cut alike, in the run's template."""
        limit = self._asked.recipe.data.max_source_length
        ids = self._reading.tokenizer([self._written(line)], truncation=True, max_length=limit).input_ids[0]
        return [*self._reading.before, *ids]

    def _written(self, line: str) -> str:
        """Return the source text of a line: a row's fields as JSON, the one field that the run reads, or the whole text."""
        record: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
        columns = self._asked.columns
        if not isinstance(record, dict):
            if len(columns) != 1:
                return line
            record = {columns[0]: line}
        return text_of(self._asked, record, "what was typed", 1)

    def _generate(self, ids: Sequence[int], show: Callable[[str], None]) -> str:
        if not ids:
            raise ArgumentError("that has no tokens: write something")
        model, style = self._model, self._style
        streamer = _Streamer(self._tokenizer, show)
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
def talking(run: Path, overrides: Sequence[str], style: Style) -> Iterator[Talk]:
    """Load a finished run, of any method, and talk to it.

    Raises:
        LstScaleError: it is no finished run, is damaged, reads pictures, or needs several processes.
    """
    asked = asked_of([run], overrides, probabilities=False)
    if asked.recipe.vision is not None:
        raise ArgumentError(f"{run} reads pictures, which nobody can type: use lst-scale predict")
    placement = asked.recipe.backbone.placement
    if not placement.each_rank_alone:
        raise ArgumentError(
            f"backbone.placement {placement.name} needs several processes, and a talk has one: write backbone.placement=replicated "
            "or streamed"
        )
    world = distributed.connect()
    if world.size > 1:
        raise ArgumentError("a talk has one process: start it without a launcher")
    tokenizer = load_tokenizer_of(asked.recipe.backbone.checkpoint, asked.recipe.backbone.revision)
    reading = reading_after(asked.context, tokenizer, beside_backbone=asked.recipe.method.beside_backbone)
    with answering([run], asked.recipe, world, reading) as (model, _):
        yield Talk(model, asked, reading, tokenizer, style)

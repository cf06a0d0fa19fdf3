"""What requests hold, as OpenAI's API has it and as our own; what is unknown in them is passed over, as clients send more and more."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_TOKENS, MOST_TEXTS, MOST_LABELS, MOST_STOPS, MOST_ANSWERS = 4096, 64, 1000, 8, 256


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=False)


class _Generating(_Request):
    model: str
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None  # what torch takes
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    stream: bool = False
    n: int = 1
    ignore_eos: bool = False  # not OpenAI's, but other servers', to measure with

    @model_validator(mode="after")
    def _one_answer(self) -> _Generating:
        if self.n != 1:
            raise ValueError("n must be 1: ask again for another answer")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(_Generating):
    """A text to go on with, or several."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class Message(_Request):
    role: str
    content: str


class Chat(_Generating):
    """A conversation to go on with, by the chat template of the backbone's tokenizer."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0


class Classification(_Request):
    """Texts, or rows of fields, to label; by one side network or by several at once."""

    model: str | None = None
    models: Annotated[list[str], Field(min_length=1, max_length=1000)] | None = None
    input: str | dict[str, Any] | Annotated[list[str | dict[str, Any]], Field(min_length=1, max_length=MOST_TEXTS)]
    labels: Annotated[list[str], Field(min_length=2, max_length=MOST_LABELS)] | None = None

    @model_validator(mode="after")
    def _some_model(self) -> Classification:
        if (self.model is None) == (self.models is None):
            raise ValueError("write model, or models for several at once")
        if len(self.names) * len(self.inputs) > MOST_ANSWERS:
            raise ValueError(f"{len(self.names)} models on {len(self.inputs)} texts are more than {MOST_ANSWERS} answers: ask in parts")
        return self

    @property
    def names(self) -> list[str]:
        return [self.model] if self.model is not None else self.models or []

    @property
    def inputs(self) -> list[str | dict[str, Any]]:
        return self.input if isinstance(self.input, list) else [self.input]


class NewNetwork(_Request):
    """A side network in the server's own folder of them, by its folder's name."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]

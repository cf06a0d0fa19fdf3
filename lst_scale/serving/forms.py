"""How answers are written down: OpenAI's forms, whole and piece by piece."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lst_scale.serving.answers import Piece, Reply


@dataclass(frozen=True)
class Form:
    """How an answer is written down."""

    prefix: str
    kind: str
    model: str
    chat: bool
    logprobs: bool
    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"{self.prefix}-{self.number}", "object": kind, "created": self.created, "model": self.model}

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else self.kind
        content = {"delta": {"role": "assistant", "content": piece.text}} if self.chat else {"text": piece.text, "logprobs": None}
        return self._head(kind) | {"choices": [{"index": index, **content, "finish_reason": piece.finish_reason}]}

    def whole(
        self, tokenizer: Any, prompts: Sequence[Sequence[int]], replies: Sequence[Reply], ended: Sequence[tuple[str, str]]
    ) -> dict[str, Any]:
        choices = []
        for index, (reply, (text, reason)) in enumerate(zip(replies, ended, strict=True)):
            content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": index, **content, "logprobs": self._logprobs(tokenizer, reply), "finish_reason": reason})
        read, made = sum(map(len, prompts)), sum(len(reply.tokens) for reply in replies)
        usage = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
        return self._head(self.kind) | {"choices": choices, "usage": usage}

    def _logprobs(self, tokenizer: Any, reply: Reply) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        texts = [tokenizer.decode([chosen.token]) for chosen in reply.tokens]
        if self.chat:
            content = []
            for text, chosen in zip(texts, reply.tokens, strict=True):
                best = [{"token": tokenizer.decode([token]), "logprob": each, "bytes": None} for token, each in chosen.likeliest]
                content.append({"token": text, "logprob": chosen.logprob, "bytes": None, "top_logprobs": best})
            return {"content": content, "refusal": None}
        # Tokens may have one text, such as the halves of a character: the likeliest of them stays.
        best_of = [{tokenizer.decode([token]): each for token, each in reversed(chosen.likeliest)} for chosen in reply.tokens]
        offsets = [sum(map(len, texts[:number])) for number in range(len(texts))]
        logprobs = [chosen.logprob for chosen in reply.tokens]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": best_of, "text_offset": offsets}


def error_form(status: int, message: str) -> dict[str, Any]:
    """Return an error as OpenAI writes one."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}

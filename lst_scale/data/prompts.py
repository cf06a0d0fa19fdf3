"""The tokenizer of a model that goes on with a text: sources are prompts, which do not end; targets are what follows, which does.

source   [<bos>] Review : a fine film Sentiment :       too long ones lose their beginning, never the question at their end
target   ▁positive </s>                                 as it is tokenized after a text, not as at the beginning of one

What a row is made of says in which `Way`: fields are apart from their answer by a space; a completion follows its prompt as it is
written; a chat template begins texts and ends answers itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lst_scale.errors import ArgumentError, DataError, fence

ANCHOR = "\n"  # no tokenizer joins it to a word


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Token ids, under transformers' name."""

    input_ids: list[Any]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How rows are tokenized."""

    begins_texts: bool = True  # a source begins with what the tokenizer begins texts with; False: that has been written
    as_written: bool = False  # a target follows its source as it is written; False: after a space
    end: int | None = None  # the token that ends a target; None: the one that ends a text


APART = Way()


class PromptTokenizer:
    """A tokenizer of transformers, called as one that ends texts itself is called. All but the call is its own."""

    def __init__(self, tokenizer: Any, way: Way = APART) -> None:
        tokenizer.truncation_side = "left"
        if tokenizer.pad_token_id is None:  # padding is masked: any token will do
            tokenizer.pad_token = tokenizer.eos_token
        self._tokenizer, self.way = tokenizer, way
        self.eos_token_id: int = tokenizer.eos_token_id if way.end is None else way.end
        self._between = _between(tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        *,
        text_target: str | Sequence[str] | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        **options: Any,
    ) -> Any:
        if text_target is not None:
            return self._targets(text_target, max_length if truncation else None)
        whole = options.get("add_special_tokens", True)
        found = self._tokenizer(
            text, max_length=max_length, truncation=truncation, **options | {"add_special_tokens": whole and self.way.begins_texts}
        )
        if whole and text is not None and not isinstance(text, str):
            return TokenIds(input_ids=[self._long_enough(ids) for ids in found.input_ids])
        return found

    def going_on(self) -> PromptTokenizer:
        """Return the same for texts that stand after another one: what begins a text has been written already."""
        return self.in_way(replace(self.way, begins_texts=False))

    def in_way(self, way: Way) -> PromptTokenizer:
        return PromptTokenizer(self._tokenizer, way)

    def _targets(self, texts: str | Sequence[str], limit: int | None) -> TokenIds:
        if isinstance(texts, str):
            return TokenIds(input_ids=self._targets([texts], limit).input_ids[0])
        if self.way.as_written and not self._between:
            each = [self._right_after(text) for text in texts]
        else:
            spaced = [text if self.way.as_written else f"{self._between}{text}" for text in texts]
            each = self._tokenizer(spaced, add_special_tokens=False).input_ids if spaced else []
        return TokenIds(input_ids=[[*ids[: None if limit is None else limit - 1], self.eos_token_id] for ids in each])

    def _right_after(self, text: str) -> list[int]:
        """Return the ids of a text that follows another one, from a tokenizer that puts a space before every text."""
        first, both = (self._tokenizer(each, add_special_tokens=False).input_ids for each in (ANCHOR, ANCHOR + text))
        if text.startswith(" ") or both[: len(first)] != first:
            return list(self._tokenizer(text.removeprefix(" "), add_special_tokens=False).input_ids)
        return list(both[len(first) :])

    def _long_enough(self, ids: list[int]) -> list[int]:
        """A prompt has two tokens at least: one to read, and one that the answer is predicted from."""
        first = self._tokenizer.bos_token_id
        return [self._tokenizer.eos_token_id if first is None else first] * max(0, 2 - len(ids)) + ids


def in_way(tokenizer: Any, way: Way) -> Any:
    """Return a tokenizer that does as `way` says; one that begins and ends texts itself as it is."""
    return tokenizer.in_way(way) if isinstance(tokenizer, PromptTokenizer) else tokenizer


def going_on(tokenizer: Any) -> Any:
    """Return a tokenizer of texts whose beginning has been written already; one that ends texts itself begins none."""
    return tokenizer.going_on() if isinstance(tokenizer, PromptTokenizer) else tokenizer


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Return a conversation by the tokenizer's chat template, up to the answer that it asks for.

    Raises:
        ArgumentError: there is no template, or it refuses these messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ArgumentError("this backbone's tokenizer has no chat template: give a text")
    with fence(ArgumentError, "the chat template refuses this conversation"):
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def ends_no_text(tokenizer: Any) -> bool:
    """Whether texts stay open in this tokenizer, as those of models that go on with a text do.

    Raises:
        DataError: it has no token that could end one.
    """
    ids = tokenizer("a").input_ids
    if ids and ids[-1] == tokenizer.eos_token_id:
        return False
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no token that ends a text (eos_token): name it in tokenizer_config.json")
    return True


def _between(tokenizer: Any) -> str:
    """Return what stands before a target so that it gets the ids that it has after a text and a space."""
    before, both = (tokenizer(text, add_special_tokens=False).input_ids for text in ("x", "x a"))
    after = both[len(before) :]
    return "" if tokenizer("a", add_special_tokens=False).input_ids == after else " "

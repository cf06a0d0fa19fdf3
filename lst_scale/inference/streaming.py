"""An answer as it is written: generation runs in a thread, and its text comes out word by word."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer


class Left(StoppingCriteria):  # type: ignore[misc]
    """Ends generation once nobody listens any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def pieces(generate: Callable[..., Any], tokenizer: Any) -> Iterator[str]:
    """Yield the text of what `generate(streamer=..., stopping_criteria=...)` writes; closing the iterator ends it.

    Raises:
        whatever `generate` does.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    left, failed = Left(), list[BaseException]()

    def work() -> None:
        try:
            generate(streamer=streamer, stopping_criteria=StoppingCriteriaList([left]))
        except BaseException as error:
            failed.append(error)
        finally:
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (text for text in streamer if text)
    finally:
        left.event.set()
        thread.join()
    if failed:
        raise failed[0]


def answer_of(texts: Iterator[str], prefix: str) -> Iterator[str]:
    """Yield the same without blanks at its beginning, and without the prefix that was written before each target."""
    begun, held = False, ""
    for text in texts:
        if begun:
            yield text
            continue
        held = (held + text).lstrip()
        if not held or (len(held) < len(prefix) and prefix.startswith(held)):
            continue
        begun, held = bool(rest := held.removeprefix(prefix).lstrip()), ""
        if begun:
            yield rest
    if held:  # all that came is a beginning of the prefix, and so the answer
        yield held

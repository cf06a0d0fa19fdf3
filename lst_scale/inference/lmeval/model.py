"""lm_eval's face of what is evaluated: prompts and continuations become token ids exactly as those of lm_eval's own models do.

Where the two meet, the text is tokenized whole and then divided, blanks at a prompt's end going over to the continuation (lm_eval's
`TemplateLM._encode_pair`); beside a model that reads prompts apart each is tokenized by itself. A run's context stands before every prompt.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lst_scale.data.prompts import PromptTokenizer, chat_text
from lst_scale.errors import ArgumentError, did_you_mean, fence
from lst_scale.inference.lmeval.pairs import Judge, Pair
from lst_scale.inference.lmeval.subject import Subject
from lst_scale.inference.lmeval.writing import written
from lst_scale.runs.logs import progress_of

NEW_TOKENS = 256  # of an answer, where the task says nothing, as in lm_eval
DRAWING = ("temperature", "top_p", "top_k", "min_p", "typical_p")  # without effect where the likeliest token is taken


class SubjectLM(TemplateLM):  # type: ignore[misc]
    """A subject as lm_eval asks it.

    Args:
        batch_size: prompts at once.
        most_tokens: of prompt and answer together; longer prompts lose their beginning.
        with_end: also count the token that ends an answer, as training and `lst-scale predict` do.
        chat: prompts are conversations, written by the tokenizer's template.
    """

    def __init__(self, subject: Subject, *, batch_size: int, most_tokens: int, with_end: bool, chat: bool) -> None:
        super().__init__()
        self._subject, self._batch_size, self._with_end = subject, batch_size, with_end
        self._before, self.max_length = subject.reading.before, most_tokens
        self._judge = Judge(subject.model, subject.passes, batch_size)
        # What begins a text stands before a context, and is written by the template that a run on conversations was trained with.
        self._begins_texts = subject.reading.length == 0 and not (chat and subject.chat is not None)
        self._special = isinstance(subject.tokenizer, PromptTokenizer)
        self.tokenizer = subject.tokenizer
        self.backend = "causal" if subject.model.spec.one_stack else "seq2seq"
        self.cut = 0  # prompts that lost their beginning
        self.is_asked = False  # at this moment

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a prompt begins with."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            begun = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = not begun and (self._begins_texts or not self._special)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    @contextlib.contextmanager
    def _asked(self, total: int, what: str) -> Iterator[Callable[[int], None]]:
        self.is_asked = True  # and stays so where that fails: it was no task's mistake then
        with progress_of(total, 0, shown=True, what=what) as advance:
            yield advance
        self.is_asked = False

    # How likely texts are.

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        end = [self.eot_token_id] if self._with_end else []
        pairs = [self._pair(prompt, [*answer, *end]) for _, prompt, answer in requests]
        with self._asked(len(set(pairs)), "continuation") as advance:
            return [(found.nats, found.is_greedy) for found in self._judge(pairs, advance)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        assert self.backend == "causal", "tasks of texts alone are refused before"
        windows = [list(self._windows(*request.args)) for request in requests]
        with self._asked(sum(map(len, windows)), "window") as advance:
            found = iter(self._judge(list(itertools.chain.from_iterable(windows)), advance))
        return [sum(each.nats for each in itertools.islice(found, len(several))) for several in windows]

    def _windows(self, text: str) -> Iterator[Pair]:
        """Yield a text in portions, each after as much of what stands before it as there is room for."""
        portions = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
        for before, portion in map(make_disjoint_window, portions):
            yield Pair((*self._before, *before), tuple(portion))

    def _pair(self, prompt: Sequence[int], answer: Sequence[int]) -> Pair:
        """Return token ids that fit; a prompt that does not loses its beginning."""
        if not answer:
            raise ArgumentError("a continuation has no tokens: write doc_to_choice and target_delimiter so that each has some text")
        room = self.max_length
        if self.backend == "causal":
            room += 1 - len(answer)  # the last token of an answer is predicted, not read
        if room < 1 or len(answer) > self.max_length:
            raise ArgumentError(f"a continuation has {len(answer)} tokens, and prompt and answer {self.max_length} at most")
        return Pair((*self._before, *self._fitting(prompt, room)), tuple(answer))

    def _fitting(self, prompt: Sequence[int], room: int) -> Sequence[int]:
        self.cut += len(prompt) > room
        return prompt[-room:]

    # What it writes.

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        answers: dict[int, str] = {}
        asked = [(number, *request.args) for number, request in enumerate(requests)]
        with self._asked(len(asked), "answer") as advance:
            for _, alike in itertools.groupby(sorted(asked, key=_manner), key=_manner):
                several = list(alike)
                found = self._written([prompt for _, prompt, _ in several], several[0][2], requests[several[0][0]].task_name, advance)
                answers |= dict(zip((number for number, _, _ in several), found, strict=True))
        return [answers[number] for number in range(len(asked))]

    def _written(self, prompts: Sequence[str], manner: dict[str, Any], task: str, advance: Callable[[int], None]) -> list[str]:
        """Return the answers to prompts that are answered in one manner."""
        with fence(ArgumentError, f"{task}: generation_kwargs can't be used"):
            options = dict(normalize_gen_kwargs(manner, NEW_TOKENS))
            count = int(options.pop("max_gen_toks"))
            until = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
            if not options["do_sample"] or options.get("temperature") == 0:
                options = {key: value for key, value in options.items() if key not in DRAWING} | {"do_sample": False}
            _refuse_unknown(options)
        room = self.max_length - (count if self.backend == "causal" else 0)
        if room < 1:
            raise ArgumentError(f"{task} asks for {count} new tokens, and prompt and answer have {self.max_length} at most")
        sources = [(*self._before, *self._fitting(self.tok_encode(prompt), room)) for prompt in prompts]
        answers: dict[int, str] = {}
        for some in _by_length(sources, self._batch_size):
            found = written(self._subject, [sources[row] for row in some], until=until, max_new_tokens=count, options=options)
            answers |= dict(zip(some, found, strict=True))
            advance(len(some))
        return [answers[row] for row in range(len(sources))]

    # Conversations.

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation up to the answer that it asks for; without `add_generation_prompt` the answer has begun."""
        asked, begun = (chat_history, "") if add_generation_prompt else (chat_history[:-1], chat_history[-1]["content"])
        chat = self._subject.chat
        text = chat_text(self.tokenizer, asked) if chat is None else chat.asked(asked, "--chat")
        return text + begun


def _refuse_unknown(options: dict[str, Any]) -> None:
    """Refuse what transformers' generation would, before it runs.

    Raises:
        ValueError: a name or a value means nothing to it.
    """
    from transformers import GenerationConfig

    known = GenerationConfig().to_dict()
    for name in options.keys() - known.keys():
        raise ValueError(f"{name} is no option of transformers' generation.{did_you_mean(name, known)}")
    GenerationConfig(**options).validate()


def _manner(asked: tuple[int, str, dict[str, Any]]) -> str:
    return repr(sorted(asked[2].items()))


def _by_length(rows: Sequence[Sequence[int]], size: int) -> Iterable[list[int]]:
    """Yield the numbers of rows, so many at a time, the longest first: memory that does not suffice is found at once."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    return (order[first : first + size] for first in range(0, len(order), size))

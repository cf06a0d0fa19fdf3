"""Small chat models: a tokenizer whose template writes what begins a text and ends turns with a token of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from helpers.llama_runs import ENDS, make_tokenizer
from helpers.llamas import make_llama

# As Gemma's: other than alternating turns are refused, answers lose their blanks, and what ends a turn does not end a text.
TEMPLATE = """{{ bos_token }}{%- if messages[0].role == 'system' -%}
{{ '<|system|>' + messages[0].content + '<|end|>' }}{%- set turns = messages[1:] -%}{%- else -%}{%- set turns = messages -%}{%- endif -%}
{%- for turn in turns -%}
{%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('turns must alternate') }}{%- endif -%}
{{ '<|' + turn.role + '|>' + turn.content | trim + '<|end|>\\n' }}
{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"""
MARKS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a tokenizer that begins texts with <s>, as the template does: whoever lets both do so has it twice."""
    tokenizer = make_tokenizer(**ENDS)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = template
    return tokenizer


def save_chat_model(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Save a small Llama with this tokenizer; its configuration names no token for padding."""
    tokenizer = chat_tokenizer(template)
    make_llama("llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=None).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Return a conversation that the user begins."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

"""What a decoder-only model's config.json may say; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

COUNTS = {  # the largest that makes sense: far above any model, far below what would take minutes to refuse
    "vocab_size": 10**8,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "head_dim": 10**6,
    "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5,
    "num_hidden_layers": 1000,
    "max_position_embeddings": 10**9,
}
# What Gemma 3's text_config may leave out, and what transformers then takes.
GEMMA3 = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
MUST = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a Gemma 3's text_config as that of a model of its own; which token ends an answer is said outside of it."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    outside = {name: config[name] for name in ("eos_token_id",) if config.get(name) is not None}
    return GEMMA3 | text | outside | {"model_type": "gemma3_text"}


def problem_of(config: Mapping[str, Any]) -> str | None:
    """Return the first value that can't be meant, and what it should be."""
    for name, most in COUNTS.items():
        value = config.get(name)
        if (name in MUST and value is None and name in config) or (value is not None and not _is_count(value, most)):
            return f"{name} {value!r} should be a whole number from 1 to {most}"
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads is not None and kv_heads is not None and heads % kv_heads:
        return f"num_key_value_heads {kv_heads} should divide num_attention_heads {heads}"
    epsilon = config.get("rms_norm_eps", 1e-6)
    if not (_is_number(epsilon) and 0 < epsilon < 1):
        return f"rms_norm_eps {epsilon!r} should be a small number above 0"
    return None


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)

"""What a T5's config.json may say; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

COUNTS = {  # the largest that makes sense: far above any model, far below what would take minutes to refuse
    "vocab_size": 10**8,
    "d_model": 10**6,
    "d_ff": 10**7,
    "d_kv": 10**6,
    "num_heads": 10**5,
    "num_layers": 1000,
    "num_decoder_layers": 1000,
    "relative_attention_num_buckets": 10**6,
    "relative_attention_max_distance": 10**9,
}
ACTIVATIONS = (
    "relu",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "silu",
    "swish",
    "tanh",
    "relu6",
    "mish",
    "linear",
)
TOKENS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")


def problem_of(config: Mapping[str, Any]) -> str | None:
    """Return the first value that can't be meant, and what it should be. A key that is missing has the default of transformers."""
    for name, most in COUNTS.items():
        value = config.get(name)
        if name in config and not (name == "num_decoder_layers" and value is None) and not _is_count(value, most):
            return f"{name} {value!r} should be a whole number from 1 to {most}"
    if "dropout_rate" in config and not (_is_number(config["dropout_rate"]) and 0 <= config["dropout_rate"] < 1):
        return f"dropout_rate {config['dropout_rate']!r} should be a number of at least 0 and below 1"
    epsilon = config.get("layer_norm_epsilon", 1e-6)
    if not (_is_number(epsilon) and 0 < epsilon < 1):
        return f"layer_norm_epsilon {epsilon!r} should be a small number above 0"
    activation = config.get("feed_forward_proj", "relu")
    if not isinstance(activation, str) or activation.removeprefix("gated-") not in ACTIVATIONS:
        return f"feed_forward_proj {activation!r} should be relu, gated-gelu, or another of {', '.join(ACTIVATIONS)} with or without gated-"
    for name in TOKENS:
        problem = _token_problem(name, config)
        if problem:
            return problem
    return None


def _token_problem(name: str, config: Mapping[str, Any]) -> str | None:
    value, size = config.get(name), config.get("vocab_size", COUNTS["vocab_size"])
    ids = value if name == "eos_token_id" and isinstance(value, list) and value else [value]
    if value is None or all(type(each) is int and 0 <= each < size for each in ids):
        return None
    return f"{name} {value!r} should be the number of a token, from 0 to {size - 1}"


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)

"""What a T5Gemma 2's config.json may say; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lst_scale.backbone.families.llama.config import problem_of as problem_of_stack

# What both stacks must have the same: they share a word table, and one side network stands beside both.
SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")


def stacks_of(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return what is said of the text's encoder and of the decoder.

    Raises:
        KeyError: one of them is missing.
    """
    return config["encoder"]["text_config"], config["decoder"]


def problem_of(config: Mapping[str, Any]) -> str | None:
    """Return the first value that can't be meant, and what it should be."""
    encoder, decoder = config.get("encoder"), config.get("decoder")
    if not isinstance(encoder, dict) or not isinstance(encoder.get("text_config"), dict) or not isinstance(decoder, dict):
        return "encoder.text_config and decoder should say what the two stacks are"
    first, second = stacks_of(config)
    for where, stack in (("encoder.text_config", first), ("decoder", second)):
        problem = problem_of_stack(stack)
        if problem is not None:
            return f"{where}: {problem}"
    for name in SAME:
        if first.get(name) != second.get(name):
            return (
                f"{name} should be the same in both stacks, not {first.get(name)!r} in the encoder and {second.get(name)!r} in the decoder"
            )
    return None

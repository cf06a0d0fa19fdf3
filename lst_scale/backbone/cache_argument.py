"""What transformers calls a cache of keys and values, as an argument and as a field of its outputs.

`past_key_values` up to 5.23, `cache` from 5.24 on, which takes the old name from callers but no longer from a model of somebody else.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import Seq2SeqLMOutput

CACHE = "cache" if any(field.name == "cache" for field in fields(Seq2SeqLMOutput)) else "past_key_values"


def cache_argument(cache: Any) -> dict[str, Any]:
    """Return the keyword argument that hands `cache` to a layer, a model or an output of transformers."""
    return {CACHE: cache}

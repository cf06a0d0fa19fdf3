"""What the package must know of a backbone's shape. Each family adds the numbers of its own; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """The numbers that every family has. Instances are of a family's own subclass, found by `model_type`."""

    model_type: str
    vocab_size: int
    d_model: int
    d_ff: int
    num_heads: int
    dropout_rate: float
    pad_token_id: int
    eos_token_id: int
    decoder_start_token_id: int

    @property
    def depth(self) -> int:
        """How many blocks can have a side block."""
        raise NotImplementedError

    @property
    def cache_layers(self) -> int:
        """How many layers of a cache of keys and values the backbone fills."""
        raise NotImplementedError

    @property
    def widths(self) -> Mapping[str, int]:
        """What a side network's reduction factor must divide."""
        raise NotImplementedError

    @property
    def architecture(self) -> Mapping[str, Any]:
        """What a side network can't do without: it fits a backbone whose values are the same."""
        raise NotImplementedError

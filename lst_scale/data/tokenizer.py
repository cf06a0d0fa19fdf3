"""The checkpoint's own tokenizer."""

from __future__ import annotations

from typing import Any

from lst_scale.assets import resolve
from lst_scale.errors import DataError


def load_tokenizer(checkpoint: str, revision: str | None = None) -> Any:
    """Return the tokenizer that belongs to a backbone checkpoint.

    Raises:
        DataError: there is none, or it can't be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve(checkpoint), revision=revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"the tokenizer of {checkpoint} could not be loaded: {reason}") from error

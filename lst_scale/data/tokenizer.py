"""The checkpoint's own tokenizer, and whether it is that: one that does not fit its model trains on noise without a word."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lst_scale.data.prompts import APART, PromptTokenizer, ends_no_text
from lst_scale.errors import DataError, fence
from lst_scale.system.assets import resolve

VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
SETTINGS = "tokenizer_config.json"
WITHOUT_VOCABULARY = ("ByT5Tokenizer", "PerceiverTokenizer", "CanineTokenizer")  # bytes and characters need none

# T5 has 32,100 tokens for 32,128 embeddings and mT5 250,100 for 250,112: sizes are rounded up for the hardware, by a few hundred at most.
SPARE_EMBEDDINGS, SPARE_SHARE = 256, 0.1
SAMPLED_ROWS, SAMPLED_LETTERS = 500, 1000
KNOWN_SHARE_NEEDED, KNOWN_SHARE_USUAL = 0.25, 0.95


def load_tokenizer(checkpoint: str, revision: str | None = None) -> Any:
    """Return the tokenizer that belongs to a backbone checkpoint.

    Raises:
        DataError: there is none, or it can't be read.
    """
    from transformers import AutoTokenizer

    refuse_missing_tokenizer(checkpoint)
    with fence(DataError, f"the tokenizer of {checkpoint} could not be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(resolve(checkpoint), revision=revision, trust_remote_code=False)
        return PromptTokenizer(tokenizer) if ends_no_text(tokenizer) else tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """Return what changes when a text may get other ids."""
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    what = [type(tokenizer).__name__, transformers.__version__, tokenizers.__version__, tokenizer.all_special_tokens, rules]
    what += [repr(tokenizer.way)] if isinstance(tokenizer, PromptTokenizer) and tokenizer.way != APART else []
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def refuse_missing_tokenizer(checkpoint: str) -> None:
    """Refuse a folder without a vocabulary, from which transformers would make a tokenizer that knows no word. Imports nothing heavy.

    Raises:
        DataError: says which files to copy.
    """
    folder = Path(resolve(checkpoint))
    if not folder.is_dir() or any((folder / name).is_file() for name in VOCABULARIES):
        return
    settings: Any = {}
    if (folder / SETTINGS).is_file():
        with fence(DataError, f"{folder / SETTINGS} can't be read"):
            settings = json.loads((folder / SETTINGS).read_bytes())
    if not isinstance(settings, dict) or settings.get("tokenizer_class") not in WITHOUT_VOCABULARY:
        raise DataError(
            f"{folder} holds no tokenizer ({VOCABULARIES[0]} or {VOCABULARIES[1]}): copy the tokenizer's files of the same model into it, "
            "or save it there with tokenizer.save_pretrained"
        )


def refuse_misfit(tokenizer: Any, vocab_size: int, checkpoint: str) -> None:
    """Refuse a tokenizer of another model, as far as sizes show it.

    Raises:
        DataError: it has tokens without an embedding, or far fewer tokens than there are embeddings.
    """
    with fence(DataError, f"the tokenizer of {checkpoint} can't be used"):
        largest, entries = max(tokenizer.get_vocab().values(), default=-1), len(tokenizer)
    remedy = "copy the tokenizer's files of the same model into the checkpoint"
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer of {checkpoint} has token {largest}, but its model has embeddings for 0 to {vocab_size - 1} alone: {remedy}, "
            "or resize the model's embedding"
        )
    if vocab_size - entries > max(SPARE_EMBEDDINGS, SPARE_SHARE * vocab_size):
        raise DataError(f"the tokenizer of {checkpoint} has {entries} entries, but its model has {vocab_size} embeddings: {remedy}")


def refuse_unknown_text(tokenizer: Any, texts: Sequence[str], checkpoint: str) -> str | None:
    """Refuse a tokenizer that knows next to nothing of the training sources; return a sentence when it misses a noticeable part.

    Raises:
        DataError: nearly all letters are unknown.
    """
    share = known_share(tokenizer, [text[:SAMPLED_LETTERS] for text in texts[:SAMPLED_ROWS]])
    if share < KNOWN_SHARE_NEEDED:
        raise DataError(
            f"the tokenizer of {checkpoint} knows {100 * share:.0f} % of the letters in the training sources, the rest is "
            f"{tokenizer.unk_token} to it: choose a backbone made for this language or script, such as mT5 or ByT5, or give the "
            "checkpoint its own tokenizer"
        )
    if share < KNOWN_SHARE_USUAL:
        return f"{100 * (1 - share):.0f} % of the letters in the training sources are unknown to the tokenizer of {checkpoint}"
    return None


def known_share(tokenizer: Any, texts: Sequence[str]) -> float:
    """Return which part of the letters of some texts is still there after encoding and decoding."""
    before = after = 0
    with fence(DataError, "the training sources can't be tokenized"):
        for text, ids in zip(texts, tokenizer(list(texts), add_special_tokens=False).input_ids if texts else [], strict=True):
            decoded = tokenizer.decode([token for token in ids if token != tokenizer.unk_token_id])
            letters = len("".join(text.split()))
            before += letters
            after += min(letters, len("".join(decoded.split())))
    return after / before if before else 1.0

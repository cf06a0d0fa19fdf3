"""Small real models: nothing is downloaded, nothing is mocked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import T5ForConditionalGeneration

from helpers.paths import EMBEDDED


def make_t5(folder: Path, kind: Any = T5ForConditionalGeneration, **changes: Any) -> Path:
    """Save a random T5, or mT5, that knows the embedded tokenizer's vocabulary."""
    torch.manual_seed(0)
    values = {
        "vocab_size": 4096,
        "d_model": 32,
        "d_ff": 64,
        "d_kv": 8,
        "num_heads": 4,
        "num_layers": 3,
        "decoder_start_token_id": 0,
    } | changes
    model = kind(kind.config_class(**values))
    if values.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
        model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / "tiny-t5" / name, folder)
    return folder

"""Tiny real T5s for the tests of the side network. Weights are random but spread out, so that argmaxes are clear and beams differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from lst_scale import LadderConfig, LadderModel

SHAPE = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 4}


def tiny_t5(*, gated: bool = False, multilingual: bool = False, seed: int = 0, **changes: Any) -> Any:
    """Return a T5 (v1.0-like: relu, scaled tied head), a gated v1.1-like one with a head of its own, or an mT5."""
    torch.manual_seed(seed)
    own_head = gated or multilingual
    options: dict[str, Any] = SHAPE | {"dropout_rate": 0.1, "decoder_start_token_id": 0} | changes
    if own_head:
        options |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    model: Any = MT5ForConditionalGeneration(MT5Config(**options)) if multilingual else T5ForConditionalGeneration(T5Config(**options))
    if own_head:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(options["vocab_size"], options["d_model"]) * 0.2)
    return model.eval()


def tiny_ladder(backbone: Any | None = None, *, seed: int = 1, **changes: Any) -> LadderModel:
    """Return a ladder in eval mode whose every weight, gates and biases too, is away from its start."""
    options: dict[str, Any] = {"reduction_factor": 2, "side_layers": (0, 2)} | changes
    model = LadderModel(tiny_t5() if backbone is None else backbone, LadderConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def batch(num_rows: int = 4, *, seed: int = 2) -> dict[str, Tensor]:
    """Return source ids, their mask and labels; rows have different lengths, and no token is padding or end."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, 64, (num_rows, 9), generator=generator)
    labels = torch.randint(2, 64, (num_rows, 5), generator=generator)
    mask = torch.ones_like(input_ids)
    for row in range(1, num_rows):
        input_ids[row, 9 - row :], mask[row, 9 - row :] = 0, 0
        labels[row, 5 - min(row, 4) :] = -100
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}

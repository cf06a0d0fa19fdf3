"""Inputs and outputs of the original release: how they are read, and how gradients are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from helpers.paths import ROOT

PARITY = ROOT / "tests" / "parity"


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["config"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def backbone_of(config: dict[str, Any], weights: dict[str, Tensor]) -> T5ForConditionalGeneration:
    names = ("vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_layers")
    model = T5ForConditionalGeneration(
        T5Config(
            **{name: config[name] for name in names},
            feed_forward_proj=config.get("feed_forward_proj", "relu"),
            tie_word_embeddings=config.get("tie_word_embeddings", True),
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )
    if "lm_head.weight" in weights:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(weights["lm_head.weight"]))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("embed_tokens" in name or name == "lm_head.weight" for name in missing), missing
    return model


def close_gradients(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare to 1e-5 relative: float32 sums in another order."""
    # The release also makes gates for blocks without a side block; they get no gradient and have no counterpart here.
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        # A gate's gradient is one sum over B x S x R terms of both signs, so its rounding error goes with the size of the terms, not of
        # their sum: the largest gate gradient stands for it. Every other tensor is measured against its own largest element.
        peers = [g for n, g in expected.items() if "gate" in n] if "gate" in name else [gradient]
        scale = max(float(peer.abs().max()) for peer in peers)
        found = ours[name].grad
        assert found is not None, name
        torch.testing.assert_close(found.view_as(gradient), gradient, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")

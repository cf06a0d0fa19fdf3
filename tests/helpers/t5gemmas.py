"""A T5Gemma 2 with random weights, two blocks of each kind in both stacks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

STACK: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "query_pre_attn_scalar": 16,
    "sliding_window": 6,  # shorter than the texts of the tests
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "final_logit_softcapping": 5.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def make_t5gemma(**changes: Any) -> Any:
    """Return a model whose weights are large enough for its predictions to differ."""
    torch.manual_seed(0)
    vision = VISION | {"model_type": "siglip_vision_model"}
    encoder = {"text_config": STACK | changes, "vision_config": vision, "mm_tokens_per_image": 4, "eoi_token_index": 95}
    config = T5Gemma2Config(encoder=encoder, decoder=STACK | changes, image_token_index=96)
    model = T5Gemma2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3 if "embed" in name else 0.12)
            elif name.endswith("eoi_embedding"):
                parameter.normal_()
            elif "post_" in name:
                parameter.fill_(4.0)  # so that blocks say more than the token that they read, which the tied head would repeat
    return model

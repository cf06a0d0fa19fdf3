"""Decoder-only models of every family, four blocks deep, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
SLIDING = ["sliding_attention", "full_attention"] * 2
# What makes each of them itself: windows shorter than the texts of the tests, soft caps, multipliers, blocks without positions.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 6},
    "gemma": {},
    "gemma2": {"sliding_window": 6, "layer_types": SLIDING, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 6, "layer_types": SLIDING, "query_pre_attn_scalar": 16},
    "phi3": {"original_max_position_embeddings": 128},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "olmo2": {},
    "olmo3": {"sliding_window": 6, "layer_types": SLIDING},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
}


def make_llama(model_type: str, **changes: Any) -> Any:
    """Return a model whose weights are large enough for its predictions to differ."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**(SHAPE | FAMILIES[model_type] | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3 if "embed" in name else 0.12)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


def make_beside_images(folder: Path) -> Any:
    """Return a Gemma 3 of images and text, and write it into a folder."""
    torch.manual_seed(0)
    text = SHAPE | FAMILIES["gemma3_text"] | {"hidden_size": 64, "model_type": "gemma3_text"}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision | {"model_type": "siglip_vision_model"}, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    return model

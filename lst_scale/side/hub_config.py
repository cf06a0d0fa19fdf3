"""config.json of a saved side network: what transformers' tools and the hub's pages look for, drawn from its own record.

`AutoConfig.from_pretrained` reads it once this package is imported. Nobody of ours does: what a side network is says ladder_config.json.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from lst_scale.backbone.taps import BackboneIdentity, BackboneSpec

FILE, MODEL_TYPE = "config.json", "ladder"
TOKENS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")


class LadderHubConfig(PreTrainedConfig):  # type: ignore[misc]
    """`ladder` is the side network's design, `base_model_name_or_path` its backbone."""

    model_type = MODEL_TYPE


def hub_config(design: dict[str, Any], identity: BackboneIdentity, spec: BackboneSpec) -> str:
    """Return the file's contents."""
    tokens = {name: getattr(spec, name) for name in TOKENS if not (spec.one_stack and name.startswith("decoder"))}
    tree = {
        "model_type": MODEL_TYPE,
        "architectures": ["LadderModel"],
        "base_model_name_or_path": identity.checkpoint,
        "base_model_revision": identity.revision,
        "is_encoder_decoder": not spec.one_stack,
        "vocab_size": spec.vocab_size,
        **tokens,
        "ladder": design,
    }
    return json.dumps(tree, indent=2) + "\n"


def register() -> None:
    """Let `AutoConfig` know the type."""
    AutoConfig.register(MODEL_TYPE, LadderHubConfig, exist_ok=True)

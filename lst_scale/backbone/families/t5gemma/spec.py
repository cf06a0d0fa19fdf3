"""The numbers of a T5Gemma 2, under the boundary's names; imports no torch.

What is Gemma's own (soft caps, windows, kinds of layers, rotary frequencies) travels as one JSON text a stack, so that a model can be built
from a spec alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lst_scale.backbone.families.t5gemma.config import stacks_of
from lst_scale.backbone.spec import BackboneSpec

SETTINGS = (
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "hidden_activation",
    "layer_types",
    "max_position_embeddings",
    "query_pre_attn_scalar",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "sliding_window_pattern",
)


@dataclass(frozen=True, kw_only=True)
class T5GemmaSpec(BackboneSpec):
    """A T5Gemma 2. Both stacks are of one width."""

    large_states: ClassVar[bool] = True
    served: ClassVar[bool] = False

    num_kv_heads: int
    head_dim: int
    num_layers: int
    num_decoder_layers: int
    rms_norm_eps: float
    bos_token_id: int
    eoi_token_id: int  # after an image; its embedding is a weight of its own
    source_settings: str  # JSON
    target_settings: str

    @property
    def depth(self) -> int:
        return min(self.num_layers, self.num_decoder_layers)

    @property
    def cache_layers(self) -> int:
        return self.num_decoder_layers

    def with_depth(self, depth: int) -> T5GemmaSpec | None:
        """Blocks of both kinds take the same room: the first are one of each."""
        if self.num_layers != self.num_decoder_layers:
            return None
        source, target = _with_depth(self.source_settings, depth), _with_depth(self.target_settings, depth)
        return replace(self, num_layers=depth, num_decoder_layers=depth, source_settings=source, target_settings=target)

    @property
    def widths(self) -> Mapping[str, int]:
        return {}  # a side block takes whole heads, and widths that are rounded: any reduction factor fits

    def side_width(self, reduction_factor: int) -> int:
        return max(8, 8 * round(self.d_model / reduction_factor / 8))

    @property
    def divided(self) -> Mapping[str, int]:
        return {"heads": self.num_heads, "heads of keys and values": self.num_kv_heads, "feed-forward channels": self.d_ff}

    @property
    def architecture(self) -> Mapping[str, Any]:
        names = ("d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim", "num_layers", "num_decoder_layers", "vocab_size")
        return {name: getattr(self, name) for name in names}

    def setting(self, name: str, default: Any = None) -> Any:
        """Return what is said of one of the decoder's SETTINGS."""
        found = json.loads(self.target_settings).get(name)
        return default if found is None else found


def spec_from(config: Mapping[str, Any]) -> T5GemmaSpec:
    """Return the numbers of a config.json; what it may leave out has transformers' default.

    Raises:
        KeyError: one that must be there is missing.
    """
    source, target = stacks_of(config)
    eos, heads = config.get("eos_token_id", target.get("eos_token_id", 1)), target["num_attention_heads"]
    bos = config.get("bos_token_id", target.get("bos_token_id", 2))
    return T5GemmaSpec(
        model_type=config["model_type"],
        vocab_size=target["vocab_size"],
        d_model=target["hidden_size"],
        d_ff=target["intermediate_size"],
        num_heads=heads,
        num_kv_heads=target["num_key_value_heads"],
        head_dim=target["head_dim"],
        num_layers=source["num_hidden_layers"],
        num_decoder_layers=target["num_hidden_layers"],
        dropout_rate=float(config.get("dropout_rate", 0.0)),
        rms_norm_eps=target.get("rms_norm_eps", 1e-6),
        pad_token_id=config.get("pad_token_id", target.get("pad_token_id", 0)),
        eos_token_id=eos if isinstance(eos, int) else eos[0],
        bos_token_id=bos,
        decoder_start_token_id=bos,
        eoi_token_id=config["encoder"].get("eoi_token_index", 256_000),
        source_settings=_settings(source),
        target_settings=_settings(target),
    )


def _with_depth(settings: str, depth: int) -> str:
    found = json.loads(settings)
    kinds = found.get("layer_types")
    return settings if kinds is None else json.dumps(found | {"layer_types": [*dict.fromkeys(kinds), *kinds][:depth]}, sort_keys=True)


def _settings(stack: Mapping[str, Any]) -> str:
    return json.dumps({name: stack[name] for name in SETTINGS if stack.get(name) is not None}, sort_keys=True)

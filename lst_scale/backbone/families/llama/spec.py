"""The numbers of a decoder-only model, under the boundary's names; imports no torch.

What only some of the kin have (soft caps, multipliers, sliding windows, kinds of layers) travels as `settings`, one JSON text of the keys
in SETTINGS: a model can be built from a spec alone, and transformers may add keys to its configurations without changing a spec.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lst_scale.backbone.spec import BackboneSpec

SETTINGS = (
    "attention_bias",
    "attention_multiplier",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "eos_token_id",
    "final_logit_softcapping",
    "hidden_act",
    "hidden_activation",
    "layer_types",
    "logits_scaling",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "no_rope_layers",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "sliding_window_pattern",
    "tie_word_embeddings",
    "use_bidirectional_attention",
    "use_sliding_window",
)
CARVED = ("llama", "mistral", "gemma")  # whose blocks are a side block's, but for widths and for what a norm adds to its weight
# Why blocks of some can't be cut by rows and columns into equal parts: a part would compute something else.
_OVER_ALL_HEADS = "it norms queries and keys over all heads at once"
INDIVISIBLE = {
    "phi3": "qkv_proj and gate_up_proj are several matrices in one",
    "olmo2": _OVER_ALL_HEADS,
    "olmo3": _OVER_ALL_HEADS,
}


@dataclass(frozen=True, kw_only=True)
class LlamaSpec(BackboneSpec):
    """A decoder-only model."""

    one_stack: ClassVar[bool] = True
    large_states: ClassVar[bool] = True

    num_layers: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    settings: str  # JSON

    @property
    def depth(self) -> int:
        return self.num_layers

    @property
    def cache_layers(self) -> int:
        return self.num_layers

    def with_depth(self, depth: int) -> LlamaSpec | None:
        if self.setting("layer_types") or self.setting("no_rope_layers"):
            return None  # which layers are of which kind is not one number
        return replace(self, num_layers=depth)

    @property
    def widths(self) -> Mapping[str, int]:
        return {}  # a side block takes whole heads, and widths that are rounded: any reduction factor fits

    def side_width(self, reduction_factor: int) -> int:
        return max(8, 8 * round(self.d_model / reduction_factor / 8))

    @property
    def divided(self) -> Mapping[str, int]:
        return {"heads": self.num_heads, "heads of keys and values": self.num_kv_heads, "feed-forward channels": self.d_ff}

    @property
    def indivisible(self) -> str | None:
        return INDIVISIBLE.get(self.model_type)

    def narrow_heads(self, reduction_factor: int, heads: int) -> tuple[int, int]:
        """Return how many heads of queries, and of keys and values, a side block has in place of `heads`."""
        kv_heads = max(1, round(self.num_kv_heads / reduction_factor))
        return kv_heads * max(1, round(heads / reduction_factor / kv_heads)), kv_heads

    def why_not_carved(self, reduction_factor: int, heads: int) -> str | None:
        """Return why side blocks can't start with some of the backbone's own weights; None: they can."""
        if self.model_type not in CARVED or self.setting("attention_bias") or self.setting("mlp_bias"):
            return f"side blocks are not carved out of this {self.model_type}, whose blocks hold more than a side block has a place for"
        narrow, kv_heads = self.narrow_heads(reduction_factor, heads)
        if narrow // kv_heads > self.num_heads // self.num_kv_heads:
            return f"with reduction_factor {reduction_factor} side blocks have more heads for each head of keys than the backbone"
        return None

    @property
    def architecture(self) -> Mapping[str, Any]:
        names = ("d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim", "num_layers", "vocab_size")
        return {name: getattr(self, name) for name in names}

    def setting(self, name: str, default: Any = None) -> Any:
        """Return what config.json says of a setting that only some of the kin have."""
        found = json.loads(self.settings).get(name)
        return default if found is None else found


def spec_from(config: Mapping[str, Any]) -> LlamaSpec:
    """Return the numbers of a config.json; what it may leave out has transformers' default.

    Raises:
        KeyError: one that must be there is missing.
    """
    heads, eos = config["num_attention_heads"], config.get("eos_token_id")
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad, bos = config.get("pad_token_id"), config.get("bos_token_id")
    first_eos = first_eos if first_eos is not None else (pad if pad is not None else 0)
    return LlamaSpec(
        model_type=config["model_type"],
        vocab_size=config["vocab_size"],
        d_model=config["hidden_size"],
        d_ff=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        num_layers=config["num_hidden_layers"],
        dropout_rate=float(config.get("attention_dropout") or 0.0),
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        # A negative one (some Llamas have -1) is none.
        pad_token_id=pad if pad is not None and pad >= 0 else first_eos,
        eos_token_id=first_eos,
        decoder_start_token_id=bos if isinstance(bos, int) else first_eos,
        settings=json.dumps({name: config[name] for name in SETTINGS if config.get(name) is not None}, sort_keys=True),
    )

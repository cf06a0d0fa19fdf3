"""The numbers of a T5, under the field names of transformers' configuration; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lst_scale.backbone.spec import BackboneSpec


@dataclass(frozen=True, kw_only=True)
class T5Spec(BackboneSpec):
    """A T5 or mT5."""

    d_kv: int
    num_layers: int
    num_decoder_layers: int
    feed_forward_proj: str
    layer_norm_epsilon: float
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    scale_decoder_outputs: bool  # T5 v1.0 scales the head's input by d_model**-0.5; v1.1, Flan-T5 and mT5 do not

    @property
    def depth(self) -> int:
        return min(self.num_layers, self.num_decoder_layers)

    @property
    def cache_layers(self) -> int:
        return self.num_decoder_layers

    def with_depth(self, depth: int) -> T5Spec | None:
        return replace(self, num_layers=depth, num_decoder_layers=depth) if self.num_layers == self.num_decoder_layers else None

    @property
    def widths(self) -> Mapping[str, int]:
        return {"d_model": self.d_model, "d_ff": self.d_ff, "d_kv": self.d_kv}

    @property
    def architecture(self) -> Mapping[str, Any]:
        names = ("d_model", "d_ff", "d_kv", "num_heads", "num_layers", "num_decoder_layers", "feed_forward_proj", "scale_decoder_outputs")
        return {name: getattr(self, name) for name in names}

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated")


def spec_from(config: Mapping[str, Any]) -> T5Spec:
    """Return the numbers of a config.json; what it may leave out has transformers' default.

    Raises:
        KeyError: one that must be there is missing.
    """
    eos, start, pad = config.get("eos_token_id", 1), config.get("decoder_start_token_id"), config.get("pad_token_id", 0)
    return T5Spec(
        **{name: config[name] for name in ("model_type", "vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_layers")},
        num_decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
        feed_forward_proj=str(config.get("feed_forward_proj", "relu")),
        dropout_rate=float(config.get("dropout_rate", 0.1)),
        layer_norm_epsilon=config.get("layer_norm_epsilon", 1e-6),
        relative_attention_num_buckets=config.get("relative_attention_num_buckets", 32),
        relative_attention_max_distance=config.get("relative_attention_max_distance", 128),
        # transformers 5 forces tie_word_embeddings to True and keeps T5's scaling in a flag of its own; mT5 never scales.
        scale_decoder_outputs=bool(
            config.get("scale_decoder_outputs", config["model_type"] != "mt5" and config.get("tie_word_embeddings") is not False)
        ),
        pad_token_id=pad,
        eos_token_id=eos if isinstance(eos, int) else eos[0],
        decoder_start_token_id=start if start is not None else pad,
    )

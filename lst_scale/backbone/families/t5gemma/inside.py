"""Where methods that train inside a T5Gemma 2 put what they add."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2RMSNorm

from lst_scale.backbone.families.t5gemma.numbers import NO_SOURCE_ATTENTION
from lst_scale.errors import BackboneError


class T5GemmaInside:
    """Places for adapters, and peft's name of the task."""

    def adapter_sites(self, model: Any, *, after_source_attention: bool) -> Iterator[str]:
        """Attention to the source is part of the decoder's self-attention."""
        if after_source_attention:
            raise BackboneError(NO_SOURCE_ATTENTION)
        for path in ("encoder.text_model", "decoder"):
            for index in range(len(model.model.get_submodule(path).layers)):
                yield f"model.{path}.layers.{index}.self_attn.o_proj"
                yield f"model.{path}.layers.{index}.mlp.down_proj"

    def lengthen(self, model: Any, vocab_size: int, generator: torch.Generator) -> None:
        raise BackboneError("images stand beside a T5's text: choose a T5, or leave vision out")

    def positions_that_end(self, model: Any) -> Any:
        raise BackboneError("images stand beside a T5's text: choose a T5, or leave vision out")

    def is_norm(self, module: nn.Module) -> bool:
        return isinstance(module, T5Gemma2RMSNorm)

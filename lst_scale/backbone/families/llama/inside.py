"""Where methods that train inside a decoder-only model put what they add."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lst_scale.backbone.families.llama.numbers import NO_SOURCE_ATTENTION
from lst_scale.errors import BackboneError


class LlamaInside:
    """Places for adapters and biases, and peft's name of the task."""

    peft_task: ClassVar[str] = "CAUSAL_LM"

    def whole_logits(
        self, run: Callable[..., Any], source_BS: Tensor, source_mask_BS: Tensor, target_BT: Tensor, source: Any | None = None
    ) -> tuple[Tensor, Any]:
        """Source and target are one text; nothing is kept of the source, whose states a trained model changes."""
        ids = torch.cat([source_BS, target_BT], 1)
        mask = torch.cat([source_mask_BS, torch.ones_like(target_BT)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = run(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=target_BT.shape[1])
        return output.logits, None

    def adapter_sites(self, model: Any, *, after_source_attention: bool) -> Iterator[str]:
        if after_source_attention:
            raise BackboneError(NO_SOURCE_ATTENTION)
        for index in range(len(model.model.layers)):
            yield f"model.layers.{index}.self_attn.o_proj"
            yield f"model.layers.{index}.mlp.down_proj"

    def lengthen(self, model: Any, vocab_size: int, generator: torch.Generator) -> None:
        raise BackboneError("images stand beside an encoder's text: choose a T5, or leave vision out")

    def positions_that_end(self, model: Any) -> Any:
        raise BackboneError("images stand beside an encoder's text: choose a T5, or leave vision out")

    def is_norm(self, module: nn.Module) -> bool:
        return type(module).__name__.endswith("RMSNorm")

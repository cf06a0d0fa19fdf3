"""Where methods that train inside a decoder-only model put what they add."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lst_scale.backbone.cache_argument import cache_argument
from lst_scale.backbone.families.llama.model import continued
from lst_scale.backbone.families.llama.numbers import NO_SOURCE_ATTENTION
from lst_scale.errors import BackboneError


class LlamaInside:
    """Places for adapters and biases, and peft's name of the task."""

    peft_task: ClassVar[str] = "CAUSAL_LM"

    def whole_logits(
        self,
        run: Callable[..., Any],
        source_BS: Tensor,
        source_mask_BS: Tensor,
        target_BT: Tensor,
        source: DynamicCache | None = None,
        *,
        keep: bool = False,
    ) -> tuple[Tensor, DynamicCache | None]:
        """Source and target are one text, and what is kept are the source's keys and values.

        They are those of all blocks at full length: where a window is seen, the mask alone says so.
        """
        num_new = target_BT.shape[1]
        ids = torch.cat([source_BS, target_BT], 1) if source is None else target_BT
        mask = torch.cat([source_mask_BS, torch.ones_like(target_BT)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": num_new}
        if source is not None:
            return run(**inputs, use_cache=True, **cache_argument(continued(source, None))).logits, source
        if not keep:
            return run(**inputs, use_cache=False).logits, None
        cache = DynamicCache()
        logits_BTV: Tensor = run(**inputs, use_cache=True, **cache_argument(cache)).logits
        return logits_BTV, _without_last(cache, num_new)

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


def _without_last(cache: DynamicCache, count: int) -> DynamicCache:
    """Return a cache after its last `count` tokens were taken away."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :-count], layer.values[:, :, :-count]
    return cache

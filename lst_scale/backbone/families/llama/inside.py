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
        share: bool = False,
    ) -> tuple[Tensor, DynamicCache | None]:
        """Source and target are one text, and what is kept are the source's keys and values.

        They are those of all blocks at full length: where a window is seen, the mask alone says so.
        """
        num_new = target_BT.shape[1]
        past = 0 if source is not None or not share else _length_alike(source_BS, source_mask_BS)
        ids = torch.cat([source_BS[:, past:], target_BT], 1) if source is None else target_BT
        mask = torch.cat([source_mask_BS, torch.ones_like(target_BT)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": num_new}
        if source is not None:
            return run(**inputs, use_cache=True, **cache_argument(continued(source, None))).logits, source
        if not keep and not past:
            return run(**inputs, use_cache=False).logits, None
        cache = _beginning(run, source_BS, past) if past else DynamicCache()
        logits_BTV: Tensor = run(**inputs, use_cache=True, **cache_argument(cache)).logits
        return logits_BTV, _without_last(cache, num_new) if keep else None

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


def _length_alike(source_BS: Tensor, mask_BS: Tensor) -> int:
    """Return how many tokens all rows begin with, where that is half of what there is to run or more; else 0."""
    alike_S = ((source_BS == source_BS[:1]) & mask_BS.bool()).all(0)
    length = int(alike_S.cumprod(0).sum())
    return length if len(source_BS) > 1 and 2 * length >= source_BS.shape[1] else 0


def _beginning(run: Callable[..., Any], source_BS: Tensor, length: int) -> DynamicCache:
    """Return the keys and values of what all rows begin with, run as one row's."""
    cache, ids_1P = DynamicCache(), source_BS[:1, :length]
    positions_1P = torch.arange(length, device=ids_1P.device)[None]
    inputs = {"input_ids": ids_1P, "attention_mask": torch.ones_like(ids_1P), "position_ids": positions_1P, "logits_to_keep": 1}
    run(**inputs, use_cache=True, **cache_argument(cache))
    for layer in cache.layers:
        layer.keys, layer.values = (held.expand(len(source_BS), -1, -1, -1) for held in (layer.keys, layer.values))
    return cache


def _without_last(cache: DynamicCache, count: int) -> DynamicCache:
    """Return a cache after its last `count` tokens were taken away."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :-count], layer.values[:, :, :-count]
    return cache

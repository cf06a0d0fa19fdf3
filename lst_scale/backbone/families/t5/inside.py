"""Where methods that train inside T5 put what they add."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5LayerCrossAttention, T5LayerFF, T5LayerNorm, T5LayerSelfAttention

from lst_scale.backbone.families.t5.model import T5Model


class TableThatEnds:
    """Zeroes what the position table says of tokens from `end` on; a hook, so that it holds in a recomputed pass, too."""

    end: int | None = None

    def __call__(self, _table: nn.Module, _buckets: Any, bias_QKH: Tensor) -> Tensor:
        if self.end is None:
            return bias_QKH
        beside = bias_QKH.shape[0] - self.end
        return nn.functional.pad(bias_QKH[: self.end, : self.end], (0, 0, 0, beside, 0, beside))


class T5Inside:
    """Places for adapters and biases, and peft's name of the task."""

    def adapter_sites(self, model: Any, *, after_source_attention: bool) -> Iterator[str]:
        for path, module in model.named_modules():
            if isinstance(module, T5LayerSelfAttention):
                yield f"{path}.SelfAttention.o"
            elif isinstance(module, T5LayerCrossAttention) and after_source_attention:
                yield f"{path}.EncDecAttention.o"
            elif isinstance(module, T5LayerFF):
                yield f"{path}.DenseReluDense.wo"

    def lengthen(self, model: Any, vocab_size: int, generator: torch.Generator) -> None:
        table_VD, own_head = model.shared.weight, model.lm_head.weight is not model.shared.weight
        more = torch.randn(vocab_size - len(table_VD), table_VD.shape[1], generator=generator).to(table_VD)
        model.shared = nn.Embedding(vocab_size, table_VD.shape[1], _weight=torch.cat([table_VD.detach(), more]), _freeze=True)
        model.config.vocab_size = vocab_size
        T5Model().tie(model, own_head=own_head)

    def positions_that_end(self, model: Any) -> TableThatEnds:
        table = TableThatEnds()
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.register_forward_hook(table)
        return table

    def is_norm(self, module: nn.Module) -> bool:
        return isinstance(module, T5LayerNorm)

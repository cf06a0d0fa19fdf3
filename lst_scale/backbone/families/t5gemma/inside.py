"""Where methods that train inside a T5Gemma 2 put what they add."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2RMSNorm

from lst_scale.errors import BackboneError


class T5GemmaInside:
    """Places for adapters, and peft's name of the task."""

    peft_task: ClassVar[str] = "SEQ_2_SEQ_LM"

    def whole_logits(
        self, run: Callable[..., Any], source_BS: Tensor, source_mask_BS: Tensor, target_BT: Tensor, source: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        given = {"inputs_embeds" if source_BS.is_floating_point() else "input_ids": source_BS}
        if source is not None:
            given |= {"encoder_outputs": BaseModelOutput(last_hidden_state=source)}
        output = run(attention_mask=source_mask_BS, decoder_input_ids=target_BT, use_cache=False, **given)
        return output.logits, output.encoder_last_hidden_state

    def adapter_sites(self, model: Any, *, after_source_attention: bool) -> Iterator[str]:
        """Attention to the source is part of the decoder's self-attention."""
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

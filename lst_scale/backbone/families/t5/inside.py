"""Where methods that train inside T5 put what they add."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5LayerFF, T5LayerNorm, T5LayerSelfAttention


class T5Inside:
    """Places for adapters and biases, and peft's name of the task."""

    peft_task: ClassVar[str] = "SEQ_2_SEQ_LM"

    def whole_logits(
        self, run: Callable[..., Any], source_BS: Tensor, source_mask_BS: Tensor, target_BT: Tensor, source: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        encoded = {} if source is None else {"encoder_outputs": BaseModelOutput(last_hidden_state=source)}
        output = run(input_ids=source_BS, attention_mask=source_mask_BS, decoder_input_ids=target_BT, use_cache=False, **encoded)
        return output.logits, output.encoder_last_hidden_state

    def adapter_sites(self, model: Any) -> Iterator[str]:
        for path, module in model.named_modules():
            if isinstance(module, T5LayerSelfAttention):
                yield f"{path}.SelfAttention.o"
            elif isinstance(module, T5LayerFF):
                yield f"{path}.DenseReluDense.wo"

    def is_norm(self, module: nn.Module) -> bool:
        return isinstance(module, T5LayerNorm)

"""What families of two stacks have in common: a source is read as a whole, and the target begins with its start token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from lst_scale.backbone.families import NO_PROBE
from lst_scale.backbone.taps import BackboneSpec
from lst_scale.errors import BackboneError, LadderError
from lst_scale.inputs.keys import IGNORED

NO_TAIL = "design tail stands beside a decoder-only model: beside an encoder-decoder write design transformer"


class TwoStacks:
    """The parts of a `Family` that follow from that."""

    peft_task: ClassVar[str] = "SEQ_2_SEQ_LM"

    def target_inputs(self, spec: BackboneSpec, labels_BT: Tensor) -> Tensor:
        """The start token, then the labels but the last; ignored ones become padding."""
        shifted = torch.full_like(labels_BT, spec.decoder_start_token_id)
        shifted[:, 1:] = labels_BT[:, :-1]
        return shifted.masked_fill(shifted == IGNORED, spec.pad_token_id)

    def divide(self, spec: BackboneSpec, ids_BS: Tensor, mask_BS: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ids_BS, mask_BS, self.target_inputs(spec, labels_BT)

    def leave_alone(self, block: Any, channels: slice) -> None:
        raise BackboneError(NO_PROBE)

    def start_averaging(self, block: Any, channels: slice, to: slice, factors_Q: Tensor) -> None:
        raise BackboneError(NO_PROBE)

    def tail(self, spec: Any, first: int) -> Any:
        raise LadderError(NO_TAIL)

    def tail_name(self, name: str, first: int) -> str:
        raise LadderError(NO_TAIL)

    def run_tail(self, model: Any, hidden_BTD: Tensor, mask_BS: Tensor, cache: Any | None) -> Tensor:
        raise LadderError(NO_TAIL)

    def answers(self, generate: Callable[..., Tensor], ids_BS: Tensor, mask_BS: Tensor, **options: Any) -> Tensor:
        return generate(input_ids=ids_BS, attention_mask=mask_BS, **options)

    def context(self, model: Any, embedding_1CD: Tensor) -> None:
        raise BackboneError("an encoder reads each row as a whole: a context begins each row's source")

    def begun(self, context: None, num_rows: int) -> None:
        raise BackboneError("a decoder goes on from an encoder's states: give a source")

    def whole_logits(
        self,
        run: Callable[..., Any],
        source_BS: Tensor,
        source_mask_BS: Tensor,
        target_BT: Tensor,
        source: Tensor | None = None,
        *,
        keep: bool = False,
        share: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The source's final states are there in any case, and none of them is another row's, however alike both begin."""
        given = {"inputs_embeds" if source_BS.is_floating_point() else "input_ids": source_BS}
        if source is not None:
            given |= {"encoder_outputs": BaseModelOutput(last_hidden_state=source)}
        output = run(attention_mask=source_mask_BS, decoder_input_ids=target_BT, use_cache=False, **given)
        return output.logits, output.encoder_last_hidden_state

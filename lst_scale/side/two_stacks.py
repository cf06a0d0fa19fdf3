"""A ladder as a model beside an encoder-decoder: what its calls mean, by transformers' conventions for such models."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import Seq2SeqLMOutput

from lst_scale.backbone.cache_argument import CACHE, cache_argument
from lst_scale.backbone.taps import SourceState, StackTaps
from lst_scale.errors import LadderError
from lst_scale.inputs.images import Images
from lst_scale.side.cache import new_cache
from lst_scale.side.ladder import Call, Ladder, LadderEncoderOutput
from lst_scale.side.loss import shift_right
from lst_scale.side.network import SideEncoderState
from lst_scale.side.vision import beside_images


class TwoStacks:
    """`input_ids` are the source; `labels` and `decoder_input_ids` the target."""

    def forward(self, model: Ladder, call: Call) -> Seq2SeqLMOutput:
        target_BT = call.decoder_input_ids
        if target_BT is None:
            if call.labels is None:
                raise LadderError("a forward pass needs labels or decoder_input_ids")
            target_BT = shift_right(call.labels, model.spec)
        mask_BS = call.attention_mask
        if call.encoder_outputs is None:
            if call.input_ids is None:
                raise LadderError("a forward pass needs input_ids or encoder_outputs")
            mask_BS = self.mask_of(model, call.input_ids) if mask_BS is None else mask_BS
            state = model.encode(call.input_ids, mask_BS, images=call.images)
        else:
            if mask_BS is None:
                raise LadderError("encoder_outputs need the attention_mask of the tokens they were made from")
            state = _state_of(call.encoder_outputs, mask_BS)
        cache = new_cache() if call.use_cache and call.cache is None else call.cache
        logits_BTV, states = model.decoded(target_BT, state, cache, with_states=call.hidden)
        loss = None if call.labels is None else call.loss_of(logits_BTV, call.labels)
        taps = state[0].taps
        read = (taps.embedding, *taps.tensors) if call.hidden and call.encoder_outputs is None else None
        return Seq2SeqLMOutput(
            loss=loss, logits=logits_BTV, decoder_hidden_states=states, encoder_hidden_states=read, **cache_argument(cache)
        )

    def states(self, model: Ladder, input_ids_BS: Tensor, mask_BS: Tensor | None) -> tuple[Tensor, ...]:
        raise LadderError("an encoder-decoder has no last state without a target: train it in Seq2SeqTrainer, not in a trainer of TRL")

    def mask_of(self, model: Ladder, input_ids_BS: Tensor) -> Tensor:
        """Return the mask of rows that come without one: from the padding id, where transformers' T5 takes all ones."""
        return (input_ids_BS != model.spec.pad_token_id).long()

    def before_generation(
        self, model: Ladder, input_ids_BS: Tensor, mask_BS: Tensor, source: SourceState | None, images: Images | None, use_cache: bool
    ) -> dict[str, Any]:
        """Run both encoders, once; caches start empty and grow: one that transformers sized would know the backbone's layers only."""
        read, side = model.encode(input_ids_BS, mask_BS, source, images)
        output = LadderEncoderOutput(last_hidden_state=read.final, side_state=side.final_BSR)
        return {"encoder_outputs": output, **(cache_argument(new_cache()) if use_cache else {})}

    def next_inputs(self, input_ids: Tensor, use_cache: bool | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of generation's next forward pass."""
        cache = kwargs.get(CACHE)
        past = cache.get_seq_length() if cache is not None else 0
        return {
            # A rank that is done and waits for others has no new token: it repeats its last.
            "decoder_input_ids": input_ids[:, min(past, input_ids.shape[1] - 1) :],
            "use_cache": cache is not None and bool(use_cache),
            **cache_argument(cache),
            "attention_mask": kwargs["attention_mask"],
            "encoder_outputs": kwargs["encoder_outputs"],
        }


def _state_of(output: LadderEncoderOutput, attention_mask_BS: Tensor) -> tuple[SourceState, SideEncoderState]:
    assert output.last_hidden_state is not None and output.side_state is not None
    nothing = StackTaps(layers=(), embedding=output.last_hidden_state[:, :0], hidden=())  # the side encoder has read its taps
    source = SourceState(taps=nothing, final=output.last_hidden_state, source_mask_BS=attention_mask_BS)
    mask_BS = beside_images(attention_mask_BS, output.side_state.shape[1])
    return source, SideEncoderState(final_BSR=output.side_state, attention_mask_BS=mask_BS)

"""A ladder as a model beside a decoder-only model: what its calls mean, by transformers' conventions for such models.

A text that is not divided is all target, after a source without tokens: every position is predicted from those before it. Generation
goes on in the same way, token by token, with one cache for backbone and side network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from lst_scale.backbone.cache_argument import CACHE, cache_argument
from lst_scale.backbone.taps import SourceState, StackTaps
from lst_scale.errors import LadderError
from lst_scale.inputs.images import Images
from lst_scale.inputs.keys import IGNORED
from lst_scale.side.cache import cache_beside
from lst_scale.side.designs.one_stack import SidePrefix
from lst_scale.side.ladder import Call, Ladder


class OneStack:
    """`input_ids` are the whole text; `labels` the same ids, -100 where no loss is taken.

    Args:
        context_length: tokens that the backbone has read before every text; its keys and values are in a cache, too.
    """

    def __init__(self, context_length: int) -> None:
        self._context_length = context_length

    def _length_of(self, cache: Any | None) -> int:
        """Return how many tokens of the texts are in a cache."""
        return 0 if cache is None else max(0, int(cache.get_seq_length()) - self._context_length)

    def forward(self, model: Ladder, call: Call) -> CausalLMOutputWithPast:
        if call.input_ids is None:
            raise LadderError("a forward pass needs input_ids")
        if call.decoder_input_ids is not None or call.encoder_outputs is not None:
            raise LadderError("decoder_input_ids and encoder_outputs are an encoder-decoder's: give the whole text as input_ids")
        labels_BT, ids_BT = call.labels, call.input_ids
        if labels_BT is not None and labels_BT.shape != ids_BT.shape:
            raise LadderError(f"labels are {tuple(labels_BT.shape)}, but must be as long as input_ids, {tuple(ids_BT.shape)}")
        cache = cache_beside(model.spec, model.side.num_cache_layers) if call.use_cache and call.cache is None else call.cache
        mask_BS = torch.ones_like(ids_BT) if call.attention_mask is None else call.attention_mask
        if cache is not None and call.attention_mask is None:
            mask_BS = ids_BT.new_ones(len(ids_BT), self._length_of(cache) + ids_BT.shape[1])
        logits_BTV, states = model.decoded(ids_BT, _after_nothing(model, ids_BT, mask_BS), cache, with_states=call.hidden)
        loss = None if labels_BT is None else call.loss_of(logits_BTV, next_tokens(labels_BT))
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, hidden_states=states, **cache_argument(cache))

    def states(self, model: Ladder, input_ids_BS: Tensor, mask_BS: Tensor | None) -> tuple[Tensor, ...]:
        mask_BS = torch.ones_like(input_ids_BS) if mask_BS is None else mask_BS
        return model.states_of(input_ids_BS, _after_nothing(model, input_ids_BS, mask_BS))

    def mask_of(self, model: Ladder, input_ids_BS: Tensor) -> Tensor:
        """Return the mask of rows that come without one: many of these models have no padding id, so all ones."""
        return torch.ones_like(input_ids_BS)

    def before_generation(
        self, model: Ladder, input_ids_BS: Tensor, mask_BS: Tensor, source: SourceState | None, images: Images | None, use_cache: bool
    ) -> dict[str, Any]:
        """Nothing is run before: the prompt goes in as the first tokens. A cache has the backbone's layers, sliding ones among them."""
        return cache_argument(cache_beside(model.spec, model.side.num_cache_layers)) if use_cache else {}

    def next_inputs(self, input_ids: Tensor, use_cache: bool | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of generation's next forward pass."""
        cache = kwargs.get(CACHE)
        past = self._length_of(cache)
        mask = kwargs.get("attention_mask")
        return {
            "input_ids": input_ids[:, min(past, input_ids.shape[1] - 1) :],
            "use_cache": cache is not None and bool(use_cache),
            **cache_argument(cache),
            "attention_mask": mask,
        }


def _after_nothing(model: Ladder, ids_BT: Tensor, mask_BS: Tensor) -> tuple[SourceState, SidePrefix]:
    """Return the state that a source without tokens leaves; the mask is that of all tokens."""
    empty_BSD = torch.empty(len(ids_BT), 0, model.spec.d_model, device=ids_BT.device)
    layers = model.side.request.of_source.layers
    taps = StackTaps(layers=layers, embedding=empty_BSD, hidden=(empty_BSD,) * len(layers))
    return SourceState(taps=taps, final=model.backbone.begun(len(ids_BT)), source_mask_BS=mask_BS), SidePrefix(
        taps=taps, attention_mask_BS=mask_BS
    )


def next_tokens(labels_BT: Tensor) -> Tensor:
    """Return what each position is to predict: the label of the position after it, nothing at the last."""
    return torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)

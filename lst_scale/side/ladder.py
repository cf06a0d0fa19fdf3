"""What a `LadderModel` and a `LadderEnsemble` have in common: a frozen backbone and a side of it as one model of transformers.

What calls mean differs between kinds of model: a `Form` says so (`one_stack.py`, `two_stacks.py`). Generation is transformers' own (greedy,
beams, sampling); backbone and side blocks share one cache (`cache.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import ModelOutput

from lst_scale.backbone.families import family_of
from lst_scale.backbone.taps import (
    Backbone,
    Inputs,
    Replica,
    SourceState,
    Taps,
    TargetState,
    select,
    selected_stack,
)
from lst_scale.errors import LadderError
from lst_scale.inputs.images import Images
from lst_scale.side.cache import part_of, side_cache
from lst_scale.side.card import LIVE
from lst_scale.side.face import Face
from lst_scale.side.loss import cross_entropy, shift_right
from lst_scale.side.network import SideEncoderState
from lst_scale.side.vision import checked_images
from lst_scale.system.assets import resolve


@dataclass
class LadderEncoderOutput(ModelOutput):  # type: ignore[misc]
    """What generation carries from the encoders to the decoders, as plain tensors that beam search can repeat row by row."""

    last_hidden_state: Tensor | None = None  # the backbone's final state (B, S, D)
    side_state: Tensor | None = None  # the side encoder's (B, S, R)


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """The arguments of a forward pass, as they were given."""

    input_ids: Tensor | None
    attention_mask: Tensor | None
    labels: Tensor | None
    decoder_input_ids: Tensor | None
    encoder_outputs: LadderEncoderOutput | None
    cache: Any | None
    use_cache: bool | None
    images: Images | None
    scores: Tensor | None
    loss_form: str
    num_items: Tensor | int | None
    hidden: bool

    def loss_of(self, logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
        """Return the loss in nats that was asked for of logits and what they are to predict."""
        return cross_entropy(logits_BTV, labels_BT, self.loss_form, self.scores, self.num_items)


class Form(Protocol):
    """What calls of a ladder mean: transformers' conventions differ between kinds of model."""

    def forward(self, model: Ladder, call: Call) -> Any: ...
    def states(self, model: Ladder, input_ids_BS: Tensor, mask_BS: Tensor | None) -> tuple[Tensor, ...]: ...
    def mask_of(self, model: Ladder, input_ids_BS: Tensor) -> Tensor: ...
    def before_generation(
        self, model: Ladder, input_ids_BS: Tensor, mask_BS: Tensor, source: SourceState | None, images: Images | None, use_cache: bool
    ) -> dict[str, Any]: ...
    def next_inputs(self, input_ids: Tensor, use_cache: bool | None, kwargs: dict[str, Any]) -> dict[str, Any]: ...


class Ladder(Face, GenerationMixin):  # type: ignore[misc]
    """What trains or has trained, on a frozen backbone: all that a `LadderModel` and a `LadderEnsemble` have in common.

    Args:
        side: what makes logits of taps: one side network, or several that answer as one.
        form: what calls mean beside this kind of backbone.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    _supports_cache_class = True
    label_head = None
    input_modalities = ("text",)
    output_modalities = ("text",)
    side: Any

    def __init__(self, backbone: Backbone, side: Any, form: Form) -> None:
        super().__init__()
        self._frozen = (backbone,)  # no submodule, even if it is an nn.Module
        self.side = side
        side.beside(backbone)
        self.train(side.training)
        spec = backbone.spec
        self._form = form
        if not spec.one_stack:  # collators look for this name, and give a causal model what it can't take where they find it
            self.prepare_decoder_input_ids_from_labels = self._shifted
        # What GenerationMixin reads; the backbone's layers come first in a cache, the side network's after them.
        self.config = family_of(spec.model_type, "this backbone").generation_config(spec, side_layers=side.num_cache_layers)
        self.config._name_or_path = _where_its_tokenizer_is(backbone)
        self.generation_config = GenerationConfig(
            pad_token_id=spec.pad_token_id, eos_token_id=self.config.eos_token_id, decoder_start_token_id=spec.decoder_start_token_id
        )

    @property
    def replica(self) -> Replica:
        return self.backbone.replica

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def _apply(self, fn: Any, recurse: bool = True) -> Ladder:
        """Stand behind `.to()`, `.cuda()`, `.half()` and their kin: the backbone comes along, and the side network stays float32."""
        probe = fn(torch.empty(1, dtype=torch.float32, device=self.backbone.device))
        if probe.dtype != torch.float32:
            raise LadderError(f"side weights are float32, not {probe.dtype}: write LadderConfig(precision='bf16') for bf16 computation")
        if probe.device != self.backbone.device:
            self.backbone.move(probe.device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _replicate_for_data_parallel(self) -> Ladder:
        """Stand in for what `torch.nn.DataParallel` calls, which transformers' Trainer takes where it sees several GPUs and no launcher.

        Raises:
            LadderError: always; a copy would read the taps of the first GPU's backbone.
        """
        raise LadderError(
            "DataParallel copies a side network to every GPU and not the backbone: start one process a GPU "
            "(torchrun --nproc-per-node 2 train.py), or show one alone (CUDA_VISIBLE_DEVICES=0)"
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: LadderEncoderOutput | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Any | None = None,
        image_features: Tensor | None = None,
        boxes: Tensor | None = None,
        scores: Tensor | None = None,
        loss_form: str = "token_mean",
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return `.logits` (B, T, V) and, with labels, `.loss`: mean cross-entropy in nats over the labels that are not -100.

        Args:
            input_ids: (B, S) token ids; the mask is taken from the padding id when none is given (transformers' T5 takes all ones).
            attention_mask: (B, S), 1 = token, 0 = padding.
            labels: (B, T); decoder inputs are the labels shifted right unless `decoder_input_ids` are given.
            encoder_outputs: of both encoders, in place of `input_ids`; needs its `attention_mask`.
            past_key_values: one cache for backbone and side network, read and filled; with `use_cache` one is made when none is given.
            cache: the same under transformers' new name.
            return_dict: always True; generation passes it.
            output_hidden_states: also return states, each (B, T, D): the embeddings, the output of every backbone block that the ladder
                reads, without gradient, and last what the head makes logits of. As `.hidden_states`, or beside an encoder-decoder as
                `.encoder_hidden_states` (whose last is a block's) and `.decoder_hidden_states`.
            output_attentions: never True; transformers' tools pass it.
            image_features: (B, I, G, F) of a frozen image encoder, for a side network with `vision`: I images a row, G positions of a
                square grid; boxes: (B, I, G, 4), x1, x2, y1, y2 of each token, zeros when left out. Neither goes with `encoder_outputs`.
            loss_form: "token_mean", "example_mean" (the mean over a row's tokens, then over rows) or "scored_example_mean" (each
                row's mean times its score, then over rows): the release's losses for captions, GQA and NLVR2, and VQA.
            scores: (B,), for "scored_example_mean".
            num_items_in_batch: labels that predict in all micro batches of a step, by which transformers' Trainer has the sum divided.
        """
        if not return_dict:
            raise LadderError("a forward pass returns an object with .loss and .logits: leave return_dict out, or write True")
        if output_attentions:
            raise LadderError("a ladder returns no attentions: leave output_attentions out")
        images = None
        if encoder_outputs is None and input_ids is not None:
            images = checked_images(self.side.vision, len(input_ids), image_features, boxes)
        call = Call(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            decoder_input_ids=decoder_input_ids,
            encoder_outputs=encoder_outputs,
            cache=past_key_values if cache is None else cache,
            use_cache=use_cache,
            images=images,
            scores=scores,
            loss_form=loss_form,
            num_items=num_items_in_batch,
            hidden=bool(output_hidden_states),
        )
        return self._form.forward(self, call)

    def encode(
        self, input_ids_BS: Tensor, attention_mask_BS: Tensor, source: SourceState | None = None, images: Images | None = None
    ) -> tuple[SourceState, SideEncoderState]:
        """Run both encoders; `source` is what `read` made of the batch, perhaps for several side networks."""
        read = source or self.read(input_ids_BS, attention_mask_BS)
        return read, self.side.encode(selected_stack(read.taps, self.side.request.of_source), attention_mask_BS, images)

    def read(self, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> SourceState:
        """Return what the frozen backbone makes of a batch's source."""
        return self.backbone.read(input_ids_BS, attention_mask_BS, self.side.request)

    def last_hidden_state(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the state (B, T, D) that a decoder-only backbone's head makes the logits of a text of."""
        return self._form.states(self, input_ids, attention_mask)[-1]

    def decode(self, decoder_input_ids_BT: Tensor, state: tuple[SourceState, Any], cache: Any | None = None) -> Tensor:
        """Return logits (B, T, V); with a cache, of the new positions."""
        return self._logits(self.backbone.extend(decoder_input_ids_BT, state[0], self.side.request, cache), state[1], cache)

    def decoded(
        self, decoder_input_ids_BT: Tensor, state: tuple[SourceState, Any], cache: Any | None, *, with_states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Return what `decode` does and, if so asked, all states on the way to it."""
        if not with_states:
            return self.decode(decoder_input_ids_BT, state, cache), None
        states = self.states_of(decoder_input_ids_BT, state, cache)
        return self.backbone.head(states[-1]), states

    def states_of(self, decoder_input_ids_BT: Tensor, state: tuple[SourceState, Any], cache: Any | None = None) -> tuple[Tensor, ...]:
        """Return all states (B, T, D) on the way to the logits that `decode` returns: the last one is what the head is given."""
        target = self.backbone.extend(decoder_input_ids_BT, state[0], self.side.request, cache)
        own = part_of(cache, self.spec.cache_layers, self.side.num_cache_layers)
        return target.taps.embedding, *target.taps.tensors, self.side.decode(target, state[1], own)

    def _logits(self, decoder: TargetState, side: SideEncoderState, cache: Any | None = None) -> Tensor:
        own = part_of(cache, self.spec.cache_layers, self.side.num_cache_layers)
        logits_BTV: Tensor = self.side.logits(self.backbone.head, decoder, side, own)
        return logits_BTV

    def scoring(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, images: Images | None = None) -> LadderScoring:
        """Return what gives the logits of several targets of these rows."""
        return LadderScoring(self, images)

    @torch.no_grad()
    def text_logits(self, input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Return logits (B, T, V) of whole texts, beside a model that goes on with a text."""
        logits_BTV: Tensor = self(input_ids=input_ids_BT, attention_mask=attention_mask_BT).logits
        return logits_BTV

    def logits_for_targets(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, targets: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield logits (B, T, V) for each of several decoder inputs (B, T) of one source, whose encoders run once."""
        scoring = self.scoring(input_ids_BS, attention_mask_BS)
        several = [Inputs(source_BS=input_ids_BS, source_mask_BS=attention_mask_BS, target_BT=target_BT) for target_BT in targets]
        each = self.backbone.each_target(several, self.side.request)
        return (scoring.logits(target_BT, taps) for target_BT, taps in zip(targets, each, strict=True))

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs: Tensor | None = None,
        synced_gpus: bool | None = None,
        use_cache: bool = True,
        source: SourceState | None = None,
        image_features: Tensor | None = None,
        boxes: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Return generated ids (B, T), start token first; `source` is what `read` made of the batch, `options` are transformers'.

        `inputs` is transformers' other name of `input_ids`.
        Encoders run once here, and the caches start empty and grow: one that transformers sized would know the backbone's layers only.
        """
        input_ids = _one_of(input_ids, inputs)
        if attention_mask is None:
            attention_mask = self._form.mask_of(self, input_ids)
        images = checked_images(self.side.vision, len(input_ids), image_features, boxes)
        return super().generate(
            input_ids,
            attention_mask=attention_mask,
            use_cache=use_cache,
            # Where blocks are gathered from all ranks, one that is done goes on until all are.
            synced_gpus=bool(synced_gpus) or (self.backbone.replica.in_step and self.backbone.replica.count > 1),
            **self._form.before_generation(self, input_ids, attention_mask, source, images, use_cache),
            **options,
        )

    def _shifted(self, labels: Tensor) -> Tensor:
        """Return the target ids that predict these labels (transformers' collators name the argument)."""
        return shift_right(labels, self.spec)

    # What GenerationMixin asks for.

    def can_generate(self) -> bool:
        return True

    def get_experts_implementation(self) -> dict[str, str]:
        return {}  # no mixture of experts to choose a kernel for

    def prepare_inputs_for_generation(self, input_ids: Tensor, use_cache: bool | None = None, **kwargs: Any) -> dict[str, Any]:
        return self._form.next_inputs(input_ids, use_cache, kwargs)


class LadderScoring:
    """Several targets of the rows of one batch. What depends on their source alone is made for the first.

    That is the side encoder's state or, beside a decoder-only model, the keys and values of the source's tokens.
    """

    def __init__(self, model: Ladder, images: Images | None = None) -> None:
        self._model, self._images = model, images
        self._source: SideEncoderState | None = None
        self._begun: DynamicCache | None = None

    @torch.no_grad()
    def logits(self, decoder_input_ids_BT: Tensor, taps: Taps, *, last: bool = False) -> Tensor:
        """Return logits (B, T, V); `taps`: what the backbone makes of these decoder inputs and the rows' source."""
        side = self._model.side
        own = select(taps, side.request)
        self._source = self._source or side.encode(own.source, own.source_mask_BS, self._images)
        if self._begun is None and self._model.spec.one_stack and not last:
            self._begun = side_cache(side.num_cache_layers)
        target = TargetState(taps=own.target, final_BTD=own.final_BTD)
        logits_BTV: Tensor = side.logits(self._model.backbone.head, target, self._source, self._begun)
        if self._begun is not None:
            self._begun.crop(-decoder_input_ids_BT.shape[1])  # the next target's tokens come after the source, too
        return logits_BTV


def _where_its_tokenizer_is(backbone: Backbone) -> str:
    """Return the backbone's name as transformers' tools read it, which load a tokenizer by it; none of a live model without one."""
    name = backbone.identity.checkpoint
    return "" if name == LIVE else resolve(name)


def _one_of(input_ids: Tensor | None, inputs: Tensor | None) -> Tensor:
    if input_ids is not None and inputs is not None:
        raise LadderError("generate takes input_ids or inputs, which are two names of one thing: write one of them")
    found = inputs if input_ids is None else input_ids
    if found is None:
        raise LadderError("generate needs input_ids (B, S)")
    return found

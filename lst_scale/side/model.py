"""LadderModel: a frozen backbone and a side network as one model that trains, generates, saves and loads.

The backbone is no submodule: `parameters()`, `state_dict()`, `train()` and an optimizer see the side network alone.
Generation is transformers' own (greedy, beams, sampling); backbone and side blocks share one cache (`cache.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from lst_scale.backbone import as_backbone
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
from lst_scale.side import files, hub_config, release
from lst_scale.side.cache import part_of
from lst_scale.side.card import LIVE
from lst_scale.side.config import LadderConfig
from lst_scale.side.face import Face
from lst_scale.side.initialize import initialize_random
from lst_scale.side.loss import cross_entropy, shift_right
from lst_scale.side.network import SideEncoderState, SideNetwork
from lst_scale.side.one_stack import OneStack
from lst_scale.side.saved import join
from lst_scale.side.two_stacks import LadderEncoderOutput, TwoStacks
from lst_scale.side.vision import checked_images
from lst_scale.system import hub
from lst_scale.system.assets import resolve


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
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    _supports_cache_class = True
    label_head = None
    input_modalities = ("text",)
    output_modalities = ("text",)
    side: Any

    def __init__(self, backbone: Backbone, side: Any) -> None:
        super().__init__()
        self._frozen = (backbone,)  # no submodule, even if it is an nn.Module
        self.side = side
        self.train(side.training)
        spec = backbone.spec
        self._form: Form = OneStack(len(backbone.identity.context)) if spec.one_stack else TwoStacks()
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
            past_key_values, cache: one cache for backbone and side network, read and filled, under transformers' old or new name; with
                `use_cache` one is made when none is given.
            return_dict: always True; generation passes it.
            output_hidden_states: also return states, each (B, T, D): the embeddings, the output of every backbone block that the ladder
                reads, without gradient, and last what the head makes logits of. As `.hidden_states`, or beside an encoder-decoder as
                `.encoder_hidden_states` (whose last is a block's) and `.decoder_hidden_states`.
            output_attentions: never True; transformers' tools pass it.
            image_features: (B, I, G, F) of a frozen image encoder, for a side network with `vision`: I images a row, G positions of a
                square grid; boxes: (B, I, G, 4), x1, x2, y1, y2 of each token, zeros when left out. Neither goes with `encoder_outputs`.
            loss_form, scores: "token_mean", "example_mean" (the mean over a row's tokens, then over rows) or "scored_example_mean" (each
                row's mean times its score (B,), then over rows): the release's losses for captions, GQA and NLVR2, and VQA.
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
    """Several targets of the rows of one batch; the side encoder runs for the first."""

    def __init__(self, model: Ladder, images: Images | None = None) -> None:
        self._model, self._images = model, images
        self._source: SideEncoderState | None = None

    @torch.no_grad()
    def logits(self, decoder_input_ids_BT: Tensor, taps: Taps) -> Tensor:
        """Return logits (B, T, V); `taps`: what the backbone makes of these decoder inputs and the rows' source."""
        side = self._model.side
        own = select(taps, side.request)
        self._source = self._source or side.encode(own.source, own.source_mask_BS, self._images)
        return self._model._logits(TargetState(taps=own.target, final_BTD=own.final_BTD), self._source)


class LadderModel(Ladder):
    """A side network on a frozen backbone.

    Args:
        backbone: a live T5 or mT5 of transformers, the name or folder of one (loaded in float32), or
            anything behind `backbone.taps.Backbone`.
        side: the design of a fresh side network, whose weights start at random (seed 0), its position tables as the backbone's (see
            `lst_scale.side.initialize` for pruning); or a side network that has its weights.
    """

    side: SideNetwork

    def __init__(self, backbone: Any, side: LadderConfig | SideNetwork) -> None:
        frozen = as_backbone(backbone)
        super().__init__(frozen, _fresh(frozen, side) if isinstance(side, LadderConfig) else side)
        self.register_state_dict_post_hook(_add_record)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_take_record)  # type: ignore[no-untyped-call]

    # Weights under the release's names, and files.

    def load_release_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Load side weights under the original release's names.

        Raises:
            LadderError: a weight is missing, unknown or of another shape; nothing is loaded then.
        """
        found = release.from_release(weights, self._trained(), self.side.spec)
        self.side.load_state_dict(self.side.state_dict() | found)

    def release_state_dict(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """Return the side weights under the original release's names; with `keep_vars` the live parameters."""
        return {release.release_name(name): tensor for name, tensor in self._trained(keep_vars=keep_vars).items()}

    def _trained(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """Return the side weights without what is frozen among them: the release has the object order in its word table."""
        frozen = {name for name, _ in self.side.named_buffers()}
        return {name: tensor for name, tensor in self.side.state_dict(keep_vars=keep_vars).items() if name not in frozen}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the side network alone: weights (safetensors), configuration with the backbone's identity, model card."""
        save_side_network(Path(folder), self.side.state_dict(), self.side.config, self.backbone)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload side network",
        create_pr: bool = False,
    ) -> str:
        """Put what `save_pretrained` writes under owner/name on the hub, and return the commit's address.

        Args:
            private: whether a new name is seen by its owner alone; None: as the owner has set.
            revision: a branch, made where it isn't there.

        Raises:
            ArgumentError: the hub refuses, or can't be reached.
        """

        def fill(folder: Path) -> None:
            files.write(folder, self.side.state_dict(), self.side.config, self.backbone.identity, self.backbone.spec, called=name)

        options: dict[str, Any] = {"private": private, "revision": revision, "token": token, "create_pr": create_pr}
        return hub.push(fill, name, message=commit_message, **options)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        backbone: Any = None,
        *,
        allow_other_backbone: bool = False,
        subfolder: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> LadderModel:
        """Read a saved side network and join it with its backbone, loaded by its recorded name unless given.

        Args:
            folder: one of this machine, or a name of the hub, owner/name.
            subfolder: below it; "side_network" of a run.
            revision, token: of the hub's.

        Raises:
            LadderError: the folder is not whole, or the backbone is not the one that the side network was trained on.
        """
        found = hub.folder_of(folder, files.wanted(subfolder), revision=revision, token=token, error=LadderError)
        saved = files.read(found / subfolder)
        frozen, side = join(saved, backbone, allow_other_backbone=allow_other_backbone)
        return cls(frozen, side.to(frozen.device).eval())


def _where_its_tokenizer_is(backbone: Backbone) -> str:
    """Return the backbone's name as transformers' tools read it, which load a tokenizer by it; none of a live model without one."""
    name = backbone.identity.checkpoint
    return "" if name == LIVE else resolve(name)


def _fresh(backbone: Backbone, config: LadderConfig) -> SideNetwork:
    side = SideNetwork(backbone.spec, config)
    initialize_random(side, seed=0, weights=backbone.weight_source)
    return side.to(backbone.device)


def _one_of(input_ids: Tensor | None, inputs: Tensor | None) -> Tensor:
    if input_ids is not None and inputs is not None:
        raise LadderError("generate takes input_ids or inputs, which are two names of one thing: write one of them")
    found = inputs if input_ids is None else input_ids
    if found is None:
        raise LadderError("generate needs input_ids (B, S)")
    return found


def _add_record(model: LadderModel, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Let a state dict say what its weights are, since transformers' Trainer saves nothing else."""
    state[prefix + files.RECORD] = files.as_bytes(files.record_of(model.side.config, model.backbone.identity, model.backbone.spec))


def _take_record(model: LadderModel, state: dict[str, Any], prefix: str, *_others: Any) -> None:
    found = state.pop(prefix + files.RECORD, None)
    if found is not None:
        files.refuse_another_design(
            files.from_bytes(found), files.record_of(model.side.config, model.backbone.identity, model.backbone.spec)
        )


def save_side_network(folder: Path, weights: Mapping[str, Tensor], config: LadderConfig, backbone: Backbone) -> None:
    """Write side weights by our names with all that `LadderModel.from_pretrained` needs."""
    files.write(folder, weights, config, backbone.identity, backbone.spec)


hub_config.register()

__all__ = ["Ladder", "LadderModel", "save_side_network"]

"""The backbone in one process: Hugging Face's own T5 stacks, run forward with hooks on the blocks that a ladder reads.

Hooks and not `output_hidden_states`: that keeps every block's output alive, and its last entry is post-norm, wrong for the last block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone import assemble
from lst_scale.backbone import precision as precisions
from lst_scale.backbone.checkpoint import fingerprint_of, open_checkpoint, spec_of
from lst_scale.backbone.conveyor import Conveyor
from lst_scale.backbone.taps import (
    BackboneIdentity,
    BackboneSpec,
    DecoderState,
    EncoderState,
    FrozenHead,
    Replica,
    StackTaps,
    Tap,
    TapRequest,
    Taps,
    stored,
)
from lst_scale.errors import BackboneError


class LocalBackbone:
    """A T5-family encoder-decoder, frozen, whole in this process. No nn.Module on purpose: nothing can train or save it by accident."""

    def __init__(
        self,
        model: Any,
        spec: BackboneSpec,
        identity: BackboneIdentity,
        weight_source: Callable[[str], Tensor],
        num_parameters: int,
        *,
        replica: Replica | None = None,
        conveyor: Conveyor | None = None,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self.spec, self.identity, self.weight_source = spec, identity, weight_source
        self.replica, self.conveyor = replica or Replica(), conveyor
        self.num_parameters = num_parameters  # as published, whatever they are held in; a tied head counts once
        self.head = head_of(model, spec)

    @classmethod
    def load(cls, name: str, *, precision: str, device: torch.device | str = "cpu", revision: str | None = None) -> LocalBackbone:
        """Read a checkpoint into place, tensor by tensor: beside the model itself only one stored tensor is ever in memory.

        Raises:
            BackboneError: the checkpoint or the precision can't be used.
        """
        precisions.check(precision)
        checkpoint = open_checkpoint(name, revision)
        model = assemble.empty_model(checkpoint)
        num_parameters = assemble.count_parameters(model, checkpoint)
        assemble.check_shapes(model, checkpoint)
        assemble.fill_ends(model, checkpoint, precision, torch.device(device))
        for place in assemble.places(model):
            assemble.fill_block(place.get(model), place.path, checkpoint, precision, torch.device(device))
        identity = BackboneIdentity(checkpoint=name, revision=revision, precision=precision, fingerprint=checkpoint.fingerprint())
        return cls(model, checkpoint.spec, identity, checkpoint.tensor, num_parameters)

    @classmethod
    def wrap(cls, model: Any) -> LocalBackbone:
        """Freeze a live `T5ForConditionalGeneration` or `MT5ForConditionalGeneration`; it stays the caller's object.

        Raises:
            BackboneError: it is another kind of model, or in fp16.
        """
        if getattr(getattr(model, "config", None), "model_type", None) not in ("t5", "mt5") or not hasattr(model, "lm_head"):
            raise BackboneError(
                f"{type(model).__name__} can't be a backbone: pass a T5ForConditionalGeneration or a MT5ForConditionalGeneration"
            )
        dtype = model.get_input_embeddings().weight.dtype
        if dtype == torch.float16:
            raise BackboneError(precisions.FP16_REASON)
        name = str(getattr(model.config, "_name_or_path", "") or "live model")
        precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        identity = BackboneIdentity(checkpoint=name, revision=None, precision=precision, fingerprint=_live_fingerprint(model))
        return cls(model, spec_of(model.config), identity, _live_weight_source(model), sum(p.numel() for p in model.parameters()))

    def take_model(self) -> Any:
        """Return the T5 itself, for methods that train inside it."""
        return self._model

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.shared.weight.device
        return device

    @property
    def blocks(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        """The blocks of encoder and decoder."""
        return self._model.encoder.block, self._model.decoder.block

    def stack_config(self, prefix: str) -> Any:
        """Return the transformers configuration of "encoder" or "decoder"."""
        return getattr(self._model, prefix).config

    def weight_bytes(self) -> int:
        """Bytes on this rank's device that hold weights, shared ones once; blocks that come and go count as their slots."""
        tensors = {t.data_ptr(): t.numel() * t.element_size() for t in precisions.held_tensors(self._model)}
        return sum(tensors.values()) + (self.conveyor.resident_bytes if self.conveyor is not None else 0)

    @torch.no_grad()
    def encode(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, request: TapRequest) -> EncoderState:
        """Run the encoder on token ids (B, S); mask 1 = token, 0 = padding."""
        stack = self._model.encoder
        embedding_BSD = self._model.shared(input_ids_BS)
        with _capture(stack.block, request) as hidden:
            final_BSD = stack(inputs_embeds=embedding_BSD, attention_mask=attention_mask_BS).last_hidden_state
        taps = StackTaps(layers=request.layers, embedding=embedding_BSD, hidden=tuple(hidden))
        return EncoderState(taps=taps, final_BSD=final_BSD, attention_mask_BS=attention_mask_BS)

    @torch.no_grad()
    def decode(self, decoder_input_ids_BT: Tensor, encoder: EncoderState, request: TapRequest, cache: Any | None = None) -> DecoderState:
        """Run the decoder on token ids (B, T); with a cache, on the new positions only. Blocks that nobody reads are not run."""
        stack = self._model.decoder
        embedding_BTD = self._model.shared(decoder_input_ids_BT)
        needed = len(stack.block) if request.decoder_final else request.layers[-1] + 1
        with _shortened(stack, needed), _capture(stack.block, request) as hidden:
            final_BTD = stack(
                inputs_embeds=embedding_BTD,
                encoder_hidden_states=encoder.final_BSD,
                encoder_attention_mask=encoder.attention_mask_BS,
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        taps = StackTaps(layers=request.layers, embedding=embedding_BTD, hidden=tuple(hidden))
        return DecoderState(taps=taps, final_BTD=final_BTD if request.decoder_final else None)

    def __call__(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, decoder_input_ids_BT: Tensor, request: TapRequest) -> Taps:
        """Return all that a side network reads of one batch."""
        encoder = self.encode(input_ids_BS, attention_mask_BS, request)
        decoder = self.decode(decoder_input_ids_BT, encoder, request)
        return Taps(encoder=encoder.taps, decoder=decoder.taps, attention_mask_BS=attention_mask_BS, decoder_final_BTD=decoder.final_BTD)


def head_of(model: Any, spec: BackboneSpec) -> FrozenHead:
    """Return a T5's output head, scaled where this T5 scales."""
    return FrozenHead(weight_VD=model.lm_head.weight, scale=spec.d_model**-0.5 if spec.scale_decoder_outputs else 1.0)


@contextlib.contextmanager
def _capture(blocks: nn.ModuleList, request: TapRequest) -> Iterator[list[Tap]]:
    """Collect the outputs that are asked for, in order, while the body runs one forward pass."""
    hidden: list[Tap] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden.append(stored(output[0], request.storage))  # at once: the block's own output lives only until the next has read it

    handles = [blocks[layer].register_forward_hook(keep) for layer in request.layers]
    try:
        yield hidden
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _shortened(stack: Any, count: int) -> Iterator[None]:
    """Let the stack end after its first `count` blocks while the body runs."""
    whole = stack.block
    stack.block = whole[:count] if count < len(whole) else whole
    try:
        yield
    finally:
        stack.block = whole


def _live_weight_source(model: Any) -> Callable[[str], Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def read(name: str) -> Tensor:
        parameter = parameters[name]
        if not parameter.is_floating_point():
            raise BackboneError(
                f"{name} of this live model is quantized: load the backbone by name for full-precision weights, or initialize at random"
            )
        tensor: Tensor = parameter.detach()
        return tensor

    return read


def _live_fingerprint(model: Any) -> str:
    parameters = dict(model.named_parameters())
    return fingerprint_of(spec_of(model.config), parameters, parameters.__getitem__)

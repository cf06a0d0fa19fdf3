"""The backbone in one process: Hugging Face's own T5 stacks, run forward with hooks on the blocks that a ladder reads.

Hooks and not `output_hidden_states`: that keeps every block's output alive, and its last entry is post-norm, wrong for the last block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone import precision as precisions
from lst_scale.backbone.checkpoint import HEAD, SHARED, Checkpoint, fingerprint_of, open_checkpoint, read_to, spec_of
from lst_scale.backbone.taps import (
    BackboneIdentity,
    BackboneSpec,
    DecoderState,
    EncoderState,
    FrozenHead,
    StackTaps,
    TapRequest,
    Taps,
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
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self.spec, self.identity, self.weight_source = spec, identity, weight_source
        self.num_parameters = num_parameters  # as published, whatever they are held in; a tied head counts once
        self.head = FrozenHead(weight_VD=model.lm_head.weight, scale=spec.d_model**-0.5 if spec.scale_decoder_outputs else 1.0)

    @classmethod
    def load(cls, name: str, *, precision: str, device: torch.device | str = "cpu", revision: str | None = None) -> LocalBackbone:
        """Read a checkpoint into place, tensor by tensor: beside the model itself only one stored tensor is ever in memory.

        Raises:
            BackboneError: the checkpoint or the precision can't be used.
        """
        precisions.check(precision)
        checkpoint = open_checkpoint(name, revision)
        model = _empty_model(checkpoint)
        num_parameters = _count(model) + (model.lm_head.weight.numel() if checkpoint.has_own_head else 0)
        _fill(model, checkpoint, precision, torch.device(device))
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
        """Bytes of all weights as they are held, shared ones once."""
        tensors = {t.data_ptr(): t.numel() * t.element_size() for t in precisions.held_tensors(self._model)}
        return sum(tensors.values())

    @torch.no_grad()
    def encode(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, request: TapRequest) -> EncoderState:
        """Run the encoder on token ids (B, S); mask 1 = token, 0 = padding."""
        stack = self._model.encoder
        embedding_BSD = self._model.shared(input_ids_BS)
        with _capture(stack.block, request.layers) as hidden:
            final_BSD = stack(inputs_embeds=embedding_BSD, attention_mask=attention_mask_BS).last_hidden_state
        taps = StackTaps(layers=request.layers, embedding=embedding_BSD, hidden=tuple(hidden))
        return EncoderState(taps=taps, final_BSD=final_BSD, attention_mask_BS=attention_mask_BS)

    @torch.no_grad()
    def decode(self, decoder_input_ids_BT: Tensor, encoder: EncoderState, request: TapRequest, cache: Any | None = None) -> DecoderState:
        """Run the decoder on token ids (B, T); with a cache, on the new positions only. Blocks that nobody reads are not run."""
        stack = self._model.decoder
        embedding_BTD = self._model.shared(decoder_input_ids_BT)
        needed = len(stack.block) if request.decoder_final else request.layers[-1] + 1
        with _shortened(stack, needed), _capture(stack.block, request.layers) as hidden:
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


@contextlib.contextmanager
def _capture(blocks: nn.ModuleList, layers: tuple[int, ...]) -> Iterator[list[Tensor]]:
    """Collect the outputs of `layers` in order while the body runs one forward pass."""
    hidden: list[Tensor] = []
    handles = [blocks[layer].register_forward_hook(lambda _module, _inputs, output: hidden.append(output[0])) for layer in layers]
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


def _empty_model(checkpoint: Checkpoint) -> Any:
    """Return the model on the meta device, its head untied where the checkpoint has one of its own."""
    from transformers import AutoModelForSeq2SeqLM

    config = checkpoint.config
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    return model


def _count(model: Any) -> int:
    """Count the weights of both stacks and the one embedding."""
    stacks = {name: p for name, p in model.named_parameters() if ".block." in name or "final_layer_norm" in name}
    return int(sum(p.numel() for p in stacks.values()) + model.shared.weight.numel())


def _fill(model: Any, checkpoint: Checkpoint, precision: str, device: torch.device) -> None:
    """Put every weight in place, cast or quantized as it arrives."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for stack in (model.encoder, model.decoder):
        prefix = "encoder" if stack is model.encoder else "decoder"
        for name, module in list(stack.named_modules()):
            path = f"{prefix}.{name}"
            if path.endswith("embed_tokens"):
                continue
            if isinstance(module, nn.Linear) and precision in precisions.QUANTIZED:
                weight = read_checked(checkpoint, f"{path}.weight", module.weight, torch.bfloat16, device)
                precisions.replace(stack, name, precisions.quantized_linear(weight, precision))
            else:
                for parameter_name, parameter in list(module.named_parameters(recurse=False)):
                    value = read_checked(checkpoint, f"{path}.{parameter_name}", parameter, dtype, device)
                    setattr(module, parameter_name, nn.Parameter(value, requires_grad=False))
    shared = nn.Parameter(read_checked(checkpoint, SHARED, model.shared.weight, dtype, device), requires_grad=False)
    model.shared.weight = shared
    model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
    if checkpoint.has_own_head:
        model.lm_head.weight = nn.Parameter(read_checked(checkpoint, HEAD, model.lm_head.weight, dtype, device), requires_grad=False)
    else:
        model.lm_head.weight = shared
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"never filled: {left}"


def read_checked(checkpoint: Checkpoint, name: str, like: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Read one weight and refuse it unless it has the shape that the configuration gives it."""
    value = read_to(checkpoint, name, dtype, device)
    if value.shape != like.shape:
        raise BackboneError(
            f"{checkpoint.folder}: {name} has shape {tuple(value.shape)} where config.json asks for {tuple(like.shape)}: "
            "the two are not of one checkpoint"
        )
    return value


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

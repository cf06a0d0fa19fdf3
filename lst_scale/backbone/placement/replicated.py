"""The backbone in one process: transformers' own model, run forward with hooks on the blocks that a ladder reads.

Hooks and not `output_hidden_states`: that keeps every block's output alive, and its last entry is post-norm, wrong for the last block.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone.families import Family, family_of, family_of_live
from lst_scale.backbone.placement.prefetch import Prefetcher
from lst_scale.backbone.taps import (
    BackboneIdentity,
    BackboneSpec,
    Inputs,
    Replica,
    SourceState,
    StackTaps,
    Tap,
    TapRequest,
    Taps,
    TargetState,
    cast_tap,
    joined,
)
from lst_scale.backbone.weights import assemble
from lst_scale.backbone.weights import precision as precisions
from lst_scale.backbone.weights.checkpoint import fingerprint_of, open_checkpoint
from lst_scale.errors import BackboneError


class LocalBackbone:
    """A model of some family, frozen, whole in this process. No nn.Module on purpose: nothing can train or save it by accident."""

    def __init__(
        self,
        model: Any,
        spec: BackboneSpec,
        identity: BackboneIdentity,
        weight_source: Callable[[str], Tensor],
        num_parameters: int,
        *,
        replica: Replica | None = None,
        conveyor: Prefetcher | None = None,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self.spec, self.identity, self.weight_source = spec, identity, weight_source
        self.replica, self.conveyor = replica or Replica(), conveyor
        self.num_parameters = num_parameters  # as published, whatever they are held in; a tied head counts once
        self.family = family_of(spec.model_type, identity.checkpoint)
        self.head = self.family.head(model, spec)
        self._context: Any | None = None  # what the family made of a text that stands before every row

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
        for ref in assemble.block_refs(checkpoint):
            assemble.fill_block(ref.get(model), ref.path, checkpoint, precision, torch.device(device))
        identity = BackboneIdentity(checkpoint=name, revision=revision, precision=precision, fingerprint=checkpoint.fingerprint())
        # In float32 what is in memory is as exact as what is stored, and a side network that runs some of it again may share it. Not on a
        # GPU: side blocks are carved out of weights on the CPU.
        shared = precision == "fp32" and torch.device(device).type == "cpu"
        weights = _live_weight_source(model) if shared else checkpoint.tensor
        return cls(model, checkpoint.spec, identity, weights, num_parameters)

    @classmethod
    def wrap(cls, model: Any) -> LocalBackbone:
        """Freeze a live model of transformers; it stays the caller's object.

        Raises:
            BackboneError: it is another kind of model, or in fp16.
        """
        spec = family_of_live(model).spec(model.config)
        dtype = model.get_input_embeddings().weight.dtype
        if dtype == torch.float16:
            raise BackboneError(precisions.FP16_REASON)
        name = str(getattr(model.config, "_name_or_path", "") or "live model")
        precision = "bf16" if dtype == torch.bfloat16 else "fp32"
        identity = BackboneIdentity(checkpoint=name, revision=None, precision=precision, fingerprint=_live_fingerprint(model, spec))
        return cls(model, spec, identity, _live_weight_source(model), sum(p.numel() for p in model.parameters()))

    def give_model(self) -> Any:
        """Return the model itself, for methods that train inside it."""
        return self._model

    @property
    def device(self) -> torch.device:
        return self.family.embedding(self._model).device

    @property
    def blocks(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        """The blocks that run on the source and on the target."""
        return self.family.stack_of(self._model, target=False), self.family.stack_of(self._model, target=True)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the input embeddings of token ids, detached: transformers' `enable_input_require_grads` hooks a live model's embedding."""
        embeddings: Tensor = self._model.get_input_embeddings()(ids)
        return embeddings.detach()

    def weight_bytes(self) -> int:
        """Bytes on this rank's device that hold weights, shared ones once; blocks that come and go count as their slots."""
        tensors = {t.data_ptr(): t.numel() * t.element_size() for t in precisions.held_tensors(self._model)}
        return sum(tensors.values()) + (self.conveyor.resident_bytes if self.conveyor is not None else 0)

    @torch.no_grad()
    def after(self, context: Sequence[int]) -> LocalBackbone:
        """Run the context now; both backbones share the model."""
        if self.identity.context:
            raise BackboneError("this backbone goes on from a context already: call after on the one without")
        other = copy.copy(self)
        other._context = self.family.context(self._model, self.embed(torch.tensor([list(context)], device=self.device)))
        other.identity = dataclasses.replace(self.identity, context=tuple(context))
        return other

    def begun(self, num_rows: int) -> Any:
        return self.family.begun(self._context, num_rows)

    @torch.no_grad()
    def read(self, source_BS: Tensor, source_mask_BS: Tensor, request: TapRequest) -> SourceState:
        embedding_BSD = self.embed(source_BS)
        with _capture(self.blocks[0], request.of_source, self.family) as hidden:
            final = self.family.read(self._model, embedding_BSD, source_mask_BS, self._context)
        taps = StackTaps(layers=request.of_source.layers, embedding=embedding_BSD, hidden=tuple(hidden))
        taps = taps if request.source else taps.nothing
        return SourceState(taps=taps, final=final, source_mask_BS=source_mask_BS)

    @torch.no_grad()
    def extend(self, target_BT: Tensor, source: SourceState, request: TapRequest, cache: Any | None = None) -> TargetState:
        """With a cache, `target_BT` are the new positions only. Blocks that nobody reads are not run."""
        embedding_BTD, blocks = self.embed(target_BT), self.blocks[1]
        needed = len(blocks) if request.target_final else request.layers[-1] + 1
        with _capture(blocks, request, self.family) as hidden:
            masks = (source.source_mask_BS, source.target_mask_BT)
            final_BTD = self.family.extend(self._model, embedding_BTD, source.final, *masks, cache, num_blocks=needed)
        taps = StackTaps(layers=request.layers, embedding=embedding_BTD, hidden=tuple(hidden))
        return TargetState(taps=taps, final_BTD=final_BTD if request.target_final else None)

    def __call__(self, inputs: Inputs, request: TapRequest) -> Taps:
        source = self.read(inputs.source_BS, inputs.source_mask_BS, request)
        return joined(source, self.extend(inputs.target_BT, source, request))

    @torch.no_grad()
    def each_target(self, several: Sequence[Inputs], request: TapRequest) -> Iterator[Taps]:
        source = self.read(several[0].source_BS, several[0].source_mask_BS, request)
        for inputs in several:
            yield joined(source, self.extend(inputs.target_BT, source, request))

    def move(self, device: torch.device) -> None:
        if self.conveyor is not None:
            raise BackboneError(f"this backbone's blocks come to {self.device} and leave it again: load it where it is to run, on {device}")
        self._model.to(device)
        self.head = self.family.head(self._model, self.spec)

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Do nothing: nobody waits for it."""

    reads_ahead = False

    def prefetch(self, inputs: Inputs) -> None:
        """Do nothing: what is run is not read."""


@contextlib.contextmanager
def _capture(blocks: nn.ModuleList, request: TapRequest, family: Family) -> Iterator[list[Tap]]:
    """Collect the outputs that are asked for, in order, while the body runs one forward pass."""
    hidden: list[Tap] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # At once: the block's own output lives only until the next has read it.
        hidden.append(cast_tap(family.state(output), request.storage))

    handles = [blocks[layer].register_forward_hook(keep) for layer in request.layers]
    try:
        yield hidden
    finally:
        for handle in handles:
            handle.remove()


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


def _live_fingerprint(model: Any, spec: BackboneSpec) -> str:
    parameters = dict(model.named_parameters())
    names = family_of(spec.model_type, "this model").canonical(parameters)
    return fingerprint_of(spec, names, parameters.__getitem__)

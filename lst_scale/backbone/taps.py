"""The one boundary: backbone(inputs) -> Taps -> side network.

A tap is a hidden state of the frozen backbone, detached, that a ladder reads. Where taps come from (one process, many GPUs, host
memory, a file written an epoch ago) is invisible on the other side of this file.

Shapes: B rows, S source tokens, T target tokens, D = d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lst_scale.backbone.spec import BackboneSpec as BackboneSpec
from lst_scale.inputs.batch import Inputs as Inputs


@dataclass(frozen=True, kw_only=True)
class BackboneIdentity:
    """Which backbone a side network was trained on; stored beside the side network."""

    checkpoint: str  # hub name or path, as the user wrote it
    revision: str | None
    precision: str  # fp32, bf16, int8, nf4
    fingerprint: str  # hex digest of configuration and weights as stored in the checkpoint
    context: tuple[int, ...] = ()  # token ids that it has read before every row

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> BackboneIdentity:
        """Return what `as_json` made a record of."""
        return cls(**record | {"context": tuple(record.get("context", ()))})

    def as_json(self) -> dict[str, Any]:
        """Return what is written down; without a context it is what it was before there were any."""
        return {name: list(value) if name == "context" else value for name, value in vars(self).items() if name != "context" or value}


@dataclass(frozen=True, kw_only=True)
class TapRequest:
    """Which states to keep alive: 0-based block indices, ascending, the same for source and target; and in what form."""

    layers: tuple[int, ...]
    target_final: bool = False  # also the target's final normed state, for a ladder that merges it
    source: bool = True  # also those of the source; False: of the target alone
    storage: str = "exact"  # of block outputs: exact (as computed), bf16, or int8 with one scale a position

    @property
    def of_source(self) -> TapRequest:
        """What is kept while the source runs."""
        return self if self.source else replace(self, layers=())


def union(requests: Sequence[TapRequest]) -> TapRequest:
    """Return the request that serves all: in their form where they agree on one, as computed where they don't."""
    layers = sorted({layer for request in requests for layer in request.layers})
    forms = {request.storage for request in requests}
    storage = forms.pop() if len(forms) == 1 else "exact"
    final, source = (any(getattr(request, name) for request in requests) for name in ("target_final", "source"))
    return TapRequest(layers=tuple(layers), target_final=final, source=source, storage=storage)


@dataclass(frozen=True, kw_only=True)
class PackedTap:
    """A block's output in 8 bits: values * scale. A quarter of float32's bytes, wrong by at most 1/254 of a position's largest value."""

    values_BSD: Tensor  # int8
    scale_BS1: Tensor  # float32

    @staticmethod
    def pack(tap_BSD: Tensor) -> PackedTap:
        scale_BS1 = tap_BSD.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 127
        return PackedTap(values_BSD=(tap_BSD / scale_BS1).round_().to(torch.int8), scale_BS1=scale_BS1)

    def unpack(self) -> Tensor:
        """Return the states in float32."""
        return self.values_BSD * self.scale_BS1

    def __getitem__(self, rows: Any) -> PackedTap:
        return PackedTap(values_BSD=self.values_BSD[rows], scale_BS1=self.scale_BS1[rows])

    def clone(self) -> PackedTap:
        return PackedTap(values_BSD=self.values_BSD.clone(), scale_BS1=self.scale_BS1.clone())

    @property
    def device(self) -> torch.device:
        return self.values_BSD.device

    @property
    def requires_grad(self) -> bool:
        return False


Tap = Tensor | PackedTap


def cast_tap(tap: Tap, storage: str) -> Tap:
    """Return a block's output in the form that a request asks for."""
    if isinstance(tap, PackedTap):
        return tap if storage == "int8" else cast_tap(tap.unpack(), storage)
    if storage == "int8":
        return PackedTap.pack(tap)
    return tap.to(torch.bfloat16) if storage == "bf16" else tap


@dataclass(frozen=True, kw_only=True)
class StackTaps:
    """The states of one stack. `hidden[i]` is the output of block `layers[i]`, before the stack's final norm."""

    layers: tuple[int, ...]
    embedding: Tensor  # (B, S, D) or (B, T, D)
    hidden: tuple[Tap, ...]  # each (B, S, D) or (B, T, D)

    def __post_init__(self) -> None:
        for tap in (self.embedding, *self.hidden):
            assert not tap.requires_grad, "a tap requires grad: something trainable sits upstream of the frozen backbone"

    @property
    def nothing(self) -> StackTaps:
        """Those of a text without tokens, of which no block is read."""
        return StackTaps(layers=(), embedding=self.embedding[:, :0], hidden=())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """`hidden`, unpacked where it is packed."""
        return tuple(tap.unpack() if isinstance(tap, PackedTap) else tap for tap in self.hidden)


@dataclass(frozen=True, kw_only=True)
class SourceState:
    """What the backbone makes of a source: its taps, and what it needs to go on to a target."""

    taps: StackTaps
    final: Any  # what the family's `read` returned and its `extend` takes; nobody else looks into it
    source_mask_BS: Tensor  # 1 = token, 0 = padding
    # Of the target's tokens so far, those in a cache among them, where rows are of different lengths; None: all are tokens.
    target_mask_BT: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TargetState:
    """What the backbone makes of the given (with a cache: the new) positions of a target."""

    taps: StackTaps
    final_BTD: Tensor | None  # None unless the request asks for it


@dataclass(frozen=True, kw_only=True)
class Taps:
    """All that a side network reads of one batch: of the source, then of the target, given the source."""

    source: StackTaps
    target: StackTaps
    source_mask_BS: Tensor
    final_BTD: Tensor | None = None  # the target's final normed state


def joined(source: SourceState, target: TargetState) -> Taps:
    """Return what a side network reads of both."""
    return Taps(source=source.taps, target=target.taps, source_mask_BS=source.source_mask_BS, final_BTD=target.final_BTD)


def select(taps: Taps, request: TapRequest) -> Taps:
    """Return the part of `taps` that `request` asks for: the same tensors where they have its form already."""
    return Taps(
        source=selected_stack(taps.source, request) if request.source else taps.source.nothing,
        target=selected_stack(taps.target, request),
        source_mask_BS=taps.source_mask_BS,
        final_BTD=taps.final_BTD if request.target_final else None,
    )


def selected_stack(whole: StackTaps, request: TapRequest) -> StackTaps:
    """The same of one stack."""
    hidden = tuple(cast_tap(whole.hidden[whole.layers.index(layer)], request.storage) for layer in request.layers)
    return StackTaps(layers=request.layers, embedding=whole.embedding, hidden=hidden)


def where_not_finite(taps: Taps) -> str | None:
    """Name the first of a batch's states that hold NaN or infinity; None: none do."""
    for stack, states in (("source", taps.source), ("target", taps.target)):
        if not torch.isfinite(states.embedding).all():
            return f"at the {stack}'s embeddings"
        for layer, tensor in zip(states.layers, states.tensors, strict=True):
            if not torch.isfinite(tensor).all():
                return f"at block {layer} of the {stack}"
    final_BTD = taps.final_BTD
    return None if final_BTD is None or torch.isfinite(final_BTD).all() else "after the target's last block"


@dataclass(frozen=True, kw_only=True)
class FrozenHead:
    """The backbone's output head. Needed downstream even when no backbone is in memory.

    logits = (hidden * scale) @ weight.T / divided_by, and with a soft cap c * tanh(logits / c).
    """

    weight_VD: Tensor
    scale: float
    divided_by: float = 1.0
    soft_cap: float | None = None

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """Return logits (B, T, V) in the promoted dtype of `hidden_BTD` and the head's weight."""
        dtype = torch.promote_types(hidden_BTD.dtype, self.weight_VD.dtype)
        logits = torch.nn.functional.linear(hidden_BTD.to(dtype) * self.scale, self.weight_VD.to(dtype))
        if self.divided_by != 1.0:
            logits = logits / self.divided_by
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap

    def slope(self, logits: Tensor) -> Tensor | None:
        """Return the soft cap's derivative at these logits; None without one, where it is 1."""
        return None if self.soft_cap is None else 1 - (logits / self.soft_cap).square()

    def backward(self, logits_gradient: Tensor, hidden_dtype: torch.dtype, slope: Tensor | None = None) -> Tensor:
        """Return the gradient (..., D) of hidden states in `hidden_dtype`, given that (..., V) of their logits and `slope` there."""
        dtype = torch.promote_types(hidden_dtype, self.weight_VD.dtype)
        given = logits_gradient if slope is None else logits_gradient * slope
        return torch.matmul(given.to(dtype), self.weight_VD.to(dtype)).mul_(self.scale / self.divided_by).to(hidden_dtype)


@dataclass(frozen=True, kw_only=True)
class Replica:
    """Which copy of the backbone this rank runs on, where rows are dealt out for `read` and `extend`.

    Ranks that share a copy must bring the same rows. `in_step`: all ranks must call it equally often, too.
    """

    index: int = 0
    count: int = 1
    in_step: bool = False


@runtime_checkable
class Backbone(Protocol):
    """A frozen model that runs forward only, in eval mode, under `torch.no_grad`: all that anybody asks of one."""

    @property
    def spec(self) -> BackboneSpec: ...
    @property
    def identity(self) -> BackboneIdentity: ...
    @property
    def head(self) -> FrozenHead: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def replica(self) -> Replica: ...
    @property
    def weight_source(self) -> Callable[[str], Tensor]:
        """Read one full-precision weight by its Hugging Face name, e.g. for pruning; never the whole model at once."""
        ...

    def after(self, context: Sequence[int]) -> Backbone:
        """Return this backbone as it goes on, in every row, from these token ids, which are run once.

        Raises:
            BackboneError: it reads each row as a whole, or remembers what follows another context.
        """
        ...

    def begun(self, num_rows: int) -> Any:
        """Return the `final` of sources that have no tokens."""
        ...

    def read(self, source_BS: Tensor, source_mask_BS: Tensor, request: TapRequest) -> SourceState:
        """Run token ids (B, S) of a source; mask 1 = token, 0 = padding."""
        ...

    def extend(self, target_BT: Tensor, source: SourceState, request: TapRequest, cache: Any | None = None) -> TargetState:
        """Run token ids (B, T) of a target, given its source. `cache`: transformers' own, whose first `spec.cache_layers` it fills."""
        ...

    def __call__(self, inputs: Inputs, request: TapRequest) -> Taps:
        """Return the taps of this rank's own rows, whatever the others bring. All ranks must call it equally often."""
        ...

    def each_target(self, several: Sequence[Inputs], request: TapRequest) -> Iterator[Taps]:
        """Yield the taps of several targets of the same sources, which are run or read once. Rows are dealt out as for `read`."""
        ...

    @property
    def num_parameters(self) -> int:
        """How many parameters the published model has, whatever they are held in; a tied head counts once."""
        ...

    def weight_bytes(self) -> int:
        """Return the bytes on this rank's device that hold weights."""
        ...

    def move(self, device: torch.device) -> None:
        """Go to another device, whole.

        Raises:
            BackboneError: it is held in a way that can't be moved.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """Return what a run's result says of the way in which taps came about; nothing where they are always made."""
        ...

    def close(self) -> None:
        """Give back what other processes wait for. Nothing is lost by closing twice, or by reading on."""
        ...

    @property
    def reads_ahead(self) -> bool:
        """Whether `prefetch` saves time."""
        ...

    def prefetch(self, inputs: Inputs) -> None:
        """Begin to read the batch that it will be called with next. Nothing but time depends on it: another may come, too."""
        ...

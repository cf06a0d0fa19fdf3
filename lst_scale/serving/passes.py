"""What one pass computes: of prompts, of one more token, of labels; by the backbone for all rows, by a side network for its own.

Nothing here knows a model's kind but by the spec's `one_stack`, once: beside an encoder-decoder a prompt is a source and the target begins
with its start token; a decoder-only model reads the prompt as the beginning of the target.

Shapes: B rows, T new tokens, S source tokens, D = d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from lst_scale.backbone.taps import Backbone, SourceState, StackTaps, Tap, TapRequest, TargetState, selected_stack
from lst_scale.serving.rows import Rows, padded, rows_of
from lst_scale.side.cache import new_cache
from lst_scale.side.designs.one_stack import SidePrefix
from lst_scale.side.designs.parts import SideEncoderState
from lst_scale.side.network import SideNetwork


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the backbone made of one prompt: enough for any side network to answer it, any number of times."""

    rows: Rows  # one
    target: TargetState  # of the prompt, or of the start token
    mask_1S: Tensor  # of the side network's own positions: the prompt's tokens, without a context
    source: StackTaps | None  # of an encoder

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        held = [tensor for layer in (*self.rows.grown, *self.rows.given) if layer is not None for tensor in layer]
        for taps in (self.target.taps, self.source):
            held += [] if taps is None else [taps.embedding, *taps.tensors]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


class Passes:
    """The backbone's and the side networks' passes. All blocks run, so that a row can go on whichever side networks come later."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._kind: _OneStack | _TwoStacks = (_OneStack if backbone.spec.one_stack else _TwoStacks)(backbone)
        self.prompts_run, self.tokens_run = 0, 0

    def request(self, sides: Sequence[SideNetwork]) -> TapRequest:
        """Return which states these side networks read, and the last one, which the backbone's own answers are made of."""
        return TapRequest(layers=tuple(sorted({layer for side in sides for layer in side.request.layers})), target_final=True)

    @torch.no_grad()
    def read(self, prompts: Sequence[Sequence[int]], context: Rows | None, request: TapRequest) -> list[Prompt]:
        """Run prompts (token ids), all after one context or none."""
        self.prompts_run += len(prompts)
        self.tokens_run += sum(map(len, prompts))
        return self._kind.read(prompts, context, request)

    @torch.no_grad()
    def read_context(self, ids: Sequence[int]) -> Rows:
        """Run what stands before prompts, once."""
        self.tokens_run += len(ids)
        return self._kind.read_context(ids)

    @torch.no_grad()
    def extend(self, ids_BT: Tensor, rows: Rows, request: TapRequest) -> tuple[TargetState, Rows]:
        """Run new tokens after those of these rows; return what became of them, and the rows with them."""
        self.tokens_run += ids_BT.numel()
        cache = rows.cache()
        state = self.backbone.extend(ids_BT, self._kind.source_of(rows, ids_BT.shape[1]), request, cache)
        return state, rows.after(cache, ids_BT.shape[1])

    def nothing_to_do(self) -> None:
        """Hear from time to time that nobody asks for anything."""

    @torch.no_grad()
    def begin(self, side: SideNetwork, prompts: Sequence[Prompt]) -> tuple[Tensor, Rows]:
        """Run a side network on prompts; return the logits (B, V) of the first new token, and its own rows."""
        hidden_B1D, rows = self._kind.begin(side, prompts)
        return self.backbone.head(hidden_B1D)[:, 0], rows

    @torch.no_grad()
    def go_on(self, side: SideNetwork, state: TargetState, rows: Rows) -> tuple[Tensor, Rows]:
        """Run a side network on new tokens after those of its rows; return their logits (B, T, V), and the rows with them."""
        cache = rows.cache()
        length = state.taps.embedding.shape[1]
        own = TargetState(taps=selected_stack(state.taps, side.request), final_BTD=state.final_BTD)
        hidden_BTD = side.decode(own, self._kind.beside(side, rows, length), cache)
        return self.backbone.head(hidden_BTD), rows.after(cache, length)

    @torch.no_grad()
    def bare(self, state: TargetState) -> Tensor:
        """Return the backbone's own logits (B, T, V)."""
        assert state.final_BTD is not None
        return self.backbone.head(state.final_BTD)


class _OneStack:
    """A decoder-only model: a prompt is the first part of the target."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def read(self, prompts: Sequence[Sequence[int]], context: Rows | None, request: TapRequest) -> list[Prompt]:
        ids_BS, mask_BS = _beginning_with_padding(prompts, self._backbone.device)
        before = _nothing(len(prompts), self._backbone) if context is None else context.of([0] * len(prompts))
        whole_BL = torch.cat([before.mask_BL, mask_BS], 1)
        cache = before.cache()
        state = self._backbone.extend(ids_BS, _after_nothing(whole_BL), request, cache)
        rows = rows_of(cache, whole_BL, None)
        return [self._one(rows, state, mask_BS, number) for number in range(len(prompts))]

    def _one(self, rows: Rows, state: TargetState, mask_BS: Tensor, number: int) -> Prompt:
        first = mask_BS.shape[1] - int(mask_BS[number].sum())
        one = slice(number, number + 1)
        own = _without_padding_between(rows, number, mask_BS.shape[1], first)
        assert state.final_BTD is not None
        target = TargetState(taps=_positions(state.taps, one, slice(first, None)), final_BTD=state.final_BTD[one, first:])
        return Prompt(rows=own, target=target, mask_1S=mask_BS[one, first:], source=None)

    def read_context(self, ids: Sequence[int]) -> Rows:
        mask_1S = torch.ones(1, len(ids), dtype=torch.long, device=self._backbone.device)
        cache = DynamicCache()
        ids_1S = torch.tensor([list(ids)], device=self._backbone.device)
        self._backbone.extend(ids_1S, _after_nothing(mask_1S), TapRequest(layers=(), target_final=True), cache)
        return rows_of(cache, mask_1S, None)

    def source_of(self, rows: Rows, num_new: int) -> SourceState:
        return _after_nothing(torch.nn.functional.pad(rows.mask_BL, (0, num_new), value=1))

    def begin(self, side: SideNetwork, prompts: Sequence[Prompt]) -> tuple[Tensor, Rows]:
        mask_BS = padded([prompt.mask_1S for prompt in prompts])
        target = _together([prompt.target for prompt in prompts], side.request)
        cache = DynamicCache()
        hidden_BSD = side.decode(target, _prefix(target.taps, mask_BS), cache)
        return hidden_BSD[:, -1:], rows_of(cache, mask_BS, None)

    def beside(self, side: SideNetwork, rows: Rows, num_new: int) -> SidePrefix:
        mask_BL = torch.nn.functional.pad(rows.mask_BL, (0, num_new), value=1)
        nothing = torch.empty(len(rows), 0, self._backbone.spec.d_model, device=self._backbone.device)
        return SidePrefix(taps=_stack_of(nothing, side.request.layers), attention_mask_BS=mask_BL)


class _TwoStacks:
    """An encoder-decoder: a prompt is a source, and the target begins with its start token."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def read(self, prompts: Sequence[Sequence[int]], context: Rows | None, request: TapRequest) -> list[Prompt]:
        assert context is None, "an encoder reads a context as part of each source"
        device = self._backbone.device
        longest = max(map(len, prompts))
        ids_BS = torch.tensor([[*ids, *[self._backbone.spec.pad_token_id] * (longest - len(ids))] for ids in prompts], device=device)
        lengths_B1 = torch.tensor([[len(ids)] for ids in prompts], device=device)
        mask_BS = (torch.arange(longest, device=device)[None] < lengths_B1).long()
        source = self._backbone.read(ids_BS, mask_BS, request)
        start_B1 = torch.full((len(prompts), 1), self._backbone.spec.decoder_start_token_id, device=device)
        cache = new_cache()
        state = self._backbone.extend(start_B1, source, request, cache)
        rows = rows_of(cache, torch.ones_like(start_B1), mask_BS)
        found = []
        for number, ids in enumerate(prompts):
            one = slice(number, number + 1)
            assert state.final_BTD is not None
            found.append(
                Prompt(
                    rows=rows.of([number]),
                    target=TargetState(taps=_positions(state.taps, one, slice(None)), final_BTD=state.final_BTD[one]),
                    mask_1S=mask_BS[one, : len(ids)],
                    source=_positions(source.taps, one, slice(0, len(ids))),
                )
            )
        return found

    def read_context(self, ids: Sequence[int]) -> Rows:
        raise AssertionError("an encoder reads a context as part of each source")

    def source_of(self, rows: Rows, num_new: int) -> SourceState:
        assert rows.given_mask_BS is not None
        # Its keys and values are in the rows already; nobody looks at the states.
        final_BSD = torch.zeros(1, 1, 1, device=self._backbone.device).expand(*rows.given_mask_BS.shape, self._backbone.spec.d_model)
        nothing = StackTaps(layers=(), embedding=final_BSD[:, :0], hidden=())
        target_mask_BT = torch.nn.functional.pad(rows.mask_BL, (0, num_new), value=1)
        return SourceState(taps=nothing, final=final_BSD, source_mask_BS=rows.given_mask_BS, target_mask_BT=target_mask_BT)

    def begin(self, side: SideNetwork, prompts: Sequence[Prompt]) -> tuple[Tensor, Rows]:
        mask_BS = padded([prompt.mask_1S for prompt in prompts], after=True)
        sources = [selected_stack(prompt.source, side.request) for prompt in prompts if prompt.source is not None]
        hidden = tuple(padded([taps.tensors[i] for taps in sources], after=True) for i in range(len(side.request.layers)))
        embedding_BSD = padded([taps.embedding for taps in sources], after=True)
        taps = StackTaps(layers=side.request.layers, embedding=embedding_BSD, hidden=hidden)
        cache = new_cache()
        hidden_B1D = side.decode(_together([prompt.target for prompt in prompts], side.request), side.encode(taps, mask_BS), cache)
        return hidden_B1D, rows_of(cache, torch.ones_like(mask_BS[:, :1]), mask_BS)

    def beside(self, side: SideNetwork, rows: Rows, num_new: int) -> SideEncoderState:
        assert rows.given_mask_BS is not None
        final_BSR = torch.zeros(1, 1, 1, device=self._backbone.device).expand(*rows.given_mask_BS.shape, side.encoder_width)
        target_mask_BT = torch.nn.functional.pad(rows.mask_BL, (0, num_new), value=1)
        return SideEncoderState(final_BSR=final_BSR, attention_mask_BS=rows.given_mask_BS, target_mask_BT=target_mask_BT)


def states_of(state: TargetState, rows: list[int]) -> TargetState:
    """Return the states of some rows."""
    taps = state.taps
    picked = StackTaps(layers=taps.layers, embedding=taps.embedding[rows], hidden=tuple(tap[rows] for tap in taps.hidden))
    return TargetState(taps=picked, final_BTD=None if state.final_BTD is None else state.final_BTD[rows])


def _nothing(num_rows: int, backbone: Backbone) -> Rows:
    return Rows(grown=(), mask_BL=torch.ones(num_rows, 0, dtype=torch.long, device=backbone.device))


def _after_nothing(mask_BL: Tensor) -> SourceState:
    """Return the state before a target that is all there is; the mask is that of all its tokens."""
    nothing = StackTaps(layers=(), embedding=torch.empty(len(mask_BL), 0, 0, device=mask_BL.device), hidden=())
    return SourceState(taps=nothing, final=None, source_mask_BS=mask_BL)


def _prefix(taps: StackTaps, mask_BS: Tensor) -> SidePrefix:
    nothing = taps.embedding[:, :0]
    return SidePrefix(taps=_stack_of(nothing, taps.layers), attention_mask_BS=mask_BS)


def _stack_of(tensor: Tensor, layers: tuple[int, ...]) -> StackTaps:
    return StackTaps(layers=layers, embedding=tensor, hidden=(tensor,) * len(layers))


def _beginning_with_padding(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids_BS = torch.tensor([[*[0] * (longest - len(ids)), *ids] for ids in prompts], device=device)
    mask_BS = torch.tensor([[*[0] * (longest - len(ids)), *[1] * len(ids)] for ids in prompts], device=device)
    return ids_BS, mask_BS


def _without_padding_between(rows: Rows, number: int, prompt_length: int, first: int) -> Rows:
    """Return one row without the padding that stands between a context and the row's prompt."""
    begin = rows.length - prompt_length
    kept = [*range(begin), *range(begin + first, rows.length)]
    index = torch.tensor(kept, device=rows.mask_BL.device)
    one = slice(number, number + 1)
    grown = tuple(None if layer is None else (layer[0][one][:, :, index], layer[1][one][:, :, index]) for layer in rows.grown)
    return Rows(grown=grown, mask_BL=rows.mask_BL[one][:, index])


def _positions(taps: StackTaps, rows: slice, positions: slice) -> StackTaps:
    # Copies: a view would keep the other rows alive.
    hidden: tuple[Tap, ...] = tuple(tap[rows, positions].clone() for tap in taps.tensors)
    return StackTaps(layers=taps.layers, embedding=taps.embedding[rows, positions].clone(), hidden=hidden)


def _together(states: Sequence[TargetState], request: TapRequest) -> TargetState:
    """Return what a side network reads of several rows' states, with padding before those that are shorter."""
    own = [selected_stack(state.taps, request) for state in states]
    hidden = tuple(padded([taps.tensors[layer] for taps in own]) for layer in range(len(request.layers)))
    finals = [state.final_BTD for state in states if state.final_BTD is not None]
    taps = StackTaps(layers=request.layers, embedding=padded([taps.embedding for taps in own]), hidden=hidden)
    return TargetState(taps=taps, final_BTD=padded(finals))

"""A backbone that remembers: taps of rows it has seen come from disk, and a backbone that is never asked is never loaded.

It stands behind the boundary like any other. Training calls it with whole batches: when every row is known, taps are put together from
the cache, and otherwise the live backbone runs the batch and what was not known is written down. Generation needs the live backbone.

Stored in the backbone's own dtype, a row's taps are those of the batch it was first computed in: the same batch gives the same bits,
another batch pads differently, which moves the last bits of float32 and bf16 sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lst_scale.backbone.local import LocalBackbone
from lst_scale.backbone.tap_cache import TapCache, decoder_digest, encoder_digest
from lst_scale.backbone.taps import (
    BackboneIdentity,
    BackboneSpec,
    DecoderState,
    EncoderState,
    FrozenHead,
    Replica,
    StackTaps,
    TapRequest,
    Taps,
    selected,
)


class CachingBackbone:
    """Taps from `cache`, or from the backbone that `load` gives when it is first needed.

    Args:
        embedding_VD: the input embedding, from which the embedding taps are looked up.
        load: loads the live backbone; called at most once.
    """

    def __init__(
        self,
        cache: TapCache,
        spec: BackboneSpec,
        identity: BackboneIdentity,
        head: FrozenHead,
        embedding_VD: Tensor,
        weight_source: Callable[[str], Tensor],
        replica: Replica,
        load: Callable[[], LocalBackbone],
        num_parameters: int,
    ) -> None:
        self.cache, self.spec, self.identity, self.head = cache, spec, identity, head
        self.weight_source, self.replica, self.num_parameters = weight_source, replica, num_parameters
        self._embedding_VD, self._load = embedding_VD, load
        self._live: LocalBackbone | None = None
        self.rows_read, self.rows_run = 0, 0

    @property
    def live(self) -> LocalBackbone:
        """The backbone itself, loaded now if it wasn't."""
        if self._live is None:
            self._live = self._load()
        return self._live

    @property
    def is_loaded(self) -> bool:
        return self._live is not None

    @property
    def device(self) -> torch.device:
        return self._embedding_VD.device

    def weight_bytes(self) -> int:
        """Bytes on this rank's device that hold weights: embedding and head, or the whole live backbone."""
        if self._live is not None:
            return self._live.weight_bytes()
        ends = {t.data_ptr(): t.numel() * t.element_size() for t in (self._embedding_VD, self.head.weight_VD)}
        return sum(ends.values())

    def encode(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, request: TapRequest) -> EncoderState:
        return self.live.encode(input_ids_BS, attention_mask_BS, request)

    def decode(self, decoder_input_ids_BT: Tensor, encoder: EncoderState, request: TapRequest, cache: Any | None = None) -> DecoderState:
        return self.live.decode(decoder_input_ids_BT, encoder, request, cache)

    @torch.no_grad()
    def __call__(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, decoder_input_ids_BT: Tensor, request: TapRequest) -> Taps:
        sources = [row[mask.bool()] for row, mask in zip(input_ids_BS.cpu(), attention_mask_BS.cpu(), strict=True)]
        targets = [_without_padding(row, self.spec) for row in decoder_input_ids_BT.cpu()]
        # Rows are stored with the taps of all members of a run; each is given its own.
        whole = TapRequest(layers=self.cache.key.layers, decoder_final=self.cache.key.decoder_final)
        found = self._read(sources, targets, whole)
        if found is not None:
            self.rows_read += len(sources)
            return selected(self._assemble(found, input_ids_BS, attention_mask_BS, decoder_input_ids_BT, whole), request)
        taps = self.live(input_ids_BS, attention_mask_BS, decoder_input_ids_BT, whole)
        self.rows_run += len(sources)
        self._write(sources, targets, taps)
        return selected(taps, request)

    def known(self, input_ids: Tensor, decoder_input_ids: Tensor) -> bool:
        """Whether a row's taps are in the cache; ids without padding."""
        return encoder_digest(input_ids) in self.cache and decoder_digest(input_ids, decoder_input_ids) in self.cache

    def _read(self, sources: list[Tensor], targets: list[Tensor], request: TapRequest) -> list[tuple[list[Tensor], list[Tensor]]] | None:
        rows = []
        for source, target in zip(sources, targets, strict=True):
            encoder = self.cache.read(encoder_digest(source), len(request.layers))
            if encoder is None:
                return None
            decoder = self.cache.read(decoder_digest(source, target), len(request.layers) + request.decoder_final)
            if decoder is None:
                return None
            rows.append((encoder, decoder))
        return rows

    def _write(self, sources: list[Tensor], targets: list[Tensor], taps: Taps) -> None:
        final = [] if taps.decoder_final_BTD is None else [taps.decoder_final_BTD]
        for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
            self.cache.write(encoder_digest(source), [tap[row, : len(source)] for tap in taps.encoder.tensors])
            self.cache.write(decoder_digest(source, target), [tap[row, : len(target)] for tap in (*taps.decoder.tensors, *final)])

    def _assemble(
        self,
        rows: list[tuple[list[Tensor], list[Tensor]]],
        input_ids_BS: Tensor,
        attention_mask_BS: Tensor,
        decoder_input_ids_BT: Tensor,
        request: TapRequest,
    ) -> Taps:
        S, T = input_ids_BS.shape[1], decoder_input_ids_BT.shape[1]
        encoder = [self._padded([row[0][k] for row in rows], S) for k in range(len(request.layers))]
        decoder = [self._padded([row[1][k] for row in rows], T) for k in range(len(request.layers) + request.decoder_final)]
        final = decoder.pop() if request.decoder_final else None
        return Taps(
            encoder=StackTaps(layers=request.layers, embedding=self._embedding_VD[input_ids_BS], hidden=tuple(encoder)),
            decoder=StackTaps(layers=request.layers, embedding=self._embedding_VD[decoder_input_ids_BT], hidden=tuple(decoder)),
            attention_mask_BS=attention_mask_BS,
            decoder_final_BTD=final,
        )

    def _padded(self, states: list[Tensor], length: int) -> Tensor:
        """Return states (L_i, D) as one tensor (B, length, D) on the device; padding is zero, which masked attention never sees."""
        batch = states[0].new_zeros(len(states), length, states[0].shape[1])
        for row, state in enumerate(states):
            batch[row, : len(state)] = state
        return batch.to(self.device, non_blocking=True)


def _without_padding(decoder_input_ids_T: Tensor, spec: BackboneSpec) -> Tensor:
    """Cut a row to the positions whose output is a label: the same ids whatever the batch's width.

    Labels moved right lose their last column, so the end token stays in rows that are shorter than their batch and goes from the longest.
    The start token, which may be the padding id, stays.
    """
    real = (decoder_input_ids_T[1:] != spec.pad_token_id).nonzero()
    length = int(real[-1]) + 2 if len(real) else 1
    return decoder_input_ids_T[: length - 1 if length > 1 and decoder_input_ids_T[length - 1] == spec.eos_token_id else length]

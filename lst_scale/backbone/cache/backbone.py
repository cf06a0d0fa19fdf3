"""A backbone that remembers: taps of rows it has seen come from disk, and a backbone that is never asked is never loaded.

It stands behind the boundary like any other. Training calls it with whole batches: when every row is known, taps are put together from
the cache, and otherwise the live backbone runs the batch and what was not known is written down. Generation needs the live backbone.

Runs on the same rows at the same time: one of them writes (`claim_rows`), the others read what is there by then and run the rest.

Stored in the backbone's own dtype, a row's taps are those of the batch it was first computed in: the same batch gives the same bits,
another batch pads differently, which moves the last bits of float32 and bf16 sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lst_scale.backbone.cache.claim import Claim, name_of
from lst_scale.backbone.cache.lazy import LazyBackbone
from lst_scale.backbone.cache.reader import Read, TapReader, Wanted
from lst_scale.backbone.cache.store import TapCache, decoder_digest, encoder_digest
from lst_scale.backbone.cache.write_lock import WriteLock
from lst_scale.backbone.placement.replicated import LocalBackbone
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
    joined,
    select,
)
from lst_scale.system.distributed import World


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
        self._embedding_VD, self._live = embedding_VD, LazyBackbone(load)
        self.rows_read, self.rows_run = 0, 0
        # Rows are stored with the taps of all members of a run; each is given its own.
        self._whole = TapRequest(layers=cache.key.layers, decoder_final=cache.key.decoder_final)
        self._reader = TapReader(cache, pinned=self.device.type == "cuda")
        self.lock = WriteLock()

    @property
    def live(self) -> LocalBackbone:
        """The backbone itself, loaded now if it wasn't."""
        return self._live.get()

    @property
    def is_loaded(self) -> bool:
        return self._live.loaded is not None

    def unload(self) -> None:
        """Forget the live backbone; it is loaded again when it is needed."""
        self._live.drop()

    @property
    def device(self) -> torch.device:
        return self._embedding_VD.device

    def weight_bytes(self) -> int:
        """Bytes on this rank's device that hold weights: embedding and head, or the whole live backbone."""
        if self._live.loaded is not None:
            return self._live.loaded.weight_bytes()
        ends = {t.data_ptr(): t.numel() * t.element_size() for t in (self._embedding_VD, self.head.weight_VD)}
        return sum(ends.values())

    def encode(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, request: TapRequest) -> EncoderState:
        return self.live.encode(input_ids_BS, attention_mask_BS, request)

    def decode(self, decoder_input_ids_BT: Tensor, encoder: EncoderState, request: TapRequest, cache: Any | None = None) -> DecoderState:
        return self.live.decode(decoder_input_ids_BT, encoder, request, cache)

    reads_ahead = True

    def prefetch(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, decoder_input_ids_BT: Tensor) -> None:
        """Begin to read the batch that will be asked for next. Nothing but time depends on it: another may be asked for, too."""
        self._reader.prefetch(self._wanted(input_ids_BS, attention_mask_BS, decoder_input_ids_BT))

    def facts(self) -> dict[str, Any]:
        """Return how many rows were read and run, once what was written is on the disk."""
        self.cache.flush()
        facts = {"rows_read": self.rows_read, "rows_run": self.rows_run, "backbone_loaded": self.is_loaded}
        return {"cache": facts | {"damaged": self.cache.damaged}}

    def close(self) -> None:
        """Let other runs write to the cache."""
        self.lock.release()

    @torch.no_grad()
    def __call__(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, decoder_input_ids_BT: Tensor, request: TapRequest) -> Taps:
        wanted = self._wanted(input_ids_BS, attention_mask_BS, decoder_input_ids_BT)
        found = self._reader.read(wanted)
        if found is not None:
            self.rows_read += len(wanted.encoder)
            return select(self._assemble(found, input_ids_BS, attention_mask_BS, decoder_input_ids_BT), request)
        taps = self.live(input_ids_BS, attention_mask_BS, decoder_input_ids_BT, self._whole)
        self.rows_run += len(wanted.encoder)
        self._write(wanted, taps)
        return select(taps, request)

    @torch.no_grad()
    def each_target(
        self, input_ids_BS: Tensor, attention_mask_BS: Tensor, targets: Sequence[Tensor], request: TapRequest
    ) -> Iterator[Taps]:
        """Yield the taps of several decoder inputs of one source, which is read, or run, once."""
        read: list[Tensor] | None = None
        live: EncoderState | None = None
        for decoder_input_ids_BT in targets:
            wanted = self._wanted(input_ids_BS, attention_mask_BS, decoder_input_ids_BT)
            found = self._reader.read_beside(read, wanted)
            if found is not None:
                read = found[0]
                self.rows_read += len(wanted.encoder)
                yield select(self._assemble(found, input_ids_BS, attention_mask_BS, decoder_input_ids_BT), request)
                continue
            live = live or self.live.encode(input_ids_BS, attention_mask_BS, self._whole)
            taps = joined(live, self.live.decode(decoder_input_ids_BT, live, self._whole))
            self.rows_run += len(wanted.encoder)
            self._write(wanted, taps)
            yield select(taps, request)

    def claim_rows(self, rows: Sequence[tuple[Tensor, Tensor]], world: World) -> bool:
        """Claim the writing of these rows (source ids and decoder ids, without padding); return whether this run has it.

        All ranks must call it, and all write or none does. A run of one process asks again whenever it had to run a batch: the one that
        writes may have ended.
        """
        return self.lock.claim(Claim(self.cache.folder, name_of(decoder_digest(source, target) for source, target in rows)), world)

    def known(self, input_ids: Tensor, decoder_input_ids: Tensor) -> bool:
        """Whether a row's taps are in the cache; ids without padding."""
        return encoder_digest(input_ids) in self.cache and decoder_digest(input_ids, decoder_input_ids) in self.cache

    def _wanted(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, decoder_input_ids_BT: Tensor) -> Wanted:
        sources = [row[mask.bool()] for row, mask in zip(input_ids_BS.cpu(), attention_mask_BS.cpu(), strict=True)]
        targets = [_without_padding(row, self.spec) for row in decoder_input_ids_BT.cpu()]
        return Wanted(
            encoder=tuple(encoder_digest(source) for source in sources),
            decoder=tuple(decoder_digest(source, target) for source, target in zip(sources, targets, strict=True)),
            source_lengths=tuple(map(len, sources)),
            target_lengths=tuple(map(len, targets)),
            width=(input_ids_BS.shape[1], decoder_input_ids_BT.shape[1]),
        )

    def _write(self, wanted: Wanted, taps: Taps) -> None:
        if not self.lock.held():
            return
        final = [] if taps.decoder_final_BTD is None else [taps.decoder_final_BTD]
        for row, (source, target) in enumerate(zip(wanted.source_lengths, wanted.target_lengths, strict=True)):
            self.cache.write(wanted.encoder[row], [tap[row, :source] for tap in taps.encoder.tensors])
            self.cache.write(wanted.decoder[row], [tap[row, :target] for tap in (*taps.decoder.tensors, *final)])

    def _assemble(self, found: Read, input_ids_BS: Tensor, attention_mask_BS: Tensor, decoder_input_ids_BT: Tensor) -> Taps:
        encoder, decoder = ([state.to(self.device, non_blocking=True) for state in stack] for stack in found)
        final = decoder.pop() if self.cache.key.decoder_final else None
        layers = self.cache.key.layers
        return Taps(
            encoder=StackTaps(layers=layers, embedding=self._embedding_VD[input_ids_BS], hidden=tuple(encoder)),
            decoder=StackTaps(layers=layers, embedding=self._embedding_VD[decoder_input_ids_BT], hidden=tuple(decoder)),
            attention_mask_BS=attention_mask_BS,
            decoder_final_BTD=final,
        )


def _without_padding(decoder_input_ids_T: Tensor, spec: BackboneSpec) -> Tensor:
    """Cut a row to the positions whose output is a label: the same ids whatever the batch's width.

    Labels moved right lose their last column, so the end token stays in rows that are shorter than their batch and goes from the longest.
    The start token, which may be the padding id, stays.
    """
    real = (decoder_input_ids_T[1:] != spec.pad_token_id).nonzero()
    length = int(real[-1]) + 2 if len(real) else 1
    return decoder_input_ids_T[: length - 1 if length > 1 and decoder_input_ids_T[length - 1] == spec.eos_token_id else length]

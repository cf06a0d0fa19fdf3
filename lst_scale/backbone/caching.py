"""A backbone that remembers: taps of rows it has seen come from disk, and a backbone that is never asked is never loaded.

It stands behind the boundary like any other. Training calls it with whole batches: when every row is known, taps are put together from
the cache, and otherwise the live backbone runs the batch and what was not known is written down. Generation needs the live backbone.

One thread of its own reads. Told which batch comes next (`prefetch`), it reads that one while the present one trains: then one batch is in
use and one ahead, never more, and a step waits for the disk only when reading takes longer than training. All reads are that thread's, so
none meets a write.

Runs on the same rows at the same time: one of them writes (`claim_rows`), the others read what is there by then and run the rest.

Stored in the backbone's own dtype, a row's taps are those of the batch it was first computed in: the same batch gives the same bits,
another batch pads differently, which moves the last bits of float32 and bf16 sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lst_scale import distributed
from lst_scale.backbone.claim import Claim, name_of
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
    joined,
    selected,
)
from lst_scale.distributed import World


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A batch as the cache knows it; equal for equal batches."""

    encoder: tuple[bytes, ...]  # digests, one a row
    decoder: tuple[bytes, ...]
    source_lengths: tuple[int, ...]
    target_lengths: tuple[int, ...]
    width: tuple[int, int]  # S and T


Read = tuple[list[Tensor], list[Tensor]]  # the states of encoder and decoder, each (B, S, D) or (B, T, D), on the CPU


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
        # Rows are stored with the taps of all members of a run; each is given its own.
        self._whole = TapRequest(layers=cache.key.layers, decoder_final=cache.key.decoder_final)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tap-reader")
        self._ahead: tuple[Wanted, Future[Read | None]] | None = None
        self._claim: Claim | None = None
        self.may_write: Callable[[], bool] = lambda: True  # asked at every batch that had to be run

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

    reads_ahead = True

    def prefetch(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, decoder_input_ids_BT: Tensor) -> None:
        """Begin to read the batch that will be asked for next. Nothing but time depends on it: another may be asked for, too."""
        wanted = self._wanted(input_ids_BS, attention_mask_BS, decoder_input_ids_BT)
        if self._ahead is None or self._ahead[0] != wanted:
            self._ahead = wanted, self._reader.submit(self._read, wanted)

    @torch.no_grad()
    def __call__(self, input_ids_BS: Tensor, attention_mask_BS: Tensor, decoder_input_ids_BT: Tensor, request: TapRequest) -> Taps:
        wanted = self._wanted(input_ids_BS, attention_mask_BS, decoder_input_ids_BT)
        found = self._read_now(wanted)
        if found is not None:
            self.rows_read += len(wanted.encoder)
            return selected(self._assemble(found, input_ids_BS, attention_mask_BS, decoder_input_ids_BT), request)
        taps = self.live(input_ids_BS, attention_mask_BS, decoder_input_ids_BT, self._whole)
        self.rows_run += len(wanted.encoder)
        self._write(wanted, taps)
        return selected(taps, request)

    @torch.no_grad()
    def each_target(
        self, input_ids_BS: Tensor, attention_mask_BS: Tensor, targets: Sequence[Tensor], request: TapRequest
    ) -> Iterator[Taps]:
        """Yield the taps of several decoder inputs of one source, which is read, or run, once."""
        read: list[Tensor] | None = None
        live: EncoderState | None = None
        for decoder_input_ids_BT in targets:
            wanted = self._wanted(input_ids_BS, attention_mask_BS, decoder_input_ids_BT)
            found = self._reader.submit(self._read, wanted, read).result()
            if found is not None:
                read = found[0]
                self.rows_read += len(wanted.encoder)
                yield selected(self._assemble(found, input_ids_BS, attention_mask_BS, decoder_input_ids_BT), request)
                continue
            live = live or self.live.encode(input_ids_BS, attention_mask_BS, self._whole)
            taps = joined(live, self.live.decode(decoder_input_ids_BT, live, self._whole))
            self.rows_run += len(wanted.encoder)
            self._write(wanted, taps)
            yield selected(taps, request)

    def claim_rows(self, rows: Sequence[tuple[Tensor, Tensor]], world: World) -> bool:
        """Claim the writing of these rows (source ids and decoder ids, without padding); return whether this run has it.

        All ranks must call it, and all write or none does. A run of one process asks again whenever it had to run a batch: the one that
        writes may have ended.
        """
        claim = Claim(self.cache.folder, name_of(decoder_digest(source, target) for source, target in rows))
        first = distributed.on_main_rank(world, claim.take)
        self.let_others_write()
        self._claim = claim
        self.may_write = claim.take if world.size == 1 else lambda: first
        return first

    @property
    def not_writing_because(self) -> str | None:
        """Why nothing can be written here; None when only another run's claim is in the way."""
        return None if self._claim is None else self._claim.refused

    def let_others_write(self) -> None:
        """Give a claim back; the end of the process does, too."""
        if self._claim is not None:
            self._claim.let_go()

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

    def _read_now(self, wanted: Wanted) -> Read | None:
        """Return the batch that was read ahead if it is this one; read this one otherwise. What failed in the thread is raised here."""
        found = None
        if self._ahead is not None and self._ahead[0] == wanted:
            (_, reading), self._ahead = self._ahead, None
            found = reading.result()
        # What was missing may have been written since.
        return found or self._reader.submit(self._read, wanted).result()

    def _read(self, wanted: Wanted, encoder: list[Tensor] | None = None) -> Read | None:
        """Return a batch, or None when any of it is missing or damaged; nothing is read when something is known to be missing.

        `encoder`: its encoder's states, where they were read before.
        """
        if not self._has(wanted):
            self.cache.refresh()  # another process may have written it since
            if not self._has(wanted):
                return None
        layers = len(self.cache.key.layers)
        encoder = encoder or self._read_stack(wanted.encoder, wanted.source_lengths, wanted.width[0], layers)
        if encoder is None:
            return None
        decoder = self._read_stack(wanted.decoder, wanted.target_lengths, wanted.width[1], layers + self.cache.key.decoder_final)
        return None if decoder is None else (encoder, decoder)

    def _has(self, wanted: Wanted) -> bool:
        return all(digest in self.cache for digest in (*wanted.encoder, *wanted.decoder))

    def _read_stack(self, digests: Sequence[bytes], lengths: Sequence[int], width: int, states: int) -> list[Tensor] | None:
        """Return one stack's states, read straight into batches; padding is zero, which masked attention never sees."""
        shape, pin = (len(digests), width, self.spec.d_model), self.device.type == "cuda"
        batches = [torch.empty(shape, dtype=self.cache.floating, pin_memory=pin) for _ in range(states)]
        for row, (digest, length) in enumerate(zip(digests, lengths, strict=True)):
            if not self.cache.read_into(digest, [batch[row, :length] for batch in batches]):
                return None
            for batch in batches:
                batch[row, length:] = 0
        return batches

    def _write(self, wanted: Wanted, taps: Taps) -> None:
        if not self.may_write():
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

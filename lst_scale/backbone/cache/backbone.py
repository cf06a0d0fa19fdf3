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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lst_scale.backbone.cache.claim import Claim, name_of
from lst_scale.backbone.cache.lazy import LazyBackbone
from lst_scale.backbone.cache.reader import Read, TapReader, Wanted
from lst_scale.backbone.cache.store import TapCache
from lst_scale.backbone.cache.write_lock import WriteLock
from lst_scale.backbone.taps import (
    Backbone,
    BackboneIdentity,
    BackboneSpec,
    FrozenHead,
    Replica,
    SourceState,
    StackTaps,
    TapRequest,
    Taps,
    TargetState,
    joined,
    select,
)
from lst_scale.errors import BackboneError
from lst_scale.inputs.batch import Inputs
from lst_scale.inputs.keys import KeyTable
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
        load: Callable[[], Backbone],
        num_parameters: int,
        embedding_scale: float = 1.0,
    ) -> None:
        self.cache, self.spec, self.identity, self.head = cache, spec, identity, head
        self.weight_source, self.replica, self.num_parameters = weight_source, replica, num_parameters
        self._embedding_VD, self._live = embedding_VD, LazyBackbone(load)
        self._embedding_scale = torch.tensor(embedding_scale).to(embedding_VD.dtype)
        self.rows_read, self.rows_run = 0, 0
        # Rows are stored with the taps of all members of a run; each is given its own.
        key = cache.key
        self._whole = TapRequest(layers=key.layers, target_final=key.decoder_final, source=not key.target_only)
        self._reader = TapReader(cache, pinned=self.device.type == "cuda")
        self.lock = WriteLock()

    @property
    def live(self) -> Backbone:
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

    def after(self, context: Sequence[int]) -> Backbone:
        raise BackboneError("a tap cache remembers what follows one context: give that when it is opened")

    def begun(self, num_rows: int) -> Any:
        return self.live.begun(num_rows)

    def read(self, source_BS: Tensor, source_mask_BS: Tensor, request: TapRequest) -> SourceState:
        return self.live.read(source_BS, source_mask_BS, request)

    def extend(self, target_BT: Tensor, source: SourceState, request: TapRequest, cache: Any | None = None) -> TargetState:
        return self.live.extend(target_BT, source, request, cache)

    reads_ahead = True

    def prefetch(self, inputs: Inputs) -> None:
        """Begin to read the batch that will be asked for next. Nothing but time depends on it: another may be asked for, too."""
        self._reader.prefetch(_wanted(inputs))

    def move(self, device: torch.device) -> None:
        raise BackboneError(f"a tap cache reads to the device of its run, {self.device}, and can't be moved to {device}")

    def facts(self) -> dict[str, Any]:
        """Return how many rows were read and run, once what was written is on the disk."""
        self.cache.flush()
        facts = {"rows_read": self.rows_read, "rows_run": self.rows_run, "backbone_loaded": self.is_loaded}
        return {"cache": facts | {"damaged": self.cache.damaged}}

    def close(self) -> None:
        """Let other runs write to the cache."""
        self.lock.release()

    @torch.no_grad()
    def __call__(self, inputs: Inputs, request: TapRequest) -> Taps:
        found = self._reader.read(_wanted(inputs))
        if found is not None:
            self.rows_read += len(inputs.keys.sources)
            return select(self._assemble(found, inputs), request)
        taps = self.live(inputs, self._whole)
        self._write(inputs, taps)
        return select(taps, request)

    @torch.no_grad()
    def each_target(self, several: Sequence[Inputs], request: TapRequest) -> Iterator[Taps]:
        """Yield the taps of several targets of the same sources, which are read, or run, once."""
        read: list[Tensor] | None = None
        live: SourceState | None = None
        for inputs in several:
            found = self._reader.read_beside(read, _wanted(inputs))
            if found is not None:
                read = found[0]
                self.rows_read += len(inputs.keys.sources)
                yield select(self._assemble(found, inputs), request)
                continue
            live = live or self.live.read(inputs.source_BS, inputs.source_mask_BS, self._whole)
            taps = joined(live, self.live.extend(inputs.target_BT, live, self._whole))
            self._write(inputs, taps)
            yield select(taps, request)

    def claim_rows(self, rows: KeyTable, world: World) -> bool:
        """Claim the writing of these rows; return whether this run has it.

        All ranks must call it, and all write or none does. A run of one process asks again whenever it had to run a batch: the one that
        writes may have ended.
        """
        return self.lock.claim(Claim(self.cache.folder, name_of(rows.targets)), world)

    def known(self, rows: KeyTable) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return of which rows the source's taps are in the cache, or none are kept, and of which rows the target's are."""
        sources = np.ones(len(rows), bool) if self.cache.key.target_only else self.cache.has_each(rows.sources)
        return sources, self.cache.has_each(rows.targets)

    def _write(self, inputs: Inputs, taps: Taps) -> None:
        keys = inputs.keys
        self.rows_run += len(keys.sources)
        if not self.lock.held():
            return
        final = [] if taps.final_BTD is None else [taps.final_BTD]
        for row, (source, target) in enumerate(zip(keys.source_lengths, keys.target_lengths, strict=True)):
            if self._whole.source:
                self.cache.write(keys.sources[row], [tap[row, :source] for tap in taps.source.tensors])
            self.cache.write(keys.targets[row], [tap[row, :target] for tap in (*taps.target.tensors, *final)])

    def _assemble(self, found: Read, inputs: Inputs) -> Taps:
        source, target = ([state.to(self.device, non_blocking=True) for state in states] for states in found)
        final = target.pop() if self.cache.key.decoder_final else None
        layers = self.cache.key.layers
        ids_BS = inputs.source_BS if self._whole.source else inputs.source_BS[:, :0]
        return Taps(
            source=StackTaps(layers=self._whole.of_source.layers, embedding=self._embed(ids_BS), hidden=tuple(source)),
            target=StackTaps(layers=layers, embedding=self._embed(inputs.target_BT), hidden=tuple(target)),
            source_mask_BS=inputs.source_mask_BS,
            final_BTD=final,
        )

    def _embed(self, ids: Tensor) -> Tensor:
        rows = self._embedding_VD[ids]
        return rows if self._embedding_scale == 1 else rows * self._embedding_scale


def _wanted(inputs: Inputs) -> Wanted:
    return Wanted(keys=inputs.keys, width=(inputs.source_BS.shape[1], inputs.target_BT.shape[1]))

"""What DeepSpeed's engine holds for what trains, in bytes a rank. Units below: one float32 copy of all that trains.

Measured through torch's allocator events with one and two processes (DeepSpeed 0.19.8, `tests/test_plan.py` repeats it):

| ZeRO | held all the time | from the first gradient on | at the end |
| --- | --- | --- | --- |
| 0 | weights, two moments | autograd's gradients | these, one flat copy of them for the reduction |
| 1 | weights; master copy and two moments divided | autograd's gradients, a bucket | bucket; gradients divided, or the bucket once more |
| 2 | the same | a bucket, into which autograd's gradients go | the same |
| 3 | bucket, small weights; weights, gradients, master copy and two moments divided | autograd's gradients | two buckets and a share |

A bucket holds all that trains, or LARGEST_BUCKET; in that case gradients that left it wait beside it, divided.
AdamW is fused: its step makes nothing as large as a tensor. At the end of ZeRO-3 one of the two buckets is gloo's own: NCCL needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LARGEST_BUCKET = 4 * 500_000_000  # bytes, as `training/engine.py` sizes it
PERSISTENT = 100_000  # ZeRO-3 keeps parameters below this whole (DeepSpeed's stage3_param_persistence_threshold)


@dataclass(frozen=True, kw_only=True)
class EngineBytes:
    """Bytes of one rank.

    weights: trained weights, as the module reads them.
    state: Adam's moments, master copies, buckets.
    gradients: beyond those that autograd makes, or in their place, once a backward pass has made one.
    takes_gradients: autograd's own are gone as soon as they are made.
    step: where gradients are reduced and the optimizer steps, gradients included.
    """

    weights: int
    state: int
    gradients: int
    takes_gradients: bool = False
    step: int


def engine_bytes(sizes: Sequence[int], *, stage: int, world_size: int) -> EngineBytes:
    """Return what the engine holds for trained parameters of `sizes` elements."""
    copy = 4 * sum(sizes)
    share, bucket = copy // world_size, min(copy, LARGEST_BUCKET)
    if stage == 0:
        return EngineBytes(weights=copy, state=2 * copy, gradients=0, step=2 * copy)
    if stage in (1, 2):
        step = max(bucket + share, 2 * share, 2 * bucket if world_size > 1 else 0)
        waiting = share if bucket < copy else 0
        return EngineBytes(weights=copy, state=3 * share, gradients=bucket + waiting, takes_gradients=stage == 2, step=step)
    small = 4 * sum(size for size in sizes if size <= PERSISTENT)
    weights = small + (copy - small) // world_size
    apart, reduced = (share, bucket // world_size) if world_size > 1 else (0, 0)
    return EngineBytes(weights=weights, state=bucket + 4 * share, gradients=apart, step=max(2 * bucket + reduced, bucket + share))

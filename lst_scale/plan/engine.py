"""What DeepSpeed's engine holds for what trains, in bytes a rank. Units below: one float32 copy of all that trains.

Measured through torch's allocator events with one and two processes (DeepSpeed 0.19.8, `tests/test_plan.py` repeats it):

| ZeRO | held all the time | more in a step |
| --- | --- | --- |
| 0 | weights, two moments | gradients, one flat copy of them for the reduction |
| 1 | weights, bucket; master copy and two moments divided | gradients; a flat copy of them, divided |
| 2 | the same | gradients and a flat copy of them, both divided |
| 3 | bucket, small weights; weights, gradients, master copy and two moments divided | a flat copy of gradients, divided |

AdamW is fused: its step makes nothing as large as a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PERSISTENT = 100_000  # ZeRO-3 keeps parameters below this whole (DeepSpeed's stage3_param_persistence_threshold)


@dataclass(frozen=True, kw_only=True)
class EngineBytes:
    """Bytes of one rank.

    weights: trained weights, as the module reads them.
    state: Adam's moments, master copies, buckets.
    gradients: beyond those that autograd makes, while a backward pass runs.
    step: temporaries of the optimizer step, gradients included.
    """

    weights: int
    state: int
    gradients: int
    step: int


def engine_bytes(sizes: Sequence[int], *, stage: int, world_size: int) -> EngineBytes:
    """Return what the engine holds for trained parameters of `sizes` elements."""
    copy = 4 * sum(sizes)
    share = copy // world_size
    if stage == 0:
        return EngineBytes(weights=copy, state=2 * copy, gradients=0, step=2 * copy)
    if stage in (1, 2):
        apart = share if stage == 2 else copy
        return EngineBytes(weights=copy, state=copy + 3 * share, gradients=apart if world_size > 1 else 0, step=2 * share)
    small = 4 * sum(size for size in sizes if size <= PERSISTENT)
    weights = small + (copy - small) // world_size
    return EngineBytes(weights=weights, state=copy + 4 * share, gradients=share if world_size > 1 else 0, step=share + copy - weights)

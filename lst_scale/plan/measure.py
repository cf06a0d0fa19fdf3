"""What the allocator really held during a step: torch's own events of every allocation on the CPU, kernels' scratch included."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lst_scale.plan.live import nbytes


def peak_bytes(step: Callable[[], None]) -> int:
    """Return the most bytes that tensors took while `step` ran: those that were there before, and those that came and went."""
    gc.collect()
    before = nbytes(found for found in gc.get_objects() if isinstance(found, Tensor) and not found.is_meta)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]" and event.device_type().name == "CPU":
            now += event.nbytes()
            most = max(most, now)
    return before + most

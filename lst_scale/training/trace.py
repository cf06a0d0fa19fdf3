"""`logging.profile_steps`: what torch's profiler sees of some steps, and on CUDA what was in memory when, as files to look at.

RUN/profile/steps-10-13-rank0.trace.json     for chrome://tracing or https://ui.perfetto.dev
RUN/profile/steps-10-13-rank0.memory.pickle  for https://docs.pytorch.org/memory_viz; on CUDA alone
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import set_checkpoint_early_stop

from lst_scale.errors import TrainingError, fence
from lst_scale.system.distributed import World

MEMORY_EVENTS = 1_000_000


class Trace:
    """Records from the first of two steps to the end of the last, or of the run; None: never.

    The profiler sees the whole process: of members that train side by side one records, and the others' work is in its trace.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, world: World, say: Callable[[str], None]) -> None:
        self._steps, self._folder, self._world, self._say = steps, folder / "profile", world, say
        self._profile: profile | None = None
        self._last = 0  # step that is recorded
        self._while_recording = ExitStack()

    def before(self, step: int) -> None:
        """Begin when `step`, counted from 1, is the first to be recorded."""
        if self._steps is None or step != self._steps[0]:
            return
        if torch._C._autograd._profiler_enabled():
            self._say(f"steps {self._steps[0]} to {self._steps[1]} are in the trace of another member")
            return
        on_gpu = self._world.device.type == "cuda"
        if on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        # A side block that runs again ends early by an exception, which a recording allocator loses (torch 2.11 on an H200: SystemError).
        self._while_recording.enter_context(set_checkpoint_early_stop(False))
        self._profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
        self._profile.start()
        self._last = step

    def after(self, step: int) -> None:
        """Write the files when `step` is the last to be recorded."""
        self._last = step
        if self._steps is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write what was recorded so far, where anything was."""
        if self._profile is None or self._steps is None:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()
        self._while_recording.close()
        path = self._folder / f"steps-{self._steps[0]}-{self._last}-rank{self._world.rank}"
        with fence(TrainingError, f"the trace {path} could not be written"):
            self._folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(f"{path}.trace.json")
            if self._world.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(f"{path}.memory.pickle")  # type: ignore[no-untyped-call]
                torch.cuda.memory._record_memory_history(enabled=None)
        self._say(f"steps {self._steps[0]} to {self._last} are traced in {path}.trace.json")

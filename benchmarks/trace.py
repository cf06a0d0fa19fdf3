"""What a trace of `logging.profile_steps` says of the GPU: kernels a step, the share of time it works, where the processor waits for it.

    deepspeed lst_scale/train.py --recipe t5-3b logging.profile_steps='[10, 13]'
    python benchmarks/trace.py RUN/profile/steps-10-13-rank0.trace.json --steps 4

A span is from the first kernel's start to the last one's end; idle is the part of it in which no kernel and no copy ran.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def busy(events: list[dict[str, Any]]) -> float:
    """Return how many microseconds at least one of the events covers."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--steps", type=int, required=True, help="how many steps were traced")
    parser.add_argument("--top", type=int, default=8, help="how many kernels to list")
    options = parser.parse_args()
    events = [event for event in json.loads(options.trace.read_text())["traceEvents"] if event.get("ph") == "X"]
    on_gpu = [event for event in events if event.get("cat") in ON_GPU]
    if not on_gpu:
        parser.error(f"{options.trace} holds no GPU kernel: it is of a run on the CPU")
    span = max(e["ts"] + e["dur"] for e in on_gpu) - min(e["ts"] for e in on_gpu)
    kernels = [event for event in on_gpu if event["cat"] == "kernel"]
    waits = Counter(event["name"] for event in events if event["name"] in WAITS)
    waited = sum(event["dur"] for event in events if event["name"] in WAITS)
    idle = 1 - busy(on_gpu) / span
    print(f"{span / options.steps / 1e3:.1f} ms a step, of them {idle:.0%} idle; {len(kernels) / options.steps:.0f} kernels")
    said = ", ".join(f"{name} {count / options.steps:g}" for name, count in waits.items()) or "no waits"
    print(f"waits a step: {said}; {waited / options.steps / 1e3:.1f} ms of them")
    times: Counter[str] = Counter()
    for event in on_gpu:
        times[event["name"][:100]] += event["dur"]
    for name, time in times.most_common(options.top):
        print(f"{time / options.steps / 1e3:8.2f} ms a step  {name}")


if __name__ == "__main__":
    main()

"""What remembering and sharing the backbone's pass is worth: one training step of each way, side by side, each in a process of its own.

    python benchmarks/make_checkpoint.py google-t5/t5-base /tmp/t5-base
    python benchmarks/reuse.py /tmp/t5-base --layers 1,2,3,5,6,7,9,10,11

A case is WAY:PRECISION. Of the ladder:

    lst              live: the backbone's forward pass, then the side network's step
    lst-cached       taps from disk, three rows: the epoch that writes them, live; cold and warm page cache
    members          --members side networks on one live pass; members-cached: on taps from disk (warm)
    forward, side    the two parts of lst: the backbone alone, and the side network on taps in memory
    loop, stacked    --members side networks on taps in memory, forward and backward, no dropout, nothing recomputed: one after another, or
                     as one network with a further dimension (torch.func)
    ...-plain        nothing recomputed in the backward pass, as in LoRA: method.recompute=false

and of its rivals, inside the backbone: full, lora, and any with -checkpointed. Cold: after fsync the cache's files are dropped from the
page cache (posix_fadvise, POSIX_FADV_DONTNEED); the bytes that came from the disk are counted, to see that they did. A step is forward,
backward and AdamW on the next of --batches different batches of full rows; an epoch is all of them once. All cases run --rounds times in
turn and medians are taken. Columns: seconds a step; seconds of processor time, all threads; the same for one side network, over one live
step, and LoRA's over it (on a GPU these three are of the wall clock; on a CPU of the processor's, which other jobs move less). Weights may
be random.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from reuse_ways import CACHED, LADDERS, TOGETHER, WAYS, Step, ladder_step, make_batches, open_backbone, rival_step, stacked_step

ROOT = Path(__file__).resolve().parents[1]

DEFAULT = ("forward", "side", "lst", "lst-cached", "members", "members-cached", "lora", "lora-checkpointed", "full")


class Clock:
    """Seconds of wall clock and of processor time of each thing done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.wall: list[float] = []
        self.processor: list[float] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self._synchronize()
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self._synchronize()
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def drop_from_page_cache(folder: Path) -> None:
    """Make the next read of every file below come from the disk. Dirty pages stay, so they are written first."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def bytes_from_disk() -> int:
    """Return how many bytes this process has had the system read from a disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def measure(options: argparse.Namespace, case: str, folder: Path) -> list[dict[str, Any]]:
    """Run one case in this process."""
    way, precision = case.split(":")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    batches = make_batches(options, device)
    ladder = way.removesuffix("-plain")
    if ladder not in LADDERS:
        step = rival_step(options, way, precision, device, batches)
    else:
        backbone = open_backbone(options, ladder, precision, folder)
        if ladder == "stacked":
            step = stacked_step(options, precision, backbone, batches)
        else:
            step = ladder_step(options, ladder, precision, backbone, batches, plain=ladder != way)
        if ladder in CACHED:
            return measure_cached(options, case, step, backbone, folder, options.batches)
    clock = Clock(device)
    for number in range(options.warmup + options.repeat):
        with clock.running():
            step(number % options.batches)
    wall, processor = (statistics.median(times[options.warmup :]) for times in (clock.wall, clock.processor))
    return [record(options, case, wall, processor)]


def measure_cached(
    options: argparse.Namespace, case: str, step: Step, backbone: Any, folder: Path, num_batches: int
) -> list[dict[str, Any]]:
    """Measure whole epochs: the one that writes, and those that read."""
    clock = Clock(backbone.device)

    def epoch() -> None:
        with clock.running():
            for number in range(num_batches):
                step(number)

    step(num_batches)  # loads the live backbone and warms up, which are no part of the first epoch
    epoch()
    backbone.cache.flush()
    backbone.unload()
    found = [record(options, f"{case}, first epoch, writes", clock.wall[0] / num_batches, clock.processor[0] / num_batches)]
    epoch()  # warms up
    for name in ("cold", "warm"):
        before, clock = 0, Clock(backbone.device)
        for _ in range(options.epochs):
            if name == "cold":
                drop_from_page_cache(folder)
            start = bytes_from_disk()
            epoch()
            before += bytes_from_disk() - start
        wall, processor = (statistics.median(times) / num_batches for times in (clock.wall, clock.processor))
        stored = sum(path.stat().st_size for path in folder.rglob("*.taps"))
        facts = {"stored_bytes": stored, "bytes_from_disk_an_epoch": before // options.epochs}
        found.append(record(options, f"{case}, {name}", wall, processor) | facts)
    assert backbone.rows_run == (num_batches + 1) * options.batch and not backbone.cache.damaged, "a row that was written was not read"
    return found


def record(options: argparse.Namespace, name: str, wall: float, processor: float) -> dict[str, Any]:
    way = name.partition(":")[0]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    networks = options.members if way.removesuffix("-plain") in TOGETHER else 1
    return {"case": name, "seconds": wall, "processor_seconds": processor, "networks": networks, "device": device}


def medians(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the rounds of each case."""
    rounds: dict[str, list[dict[str, Any]]] = {}
    for each in records:
        rounds.setdefault(each["case"], []).append(each)
    joined = []
    for group in rounds.values():
        good = [each for each in group if "seconds" in each]
        joined.append(
            group[0] if not good else good[0] | {key: statistics.median(r[key] for r in good) for key in ("seconds", "processor_seconds")}
        )
    return joined


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as a Markdown table."""

    def of_one(name: str) -> float | None:
        return next((r[clock] for r in records if clock in r and r["case"].partition(":")[0] == name), None)

    clock = "processor_seconds" if records[0].get("device") == "cpu" else "seconds"
    lora, live = of_one("lora"), of_one("lst")
    lines = ["| case | s a step | processor s a step | of one side network | over lst | faster than LoRA |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for r in records:
        if "error" in r:
            lines.append(f"| {r['case']} | {r['error']} | | | | |")
            continue
        each = r[clock] / r["networks"]
        faster, over = f"{lora / each:.1f}x" if lora else "-", f"{each / live:.2f}" if live else "-"
        lines.append(f"| {r['case']} | {r['seconds']:.3f} | {r['processor_seconds']:.3f} | {each:.3f} | {over} | {faster} |")
    return "\n".join(lines)


def run_alone(case: str, tree: Path | None = None) -> list[dict[str, Any]]:
    """Run one case in a process of its own, perhaps with another tree's package and script."""
    script, arguments = sys.argv[0], without_against(sys.argv[1:])
    environment = dict(os.environ)
    if tree:
        script, environment["PYTHONPATH"] = str(tree / "benchmarks/reuse.py"), str(tree)
    command = [sys.executable, script, *arguments, "--one", case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[{")]
    failure = done.stderr.strip().splitlines()[-1:] or ["failed"]
    found = json.loads(lines[-1]) if done.returncode == 0 and lines else [{"case": case, "error": failure[0][:100]}]
    for each in found:
        print(json.dumps(each), file=sys.stderr, flush=True)
    return found


def without_against(arguments: list[str]) -> list[str]:
    """Return the arguments less `--against TREE`, which older scripts do not know."""
    place = arguments.index("--against") if "--against" in arguments else len(arguments)
    return arguments[:place] + arguments[place + 2 :]


def compared(options: argparse.Namespace) -> str:
    """Run each case on this tree and on another in turns, and return the least processor seconds of both as a Markdown table."""
    least: dict[str, dict[Path, float]] = {}
    for number in range(options.rounds):
        trees = [options.against, ROOT]
        for case in options.cases:
            for tree in trees if number % 2 else reversed(trees):
                for found in run_alone(case, tree.resolve()):
                    seconds = least.setdefault(found["case"], {})
                    seconds[tree] = min(seconds.get(tree, math.inf), found.get("processor_seconds", math.inf))
    lines = ["| case | processor s a step before | now | now / before |", "| --- | --- | --- | --- |"]
    for case, seconds in least.items():
        before, now = seconds.get(options.against, math.inf), seconds.get(ROOT, math.inf)
        lines.append(f"| {case} | {before:.3f} | {now:.3f} | {now / before:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--cases", nargs="+", default=[f"{way}:fp32" for way in DEFAULT])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--source", type=int, default=128)
    parser.add_argument("--target", type=int, default=8)
    parser.add_argument("--layers", default="all", help="side layers, such as 1,3,5 (default: all)")
    parser.add_argument("--reduction-factor", type=int, default=8)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--cache-dtype", default="bf16", choices=("bf16", "fp32", "int8"))
    parser.add_argument("--batches", type=int, default=4, help="different batches; the cached ways take each once an epoch")
    parser.add_argument("--epochs", type=int, default=3, help="cold and warm ones")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="where taps are stored for a while: on a disk, not in memory (default: the temporary folder)"
    )
    parser.add_argument("--json", type=Path, help="also write the records of all rounds here")
    parser.add_argument("--against", type=Path, metavar="TREE", help="compare with another source tree, in turns: the least of all rounds")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    wrong = [case for case in options.cases if case.partition(":")[0] not in WAYS]
    if wrong:
        parser.error(f"{wrong[0]}: write WAY:PRECISION with WAY one of {', '.join(WAYS)}")
    if options.one:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            print(json.dumps(measure(options, options.one, Path(folder))))
        return
    if options.against:
        print(compared(options))
        return
    records = [each for case in options.cases * options.rounds for each in run_alone(case)]
    sizes = (
        f"batch {options.batch}, source {options.source}, target {options.target}, layers {options.layers}, r {options.reduction_factor}"
    )
    print(
        f"{records[0].get('device', '')}, {torch.get_num_threads()} threads, torch {torch.__version__}, {sizes}, taps {options.cache_dtype}"
    )
    print(table(medians(records)))
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What rows cost a rank: peak memory and seconds to the first step, of many short rows beside few, at the first and the second start.

    python benchmarks/rows.py --rows 400000
    python benchmarks/rows.py --rows 400000 --tree ../before      # another source tree on the same rows

Rows have 25 words. A run is one step on the embedded backbone and one evaluation of 100 rows, as a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMON = "the of a to in is that it was for on are as with they be at one have this from by hot word but what some we can out"
ROOT = Path(__file__).resolve().parent.parent
FEW = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--tree", type=Path, default=ROOT, help="a source tree of lst_scale")
    parser.add_argument("--starts", type=int, default=2, help="how often the many rows are started on")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {count: make_rows(folder / f"rows-{count}.csv", count) for count in (FEW, options.rows)}
        held_out = make_rows(folder / "held-out.csv", 100)
        few = start(options.tree, folder, files[FEW], held_out, options.overrides)
        print(f"{FEW:>9,} rows: {few}", flush=True)
        for number in range(1, options.starts + 1):
            found = start(options.tree, folder, files[options.rows], held_out, options.overrides)
            above = (found["peak_mb"] - few["peak_mb"]) if "peak_mb" in found else None
            print(f"{options.rows:>9,} rows, start {number}: {found}, peak above {FEW} rows: {above:.0f} MB", flush=True)


def make_rows(path: Path, count: int) -> Path:
    draw = random.Random(count)
    with path.open("w") as file:
        file.write("text,label\n")
        for number in range(count):
            file.write(f"{' '.join(draw.choices(COMMON.split(), k=24))} {number},{number % 3}\n")
    return path


def start(tree: Path, folder: Path, train: Path, held_out: Path, overrides: list[str]) -> dict[str, float]:
    """Run one step; return the run's peak resident memory, its seconds from the command to the first step's end, and in all."""
    fields = {"kind": "classification", "train": str(train), "validation": str(held_out), "source": ["text"], "target": "label"}
    command = [sys.executable, "-m", "lst_scale.train", "--recipe", "quickstart", "--overwrite", f"task={json.dumps(fields)}"]
    command += [f"output_dir={folder / 'runs'}", "name=rows", "training.max_steps=1", "evaluation.method=likelihood", *overrides]
    environment = os.environ | {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(folder / "cache")}
    began, first_step = time.perf_counter(), None
    process = subprocess.Popen(command, cwd=tree, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if first_step is None and line.startswith("step 1:"):
            first_step = time.perf_counter() - began
    _, status, usage = os.wait4(process.pid, 0)
    if status or first_step is None:
        raise SystemExit("".join(lines[-20:]))
    return {
        "peak_mb": round(usage.ru_maxrss / 1024),
        "seconds_to_first_step": round(first_step, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }


if __name__ == "__main__":
    main()

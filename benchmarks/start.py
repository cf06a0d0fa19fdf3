"""Processor time from a command to the end of its first training step, of this tree and of others, in turns.

    git worktree add /tmp/before e38b8a0
    python benchmarks/start.py . /tmp/before
    python benchmarks/start.py . --runs 9 --recipe quickstart

The backbone is the embedded one and the data are few rows, so that nearly all of it is starting: imports, data, engine. The time is the
process's own user and system time at the moment when the first step stands in metrics.jsonl. Runs of the trees alternate, and the least
of each counts: whatever else the machine does only adds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SMALL = (
    "training.max_steps=1",
    "training.global_batch_size=4",
    "data.max_train_rows=8",
    "data.max_eval_rows=2",
    "logging.log_every_steps=1",
)


def seconds_to_first_step(tree: Path, recipe: str) -> float:
    """Return the processor seconds that `lst_scale.train` of a source tree takes until its first step is done."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lst_scale.train", "--recipe", recipe, *SMALL, f"output_dir={folder}", "name=start"]
        environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        with subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            while not any('"train"' in path.read_text() for path in Path(folder).glob("*/metrics.jsonl")):
                if process.poll() is not None:
                    raise SystemExit(f"{tree}: {process.stderr.read() if process.stderr else ''}")
                time.sleep(0.005)
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            process.kill()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--recipe", default="quickstart")
    options = parser.parse_args()
    trees = [tree.resolve() for tree in options.trees]
    seconds: dict[Path, list[float]] = {tree: [] for tree in trees}
    for tree in trees:
        seconds_to_first_step(tree, options.recipe)  # files come into memory, bytecode is written
    for _ in range(options.runs):
        for tree in trees:
            seconds[tree].append(seconds_to_first_step(tree, options.recipe))
    first = min(seconds[trees[0]])
    print("| tree | least, s | median, s | the first tree's share |\n| --- | --- | --- | --- |")
    for tree, found in seconds.items():
        print(f"| {tree} | {min(found):.2f} | {statistics.median(found):.2f} | {first / min(found):.2f} |")


if __name__ == "__main__":
    main()

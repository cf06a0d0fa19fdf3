"""`predict` on many rows: does memory grow with the file, and does a prediction that was killed end as one that was not?

    python benchmarks/predict_rows.py --rows 400000

Trains the embedded backbone for a few steps on two labels, then predicts the rows (12 words each): a thousand rows, all of them, and all of
them again with SIGKILL at a random moment and --resume. Says rows a second, peak resident memory of each and whether the answers are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rows import COMMON, ROOT


def make_file(path: Path, count: int) -> Path:
    draw = random.Random(count)
    with path.open("w") as file:
        file.write("text,label\n")
        for number in range(count):
            file.write(f"{' '.join(draw.choices(COMMON.split(), k=11))} {number},{'person' if number % 2 else 'artifact'}\n")
    return path


def train(folder: Path) -> Path:
    rows = make_file(folder / "train.csv", 400)
    fields = {"kind": "classification", "train": str(rows), "validation": str(rows), "source": ["text"], "target": "label"}
    command = [sys.executable, "-m", "lst_scale.train", "--recipe", "quickstart", f"task={json.dumps(fields)}", "name=many"]
    command += [f"output_dir={folder / 'runs'}", "training.max_steps=10", "data.max_eval_rows=40", "evaluation.method=likelihood"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    (run,) = (folder / "runs").glob("many-*")
    return run


def predict(run: Path, inputs: Path, output: Path, *more: str, kill_after: float | None = None) -> tuple[float, float]:
    """Return seconds and peak resident MB of one prediction, which is killed after so many seconds if asked."""
    command = [sys.executable, "-m", "lst_scale", "predict", str(run), str(inputs), "--output", str(output), *more]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if kill_after is not None:
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    assert kill_after is not None or status == 0, said[-2000:]
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while some := file.read(1 << 20):
            found.update(some)
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=0, help="of the moment of the kill")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = train(folder)
        few, many = make_file(folder / "few.csv", 1000), make_file(folder / "many.csv", options.rows)
        seconds, memory = predict(run, few, folder / "few.jsonl")
        print(f"{1000:>9,} rows: {seconds:.1f} s, peak {memory:.0f} MB", flush=True)
        whole, above = predict(run, many, folder / "whole.jsonl")
        print(f"{options.rows:>9,} rows: {whole:.1f} s, peak {above:.0f} MB, {above - memory:+.0f} MB", flush=True)
        moment = random.Random(options.seed).uniform(0.3, 0.8) * whole
        predict(run, many, folder / "killed.jsonl", kill_after=moment)
        rest, above = predict(run, many, folder / "killed.jsonl", "--resume")
        equal = digest(folder / "whole.jsonl") == digest(folder / "killed.jsonl")
        print(f"killed after {moment:.0f} s, resumed for {rest:.1f} s, peak {above:.0f} MB: answers {'equal' if equal else 'DIFFER'}")


if __name__ == "__main__":
    main()

"""Kill runs at random moments, resume them, and compare their final weights, bit for bit, with those of a run left alone.

    python benchmarks/kills.py [--kills 50] [--interrupts 10] [--seed 0] [--kinds plain cache members]

Runs of three kinds take turns: plain ones that save at every step, ones that fill a tap cache, and members of one recipe that share
passes. Every few kills a run is let go to its end and compared, and two of the finished ones are scored as an ensemble that is killed,
too. Each start is a process forked from this one, which has imported everything and run nothing. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import yaml
from safetensors.torch import load_file

from lst_scale import train
from lst_scale.inference import ensemble, predict
from lst_scale.training import loop, run

FORK = multiprocessing.get_context("fork")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cache": {"cache": {"enabled": True, "dtype": "fp32"}},
    "members": {"members": ["optimizer.learning_rate=1e-2", "optimizer.learning_rate=2e-2"]},
}


def write_recipe(folder: Path, name: str, kind: str) -> Path:
    tree = yaml.safe_load((Path(sys.path[0]) / "recipes" / "quickstart.yaml").read_text())
    tree |= {"name": name, "output_dir": str(folder / "runs"), "logging": {"log_every_steps": 1}} | KINDS[kind]
    tree["training"] |= {"epochs": 4, "global_batch_size": 8, "micro_batch_size": 4, "save_every_steps": 1, "evaluate_every": 5}
    tree["data"] = tree.get("data", {}) | {"max_train_rows": 40, "max_eval_rows": 8}
    tree["evaluation"] = {"method": "likelihood", "batch_size": 4}
    if kind == "cache":
        tree["cache"]["folder"] = str(folder / f"taps-{name}")
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(action: Callable[[], Any], log: Path) -> Any:
    """Fork a process that carries out `action` in a session of its own."""

    def body() -> None:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)
        status = action()
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 0)

    process = FORK.Process(target=body)
    process.start()
    return process


def strike(process: Any, number: int, after: float) -> bool:
    """Send a signal after a while and wait for the end; whether it was still running."""
    process.join(after)
    alive = process.exitcode is None
    if alive:
        os.kill(process.pid, number)
    process.join()
    return alive


def weights_of(folder: Path, name: str) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for path in sorted((folder / "runs").glob(f"{name}-*/result.json")):
        newest = max((path.parent / "checkpoints").glob("step-*"))
        found[path.parent.name.removeprefix(name)] = load_file(newest / "weights.safetensors")
    return found


def same(found: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[run_name][name], tensor) for run_name, tensors in expected.items() for name, tensor in tensors.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--interrupts", type=int, default=10)
    parser.add_argument("--each", type=int, default=5, help="signals a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="of runs")
    options = parser.parse_args()
    assert loop and predict and run  # imported once, for all forks
    draw, began = random.Random(options.seed), time.monotonic()
    signals = [signal.SIGKILL] * options.kills + [signal.SIGINT] * options.interrupts
    draw.shuffle(signals)
    told = {"SIGKILL": 0, "SIGINT": 0, "too late": 0, "runs": 0, "identical": 0, "ensembles": 0, "tracebacks": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "log.txt"
        expected, seconds = {}, {}
        for kind in options.kinds:
            whole = write_recipe(folder, f"whole-{kind}", kind)
            start_time = time.monotonic()
            process = start(lambda path=whole: train.main(["--recipe", str(path)]), log)  # type: ignore[misc]
            process.join()
            assert process.exitcode == 0, log.read_text()[-3000:]
            seconds[kind] = time.monotonic() - start_time
            expected[kind] = weights_of(folder, f"whole-{kind}")
        while signals:
            kind = options.kinds[told["runs"] % len(options.kinds)]
            victim = write_recipe(folder, f"victim{told['runs']}-{kind}", kind)
            again = lambda path=victim: train.main(["--recipe", str(path), "--resume"])  # noqa: E731
            for _ in range(min(options.each, len(signals))):
                number = signals.pop()
                alive = strike(start(again, log), number, draw.uniform(0.05, 0.5) * seconds[kind])
                told[signal.Signals(number).name if alive else "too late"] += 1
                if not alive:  # the run is at its end: the signal is for the next one
                    signals.append(number)
                    break
            process = start(again, log)
            process.join()
            told["runs"] += 1
            told["identical"] += process.exitcode == 0 and same(weights_of(folder, victim.stem), expected[kind])
            if kind == "members" and signals:
                runs = [path.parent for path in (folder / "runs").glob(f"{victim.stem}-*/result.json")]
                together = lambda runs=runs: ensemble.score_together(runs, "both", overwrite=True) and 0  # noqa: E731
                number = signals.pop()
                alive = strike(start(together, log), number, draw.uniform(0.5, 3.0))
                told[signal.Signals(number).name if alive else "too late"] += 1
                process = start(together, log)
                process.join()
                told["ensembles"] += process.exitcode == 0
        told["tracebacks"] = log.read_text().count("Traceback")
    print(json.dumps(told | {"seconds": round(time.monotonic() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()

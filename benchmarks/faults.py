"""What hostile use and first contact met, done to two trees of this project side by side: what each of them answers.

    git worktree add --detach /tmp/old e38b8a0
    python benchmarks/faults.py /tmp/old .            [--only A4 B9]

A case (benchmarks/fault_cases.py) does what a user did, by the real commands, on small files and a copy of the embedded backbone, and says
what would be right. A tree's answer to it is "holds" or what was seen instead: a traceback, success without a word, a message that does
not say what is wrong, something left behind or destroyed, no end in its time. The last column names the test that keeps the case.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LIMIT = 90  # seconds, after which a command is taken to have no end


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a command ended and what it said."""

    status: int | None  # None: it was still running at the limit
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err

    @property
    def refused(self) -> bool:
        """Whether it ended with one line about a mistake."""
        return self.status not in (0, None) and not self.has_traceback and "error:" in self.said

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.said

    @property
    def kind(self) -> str:
        if self.status is None:
            return "no end"
        if self.has_traceback:
            return "traceback"
        return "succeeds, says nothing of it" if self.status == 0 else "refused, unclear"


class Place:
    """A folder for one case on one tree, and commands of that tree."""

    def __init__(self, tree: Path, folder: Path, runs: Path) -> None:
        self.tree, self.folder, self.finished = tree, folder, runs
        self.embedded = tree / "lst_scale" / "embedded" / "tiny-t5"
        self.new = (tree / "lst_scale" / "cli").is_dir()
        for name in ("train", "validation"):
            self.write(f"{name}.csv", "text,label\n" + "".join(f"word number {n},{'artifact' if n % 2 else 'person'}\n" for n in range(12)))

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def recipe(self, **changes: Any) -> Path:
        """Write a small recipe: two steps of four rows. `a__b=value` sets a.b."""
        tree: dict[str, Any] = {
            "name": "case",
            "output_dir": str(self.folder / "runs"),
            "task": {
                "name": "t",
                "kind": "classification",
                "train": str(self.folder / "train.csv"),
                "validation": str(self.folder / "validation.csv"),
                "source": ["text"],
                "target": "label",
            },
            "backbone": {"checkpoint": str(self.embedded), "precision": "fp32"},
            "method": {"name": "lst", "reduction_factor": 4, "side_layers": [0]},
            "training": {"max_steps": 2, "global_batch_size": 4, "deepspeed": "zero0"},
            "evaluation": {"method": "likelihood"},
            "data": {"max_source_length": 16},
        }
        for dotted, value in changes.items():
            *parents, last = dotted.split("__")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        return self.write("recipe.yaml", yaml.safe_dump(tree, allow_unicode=True))

    def checkpoint(self, name: str = "checkpoint") -> Path:
        """Return a copy of the embedded backbone that may be spoiled."""
        return Path(shutil.copytree(self.embedded, self.folder / name))

    def run_copy(self, name: str = "base") -> Path:
        """Return a copy of a finished run that may be spoiled; its recipe writes where the copy is."""
        (run,) = self.finished.glob(f"{name}-*")
        copy = Path(shutil.copytree(run, self.folder / "runs" / run.name, symlinks=True))
        recipe = copy / "recipe.yaml"
        recipe.write_text(re.sub(r"(?m)^output_dir: .*$", f"output_dir: {self.folder / 'runs'}", recipe.read_text()))
        return copy

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        known = os.environ | {"PYTHONPATH": str(self.tree), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        known |= {"XDG_CACHE_HOME": str(self.folder / "cache"), "COLUMNS": "200", "NO_COLOR": "1"} | environment
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env=known,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def python(self, *command: str, limit: float = LIMIT, **environment: str) -> Done:
        process = self.start(*command, **environment)
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            return Done(status=None, out=out, err=err)
        return Done(status=process.returncode, out=out, err=err)

    def train(self, *arguments: str, **options: Any) -> Done:
        """`python -m lst_scale.train --recipe recipe.yaml ...`"""
        return self.python("-m", "lst_scale.train", "--recipe", str(self.folder / "recipe.yaml"), *arguments, **options)

    def tool(self, *arguments: str, **options: Any) -> Done:
        """`lst-scale ...`"""
        return self.python("-m", "lst_scale" if self.new else "lst_scale.cli", *arguments, **options)

    def wait_for(self, seen: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        until = time.monotonic() + LIMIT
        while not seen() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing that somebody did: `run` returns "holds" or what was seen instead."""

    id: str
    what: str
    run: Callable[[Place], str]
    test: str


def answer(case: Case, tree: Path, runs: Path) -> str:
    with tempfile.TemporaryDirectory(prefix="fault-", ignore_cleanup_errors=True) as folder:
        try:
            found = case.run(Place(tree, Path(folder), runs))
        except Exception as error:  # the case itself could not be done on this tree
            found = f"case failed: {type(error).__name__}: {error}"[:120]
    print(f"{tree} {case.id}: {found}", file=sys.stderr, flush=True)
    return found


def finished_runs(tree: Path, folder: Path) -> Path:
    """Train two runs that cases spoil copies of."""
    place = Place(tree, folder, folder)
    for name in ("base", "other"):
        place.recipe(name=name)
        done = place.train("seed=1" if name == "other" else "seed=0")
        assert done.status == 0, done.said[-2000:]
    return folder / "runs"


def main() -> None:
    from fault_cases import CASES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, nargs="+", help="checkouts of this project")
    parser.add_argument("--only", nargs="+", default=[], help="numbers of cases, or beginnings of them")
    parser.add_argument("--at-once", type=int, default=2, help="commands that run beside each other")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored, and what it starts too
    cases = [case for case in CASES if not options.only or case.id.startswith(tuple(options.only))]
    answers: list[Sequence[str]] = []
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder, ThreadPoolExecutor(options.at_once) as pool:
        for number, tree in enumerate(path.resolve() for path in options.trees):
            (Path(folder) / str(number)).mkdir()
            runs = finished_runs(tree, Path(folder) / str(number))
            answers.append(list(pool.map(lambda case, tree=tree, runs=runs: answer(case, tree, runs), cases)))
            print(f"{tree}: {answers[-1].count('holds')} of {len(cases)} hold", file=sys.stderr, flush=True)
    print("| case | what was done | " + " | ".join(str(tree) for tree in options.trees) + " | kept by |")
    print("| --- " * (3 + len(answers)) + "|")
    for number, case in enumerate(cases):
        what = html.escape(case.what, quote=False)
        print(f"| {case.id} | {what} | " + " | ".join(found[number] for found in answers) + f" | {case.test} |")


if __name__ == "__main__":
    main()

"""Where a case of benchmarks/faults.py is done: a folder, the commands of a tree, and how they end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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

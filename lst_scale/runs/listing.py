"""What is in a folder of runs: what each is, where it ran, how far it came, what it scored. Reads files alone, and imports no torch.

Whatever can't be read is told as the state of that run; the others are listed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lst_scale.errors import ArgumentError, LstScaleError, RecipeError, fence
from lst_scale.recipe import decode
from lst_scale.runs.finished import read_finished
from lst_scale.runs.folder import METRICS, RECIPE, RESULT, holds_training
from lst_scale.runs.lock import LOCK
from lst_scale.runs.logs import LOG

END = 1 << 16  # bytes of a file's end that are looked at
DONE, RUNNING, STOPPED, FAILED, NEW, DAMAGED = "done", "running", "stopped", "failed", "new", "damaged"


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One run. `state` is done, running, stopped (--resume goes on), failed (`why` tells), new (no step kept yet) or damaged."""

    run: Path
    state: str
    recipe: str | None = None  # its name
    method: str | None = None
    task: str | None = None
    backbone: str | None = None
    score: float | None = None  # of the result
    validation_score: float | None = None  # the newest, of a run that has no result
    step: int | None = None
    total_steps: int | None = None
    where: str | None = None  # device and number of processes, of a finished run
    finished: str | None = None  # when
    why: str = ""


def list_runs(folder: Path) -> list[Listed]:
    """Return the runs in `folder`, at any depth, by name.

    Raises:
        ArgumentError: there are none.
    """
    if not folder.is_dir():
        raise ArgumentError(f"there is no folder {folder}: give the output_dir of your recipes")
    found = sorted({path.parent for name in (RECIPE, RESULT) for path in folder.rglob(name)})
    listed = [one for one in map(_listed, found) if one is not None]
    if not listed:
        raise ArgumentError(f"no run in {folder}: give the output_dir of your recipes")
    return listed


def _listed(run: Path) -> Listed | None:
    """Return one run; None: what stands there is none."""
    try:
        recipe = _recipe(run / RECIPE)
    except LstScaleError as error:
        return Listed(run=run, state=DAMAGED, why=str(error)) if (run / METRICS).exists() or (run / RESULT).exists() else None
    known = {"run": run} | recipe
    if (run / RESULT).exists():
        return _finished(run, known)
    numbers = list(_last_numbers(run / METRICS))
    last: dict[str, dict[str, Any]] = {line["kind"]: line for line in numbers if line.get("kind") in ("train", "validation")}
    state, why = _unfinished(run)
    steps = [step for line in last.values() if (step := _count(line.get("step"))) is not None]
    return Listed(
        **known,
        state=state,
        why=why,
        step=max(steps, default=None),
        total_steps=_total_steps(run / METRICS),
        validation_score=_number(last.get("validation", {}).get("score")),
    )


def _recipe(path: Path) -> dict[str, Any]:
    """Return what a run's recipe, of whatever version, says of it; nothing where there is none, as beside results that were copied."""
    if not path.exists():
        return {}
    with fence(RecipeError, str(path)):
        tree, _ = decode.read_yaml(path.read_text(encoding="utf-8"), str(path))
        tasks = tree.get("tasks") or [tree["task"]]
        named = [task["name"] if isinstance(task, dict) else task for task in tasks]
        said = {
            "recipe": tree["name"],
            "method": tree["method"]["name"],
            "task": "-".join(map(str, named)),
            "backbone": tree["backbone"]["checkpoint"],
        }
        return {name: value if isinstance(value, str) else None for name, value in said.items()}


def _finished(run: Path, known: dict[str, Any]) -> Listed:
    try:
        result = read_finished(run)
        with fence(ArgumentError, str(run / RESULT)):
            tree = json.loads((run / RESULT).read_bytes())
    except LstScaleError as error:
        return Listed(**known, state=DAMAGED, why=str(error))
    size = _count(tree.get("world_size"))
    device = tree.get("device") if isinstance(tree.get("device"), str) else None
    said = {"recipe": result.name, "method": result.method, "task": result.task, "backbone": result.model}
    finished = tree.get("finished")
    return Listed(
        **said | {name: value for name, value in known.items() if value is not None},
        state=DONE,
        score=result.score,
        step=_count(tree.get("steps")),
        total_steps=_count(tree.get("steps")),
        where=f"{size} x {device}" if size and device else device,
        finished=finished if isinstance(finished, str) else None,
    )


def _unfinished(run: Path) -> tuple[str, str]:
    if _is_held(run / LOCK):
        return RUNNING, ""
    last = next((line for line in reversed(_end_of(run / LOG).splitlines()) if line.strip()), "")
    said = last[len("2026-01-01 00:00:00 ") :]
    if said.startswith("failed:"):
        return FAILED, said.removeprefix("failed:").strip()
    return (STOPPED, "--resume goes on") if holds_training(run) else (NEW, "")


def _is_held(lock: Path) -> bool:
    """Whether a process works in the folder; for a moment nobody else gets in, and they try again."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no locks here
    finally:
        os.close(descriptor)
    return False


def _end_of(path: Path) -> str:
    """Return the last part of a file as text; nothing where it can't be read."""
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - END))
                return file.read().decode(errors="replace")
    return ""


def _last_numbers(path: Path) -> Iterator[dict[str, Any]]:
    return _objects(_end_of(path))


def _total_steps(path: Path) -> int | None:
    """Return how many steps there are to take, which a run writes down before the first."""
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                plans = (line for line in _objects(file.read(END).decode(errors="replace")) if line.get("kind") == "plan")
                return next((_count(plan.get("total_steps")) for plan in plans), None)
    return None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None

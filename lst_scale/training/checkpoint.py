"""Training checkpoints: whole, small, and free of the world they were written in.

    checkpoints/step-00000120/
        weights.safetensors    the side network, float32, whole
        moments.safetensors    Adam's moments, float32, whole
        state.json             where training was, which run it belongs to, a SHA-256 of the other two, and one of all that

The backbone is never in it. A checkpoint is written under a temporary name, flushed, renamed, and read back: a directory called
step-* either matches its digests or is reported as broken and passed over. Nothing is pickled, so nothing can run on loading.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lst_scale.errors import CheckpointError, fence
from lst_scale.system.durable import sha256_of, write_directory, write_file, writing
from lst_scale.training.engine import MOMENTS as MOMENT_NAMES
from lst_scale.training.engine import Snapshot

FORMAT = 2  # 1 had no digest of the state itself; it is read, too
TRAINING_ROWS = "training_rows"  # in an identity: what the rows are of, how many, and a digest of their ids
WEIGHTS, MOMENTS, STATE = "weights.safetensors", "moments.safetensors", "state.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where training is. Random numbers need no state: each step seeds itself from (seed, step, rank)."""

    step: int = 0  # optimizer steps done
    evaluated_at: int = 0  # the last step whose evaluation is over
    best_step: int | None = None
    best_score: float | None = None
    evaluations_since_best: int = 0
    finished: bool = False  # ended early, or all steps done
    seconds: float = 0.0  # spent training, over all resumes
    target_tokens: int = 0
    source_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint read from disk."""

    path: Path
    progress: Progress
    snapshot: Snapshot
    skipped: tuple[str, ...] = field(default=())  # broken ones that were newer, each with what is wrong


def save_checkpoint(folder: Path, snapshot: Snapshot, progress: Progress, identity: dict[str, Any]) -> Path:
    """Write one checkpoint of the run described by `identity` and return its path. Rank 0 only."""

    def fill(partial: Path) -> None:
        save_file(snapshot.weights, partial / WEIGHTS)
        save_file(snapshot.moments, partial / MOMENTS)
        digests = {name: sha256_of(partial / name) for name in (WEIGHTS, MOMENTS)}
        (partial / STATE).write_text(_state(progress, identity, digests))

    path = _path(folder, progress.step)
    write_directory(path, fill, read_state)
    return path


def update_progress(folder: Path, progress: Progress, identity: dict[str, Any]) -> None:
    """Say in the checkpoint of `progress.step` what has happened since, in one move: an evaluation changes no weight. Rank 0 only."""
    path = _path(folder, progress.step) / STATE
    with fence(CheckpointError, f"{path} is damaged"):
        digests = json.loads(path.read_text(encoding="utf-8"))["sha256"]
    write_file(path, _state(progress, identity, digests))


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _state(progress: Progress, identity: dict[str, Any], digests: dict[str, str]) -> str:
    state = {"format": FORMAT, "progress": asdict(progress), "identity": identity, "sha256": digests}
    return json.dumps(state | {"digest": _digest(state)}, indent=2) + "\n"


def read_state(path: Path) -> dict[str, Any]:
    """Return the state of the checkpoint at `path` after checking its digests.

    Raises:
        CheckpointError: a file is missing, cut short or changed; the message names it.
    """
    file = path / STATE
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    with fence(CheckpointError, f"{file} is damaged"):
        state = json.loads(file.read_text(encoding="utf-8"))
        if state["format"] not in (1, FORMAT):
            raise CheckpointError(f"{path} has checkpoint format {state['format']!r}, this version reads 1 to {FORMAT}")
        if state["format"] == FORMAT and state.pop("digest") != _digest(state):
            raise CheckpointError(f"{file} is damaged: its contents don't match their digest")
        digests = state["sha256"]
        if set(digests) != {WEIGHTS, MOMENTS}:
            raise CheckpointError(f"{file} is damaged: it needs digests of {WEIGHTS} and {MOMENTS}, and of nothing else")
    for name in (WEIGHTS, MOMENTS):
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing")
        with fence(CheckpointError, f"{path / name} can't be read"):
            if sha256_of(path / name) != digests[name]:
                raise CheckpointError(f"{path / name} is damaged: its contents don't match the digest in {STATE}")
    return dict(state)


def _digest(state: dict[str, Any]) -> str:
    """Return a digest of a state, however its keys are ordered."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Resuming:
    """The run that asks for its newest checkpoint."""

    identity: dict[str, Any]
    shapes: Mapping[str, torch.Size]  # of what it trains, by name
    total_steps: int
    best: Callable[[int], Path]  # where the best weights of a step are


def load_latest(folder: Path, run: Resuming) -> Checkpoint | None:
    """Return the newest whole checkpoint in `folder`, or None when there is none at all.

    Raises:
        CheckpointError: there are checkpoints but all are broken, or they belong to another run.
    """
    skipped: list[str] = []
    for path in _newest_first(folder):
        try:
            return _load(path, run, tuple(skipped))
        except _AnotherRun:
            raise
        except CheckpointError as error:
            skipped.append(str(error))
    if skipped:
        raise CheckpointError(f"no whole checkpoint in {folder}: {'; '.join(skipped)}. Start again with --overwrite")
    return None


def _load(path: Path, run: Resuming, skipped: tuple[str, ...]) -> Checkpoint:
    state = read_state(path)
    with fence(CheckpointError, f"{path / STATE} is damaged"):
        identity = dict(state["identity"])
        _refuse_another_run(path, identity, run.identity)
        progress = _progress(state["progress"], step_of(path), run.total_steps)
    weights = read_tensors(path / WEIGHTS, run.shapes)
    moments = read_tensors(path / MOMENTS, {f"{moment}/{name}": shape for name, shape in run.shapes.items() for moment in MOMENT_NAMES})
    if progress.best_step is not None:  # without it the run could not be finished
        read_tensors(run.best(progress.best_step), run.shapes)
    return Checkpoint(path=path, progress=progress, snapshot=Snapshot(weights=weights, moments=moments), skipped=skipped)


def _progress(found: dict[str, Any], step: int | None, total_steps: int) -> Progress:
    """Return a state's progress, if a run of `total_steps` can have been there, in a folder of this step."""
    try:
        progress = TypeAdapter(Progress).validate_json(json.dumps(found), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"progress.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    counts = [progress.evaluated_at, progress.evaluations_since_best, progress.target_tokens, progress.source_tokens, progress.seconds]
    best = progress.best_step or 0
    possible = (
        progress.step == step
        and 0 < progress.step <= total_steps
        and max(progress.evaluated_at, best) <= progress.step
        and all(0 <= count < math.inf for count in (*counts, best))
        and (progress.best_step is None) == (progress.best_score is None)
    )
    if not possible:
        raise ValueError(f"no run of {total_steps} steps is at step {progress.step} in this way")
    return progress


def remove_old_checkpoints(folder: Path, keep: int, *, newest: int) -> None:
    """Remove all but the newest `keep` checkpoints up to step `newest`, and what a killed writer left behind.

    Later ones were passed over as broken: they must not push out whole ones. What others put into a checkpoint stays.
    """
    for path in [path for path in _newest_first(folder) if (step_of(path) or 0) <= newest][keep:]:
        with writing(path):
            for name in (WEIGHTS, MOMENTS, STATE):
                (path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.rmdir()
    for path in folder.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def remove_unneeded_best(folder: Path, checkpoints: Path) -> None:
    """Remove the best weights of all steps but those that a checkpoint names, which a resume from it reads. What others put there stays."""
    needed = set()
    for path in _newest_first(checkpoints):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # nobody resumes from a damaged one
            needed.add(json.loads((path / STATE).read_text(encoding="utf-8"))["progress"]["best_step"])
    for path in _newest_first(folder):
        if step_of(path) not in needed:
            with writing(path):
                (path / WEIGHTS).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                path.rmdir()


def step_of(path: Path) -> int | None:
    """Return the step that a checkpoint's name says; None: it is no such name."""
    found = re.fullmatch(r"step-(\d{1,18})", path.name)
    return int(found[1]) if found else None


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


class _AnotherRun(CheckpointError):
    """Older checkpoints would belong to it, too."""


def _refuse_another_run(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    missing = {TRAINING_ROWS} - found.keys()  # an earlier version did not keep them
    different = [key for key in expected if found.get(key) != expected[key] and key not in missing]
    rows = expected.get(TRAINING_ROWS, {})
    if TRAINING_ROWS in different and found[TRAINING_ROWS].get("of") == rows["of"]:
        raise _AnotherRun(
            f"{rows['of']} has changed since {path} was written ({found[TRAINING_ROWS].get('rows'):,} training rows then, {rows['rows']:,} "
            "now): put the file back, choose another output_dir or name, or start again with --overwrite"
        )
    if different == ["total_steps"]:
        raise _AnotherRun(
            f"{path} is of a run of {found['total_steps']} steps, and its learning rates fell over those; this recipe has "
            f"{expected['total_steps']}: to train its result further, write another name= and training.start_from={path.parent.parent}"
        )
    if different:
        raise _AnotherRun(
            f"{path} belongs to another run: {', '.join(f'{key} was {found.get(key)!r}, is {expected[key]!r}' for key in different)};"
            " choose another output_dir or name, or start again with --overwrite"
        )


def read_tensors(path: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Return the tensors of a file, which must be float32, finite and of these names and shapes."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    with fence(CheckpointError, f"{path} is damaged"):
        tensors: dict[str, Tensor] = load_file(path)
    wrong = sorted(tensors.keys() ^ shapes.keys())
    wrong += [name for name, tensor in tensors.items() if name in shapes and tensor.shape != shapes[name]]
    if wrong:
        raise CheckpointError(f"{path} does not fit what this run trains: {', '.join(wrong[:3])} ({len(wrong)} in all)")
    bad = [name for name, tensor in tensors.items() if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all())]
    if bad:
        raise CheckpointError(f"{path} is damaged: {bad[0]} holds what is no finite float32 number ({len(bad)} in all)")
    return tensors

"""Training checkpoints: whole, small, and free of the world they were written in.

    checkpoints/step-00000120/
        weights.safetensors    the side network, float32, whole
        moments.safetensors    Adam's moments, float32, whole
        state.json             where training was, which run it belongs to, and a SHA-256 of the other two

The backbone is never in it. A checkpoint is written under a temporary name, flushed, renamed, and read back: a directory called
step-* either matches its digests or is reported as broken and passed over. Nothing is pickled, so nothing can run on loading.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lst_scale.durable import sha256_of, write_directory, write_file
from lst_scale.errors import CheckpointError
from lst_scale.training.engine import Snapshot

FORMAT = 1
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
    digests = json.loads(path.read_text())["sha256"]
    write_file(path, _state(progress, identity, digests))


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _state(progress: Progress, identity: dict[str, Any], digests: dict[str, str]) -> str:
    state = {"format": FORMAT, "progress": asdict(progress), "identity": identity, "sha256": digests}
    return json.dumps(state, indent=2) + "\n"


def read_state(path: Path) -> dict[str, Any]:
    """Return the state of the checkpoint at `path` after checking its digests.

    Raises:
        CheckpointError: a file is missing, cut short or changed; the message names it.
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_text())
        if state["format"] != FORMAT:
            raise CheckpointError(f"{path} has checkpoint format {state['format']}, this version reads {FORMAT}")
        for name, digest in state["sha256"].items():
            if sha256_of(path / name) != digest:
                raise CheckpointError(f"{path / name} is damaged: its contents don't match the digest in {STATE}")
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / STATE} is damaged: {error!r}") from error
    return state


def load_latest(folder: Path, identity: dict[str, Any]) -> Checkpoint | None:
    """Return the newest whole checkpoint in `folder`, or None when there is none at all.

    Raises:
        CheckpointError: there are checkpoints but all are broken, or they belong to another run.
    """
    skipped: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            state = read_state(path)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        _refuse_another_run(path, state["identity"], identity)
        snapshot = Snapshot(weights=_read(path / WEIGHTS), moments=_read(path / MOMENTS))
        return Checkpoint(path=path, progress=Progress(**state["progress"]), snapshot=snapshot, skipped=tuple(skipped))
    if skipped:
        raise CheckpointError(f"no whole checkpoint in {folder}: {'; '.join(skipped)}. Start again with --overwrite")
    return None


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what a killed writer left behind."""
    for path in sorted(folder.glob("step-*"), reverse=True)[keep:]:
        shutil.rmtree(path)
    for path in folder.glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def _refuse_another_run(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    different = [key for key in expected if found.get(key) != expected[key]]
    if different == ["total_steps"]:
        raise CheckpointError(
            f"{path} is of a run of {found['total_steps']} steps, and its learning rates fell over those; this recipe has "
            f"{expected['total_steps']}: to train its result further, write another name= and training.start_from={path.parent.parent}"
        )
    if different:
        raise CheckpointError(
            f"{path} belongs to another run: {', '.join(f'{key} was {found.get(key)!r}, is {expected[key]!r}' for key in different)};"
            " choose another output_dir or name, or start again with --overwrite"
        )


def _read(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(path)
    return tensors

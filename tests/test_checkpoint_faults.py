"""A checkpoint that is damaged, foreign or unfitting is passed over with one line that names it; nothing wrong is ever resumed from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lst_scale.errors import CheckpointError
from lst_scale.recipe.schema import load_recipe
from lst_scale.runs.logs import Logger
from lst_scale.system.durable import sha256_of
from lst_scale.training import checkpoint
from lst_scale.training.checkpoint import Progress, Resuming, load_latest, remove_old_checkpoints, save_checkpoint, update_progress
from lst_scale.training.engine import Snapshot
from lst_scale.training.run import run

IDENTITY = {"seed": 0, "task": "rte"}


def snapshot(**changes: Any) -> Snapshot:
    weights = {"a": torch.ones(2, 3), "b": torch.zeros(4)} | changes
    return Snapshot(
        weights=weights, moments={f"{kind}/{name}": weight + 1 for kind in ("exp_avg", "exp_avg_sq") for name, weight in weights.items()}
    )


def save_best(folder: Path, step: int) -> Path:
    path = folder / "best" / str(step)
    path.parent.mkdir(exist_ok=True)
    save_file(snapshot().weights, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 4 and 8; that of step 8 is to be damaged."""
    for step in (4, 8):
        progress = Progress(step=step, evaluated_at=step, best_step=step, best_score=50.0, seconds=1.5, target_tokens=9, source_tokens=9)
        save_checkpoint(tmp_path / "checkpoints", snapshot(), progress, IDENTITY)
        save_best(tmp_path, step)
    return tmp_path


def load(folder: Path, **changes: Any) -> checkpoint.Checkpoint | None:
    shapes = {name: weight.shape for name, weight in snapshot().weights.items()}
    run = Resuming(identity=IDENTITY, shapes=shapes, total_steps=20, best=lambda step: folder / "best" / str(step))
    return load_latest(folder / "checkpoints", replace(run, **changes))


def test_a_checkpoint_reads_back_as_it_was_written(folder: Path) -> None:
    found = load(folder)
    assert found is not None and found.progress.step == 8 and found.skipped == ()
    assert found.snapshot.weights.keys() == snapshot().weights.keys() and found.snapshot.moments.keys() == snapshot().moments.keys()


def state_of(folder: Path, step: int = 8) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}" / "state.json"


def edited(change: Callable[[dict[str, Any]], Any], *, signed: bool) -> Callable[[Path], None]:
    """Return what edits state.json; `signed`: with a digest that fits, as a program of ours with a bug would write it."""

    def damage(folder: Path) -> None:
        state = json.loads(state_of(folder).read_text())
        change(state)
        if signed:
            state.pop("digest", None)
            state["digest"] = checkpoint._digest(state)
        state_of(folder).write_text(json.dumps(state))

    return damage


def tensors(name: str, make: Callable[[], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """Return what replaces a file of tensors, with digests that fit."""

    def damage(folder: Path) -> None:
        save_file(make(), state_of(folder).parent / name)
        edited(lambda state: state["sha256"].update({name: sha256_of(state_of(folder).parent / name)}), signed=True)(folder)

    return damage


def replaced(name: str, content: bytes | None) -> Callable[[Path], None]:
    """Return what replaces a file by bytes, or by a folder."""

    def damage(folder: Path) -> None:
        path = state_of(folder).parent / name
        path.unlink()
        path.mkdir() if content is None else path.write_bytes(content)

    return damage


def no_best(folder: Path) -> None:
    (folder / "best" / "8").unlink()


def half_a_best(folder: Path) -> None:
    (folder / "best" / "8").write_bytes((folder / "best" / "8").read_bytes()[:-3])


def step_as_a_file(folder: Path) -> None:
    (folder / "checkpoints" / "step-99999999").write_text("x")


def empty_step(folder: Path) -> None:
    (folder / "checkpoints" / "step-99999999").mkdir()


PROGRESS: list[dict[str, Any]] = [
    {"step": 10**9},
    {"step": 9},
    {"step": -8},
    {"step": 8.0},
    {"step": "8"},
    {"step": True},
    {"step": None},
    {"evaluated_at": 9},
    {"evaluated_at": -1},
    {"best_step": 12},
    {"best_step": None},
    {"best_score": None},
    {"best_score": "high"},
    {"seconds": float("nan")},
    {"seconds": -1.0},
    {"seconds": float("inf")},
    {"target_tokens": -1},
    {"source_tokens": 0.5},
    {"finished": 1},
    {"evaluations_since_best": [1]},
]
DAMAGE: dict[str, Callable[[Path], None]] = {
    **{
        f"{key}={value!r}": edited(lambda s, u={key: value}: s["progress"].update(u), signed=True)
        for each in PROGRESS
        for key, value in each.items()
    },
    "edited step": edited(lambda s: s["progress"].update(step=7), signed=False),
    "edited score": edited(lambda s: s["progress"].update(best_score=99.0), signed=False),
    "edited identity": edited(lambda s: s["identity"].update(seed=1), signed=False),
    "no digest": edited(lambda s: s.pop("digest"), signed=False),
    "wrong digest": edited(lambda s: s.update(digest="0"), signed=False),
    "no progress": edited(lambda s: s.pop("progress"), signed=True),
    "no identity": edited(lambda s: s.pop("identity"), signed=True),
    "identity a list": edited(lambda s: s.update(identity=[1]), signed=True),
    "no sha256": edited(lambda s: s.pop("sha256"), signed=True),
    "empty sha256": edited(lambda s: s.update(sha256={}), signed=True),
    "sha256 of one": edited(lambda s: s["sha256"].pop("moments.safetensors"), signed=True),
    "sha256 outside": edited(lambda s: s["sha256"].update({"../../../etc/passwd": "0"}), signed=True),
    "sha256 a list": edited(lambda s: s.update(sha256=["weights.safetensors", "moments.safetensors"]), signed=True),
    "sha256 null": edited(lambda s: s.update(sha256=None), signed=True),
    "format 99": edited(lambda s: s.update(format=99), signed=True),
    "format a dict": edited(lambda s: s.update(format={}), signed=True),
    "format null": edited(lambda s: s.update(format=None), signed=True),
    "state empty": replaced("state.json", b""),
    "state a list": replaced("state.json", b"[]"),
    "state a number": replaced("state.json", b"7"),
    "state not UTF-8": replaced("state.json", b"\xff\xfe{}"),
    "state nested": replaced("state.json", b"[" * 100_000),
    "state of digits": replaced("state.json", b'{"format": ' + b"9" * 5000 + b"}"),
    "state a folder": replaced("state.json", None),
    "weights empty": replaced("weights.safetensors", b""),
    "weights cut": replaced("weights.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{"),
    "weights a folder": replaced("weights.safetensors", None),
    "moments gone": lambda folder: (state_of(folder).parent / "moments.safetensors").unlink(),
    "weights of another shape": tensors("weights.safetensors", lambda: snapshot(a=torch.ones(3, 2)).weights),
    "weights missing": tensors("weights.safetensors", lambda: {"a": torch.ones(2, 3)}),
    "weights surplus": tensors("weights.safetensors", lambda: snapshot(c=torch.ones(1)).weights),
    "weights NaN": tensors("weights.safetensors", lambda: snapshot(b=torch.full((4,), torch.nan)).weights),
    "weights whole numbers": tensors("weights.safetensors", lambda: snapshot(b=torch.ones(4, dtype=torch.int64)).weights),
    "moments missing": tensors("moments.safetensors", lambda: {"exp_avg/a": torch.ones(2, 3)}),
    "moments infinite": tensors("moments.safetensors", lambda: snapshot(b=torch.full((4,), torch.inf)).moments),
    "best gone": no_best,
    "best cut": half_a_best,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(damage: str, folder: Path) -> None:
    DAMAGE[damage](folder)
    found = load(folder)
    assert found is not None and found.progress.step == 4
    (line,) = found.skipped
    assert str(folder) in line and "\n" not in line and len(line) < 600


@pytest.mark.parametrize("damage", [step_as_a_file, empty_step], ids=lambda damage: damage.__name__)
def test_what_only_looks_like_a_checkpoint_is_passed_over(damage: Callable[[Path], None], folder: Path) -> None:
    damage(folder)
    found = load(folder)
    assert found is not None and found.progress.step == 8 and "step-99999999" in found.skipped[0]


@pytest.mark.parametrize("damage", list(DAMAGE)[::7])
def test_when_all_are_damaged_one_line_says_so(damage: str, folder: Path) -> None:
    for path in (folder / "checkpoints" / "step-00000004").iterdir():
        path.unlink()
    (folder / "checkpoints" / "step-00000004").rmdir()
    DAMAGE[damage](folder)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*: .*\. Start again with --overwrite") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_run_is_no_damaged_one(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="step-00000008 belongs to another run: seed was 0, is 1; choose another output_dir"):
        load(folder, identity=IDENTITY | {"seed": 1})


def test_rows_that_changed_since_are_named_by_their_file(folder: Path) -> None:
    rows = {"of": "train.csv", "rows": 20, "ids": "a"}
    state = json.loads(state_of(folder).read_text())
    assert load(folder, identity=IDENTITY | {"training_rows": rows}) is not None  # an earlier version kept none
    del state["digest"]
    state_of(folder).write_text(json.dumps(state | {"format": 1, "identity": IDENTITY | {"training_rows": rows}}))
    assert load(folder, identity=IDENTITY | {"training_rows": rows}) is not None
    with pytest.raises(
        CheckpointError, match=r"train\.csv has changed since .*step-00000008 was written \(20 training rows then, 21 now\)"
    ):
        load(folder, identity=IDENTITY | {"training_rows": rows | {"rows": 21, "ids": "b"}})


def test_a_checkpoint_of_the_version_before_resumes(folder: Path) -> None:
    state = json.loads(state_of(folder).read_text())
    del state["digest"]
    state_of(folder).write_text(json.dumps(state | {"format": 1}))
    found = load(folder)
    assert found is not None and found.progress.step == 8


def test_progress_that_is_said_later_is_covered_by_the_digest_too(folder: Path) -> None:
    found = load(folder)
    assert found is not None
    update_progress(folder / "checkpoints", replace(found.progress, evaluations_since_best=2), IDENTITY)
    again = load(folder)
    assert again is not None and asdict(again.progress) == asdict(found.progress) | {"evaluations_since_best": 2} and not again.skipped


def test_a_broken_later_checkpoint_pushes_out_no_whole_one_and_what_others_put_there_stays(folder: Path) -> None:
    empty_step(folder)
    (folder / "checkpoints" / "step-00000004" / "notes.txt").touch()
    remove_old_checkpoints(folder / "checkpoints", 1, newest=8)
    left = sorted(str(path.relative_to(folder / "checkpoints")) for path in (folder / "checkpoints").rglob("*"))
    names = [f"step-00000008/{name}" for name in ("moments.safetensors", "state.json", "weights.safetensors")]
    assert left == ["step-00000004", "step-00000004/notes.txt", "step-00000008", *names, "step-99999999"]


def test_best_weights_are_kept_while_a_checkpoint_needs_them_and_a_run_resumes_from_each(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    often = {"training__result": "last", "training__evaluate_every": 1, "training__save_every_steps": 1, "training__max_steps": 5}
    recipe = load_recipe(str(write_recipe("often", evaluation__method="likelihood", **often)))
    (result,) = run(recipe)
    folder = tmp_path / "runs" / "often-kind-seed0"

    def steps(name: str) -> list[str]:
        return sorted(path.name for path in (folder / name).iterdir())

    assert steps("best") == steps("checkpoints") == ["step-00000004", "step-00000005"]
    (folder / "best" / "step-00000001").mkdir()
    for name in ("weights.safetensors", "notes.txt"):
        (folder / "best" / "step-00000001" / name).touch()
    (folder / "checkpoints" / "step-00000005" / "weights.safetensors").unlink()
    (again,) = run(recipe, resume=True)
    assert again["scores"] == result["scores"] and "resuming at step 4" in (folder / "log.txt").read_text()
    assert steps("best/step-00000001") == ["notes.txt"]
    assert steps("best") == ["step-00000001", "step-00000004", "step-00000005"]


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe", b"{", b"[]", b"7", b'{"step": "x"}', b'{"step": null}', b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}", b"\x00", b""],
    ids=lambda line: repr(line[:12]),
)
def test_a_damaged_line_of_numbers_is_dropped_at_a_resume(line: bytes, tmp_path: Path) -> None:
    with Logger(tmp_path) as logger:
        logger.record("train", 1, {"loss": 1.0})
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(line + b"\n")
        logger.record("train", 2, {"loss": 1.0})
        logger.record("train", 9, {"loss": 1.0})
        logger.truncate_after(2, 0)
    assert [json.loads(text)["step"] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]

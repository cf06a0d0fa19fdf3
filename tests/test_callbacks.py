"""Who is told how a run goes: trackers, classes of one's own, what becomes of one that fails, and of a run that is resumed."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import programs, ranks
from helpers.runs import metrics, result
from helpers.training import train
from lst_scale.errors import ArgumentError, NotReady, RecipeError
from lst_scale.recipe.schema import load_recipe
from lst_scale.runs.callback import About
from lst_scale.runs.callbacks import IDS, Callbacks, check_callbacks
from lst_scale.runs.trackers import TRACKERS
from lst_scale.training.preflight import check_before_start

THERE = ["tensorboard", "wandb", "trackio", "mlflow"]
OWN = "helpers.own_callbacks"


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place where trackers keep what they are told, and no network."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path


@pytest.mark.slow
def test_a_class_of_one_s_own_is_told_steps_evaluations_and_the_end_by_rank_0_alone(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    train(write_recipe("own", logging__callbacks=[f"{OWN}:Writes"], logging__log_every_steps=3), processes=2)
    folder = tmp_path / "runs" / "own-kind-seed0"
    begin, *rest, end = told(folder)
    assert (begin["what"], begin["name"], begin["resumed"], begin["backbone"]) == ("begin", "own-kind-seed0", False, "fp32")
    assert [(one["what"], one["step"]) for one in rest] == [
        ("step", 1),
        ("step", 3),
        ("evaluate", 4),
        ("step", 6),
        ("evaluate", 8),
    ]
    by_step = {(line["kind"], line["step"]): line for line in metrics(folder)}
    for one in rest:
        line = by_step["train" if one["what"] == "step" else "validation", one["step"]]
        assert all(one[name] == value for name, value in line.items() if name not in ("kind", "step", "time"))
    assert any(name.startswith("gates/") for name in rest[2])
    assert end == {"what": "end", "score": result(folder)["scores"]["score"], "error": "NoneType"}


@pytest.mark.slow
def test_one_that_fails_is_named_twice_and_the_run_and_the_others_go_on(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    said = train(write_recipe("failing", logging__callbacks=[f"{OWN}:Fails", f"{OWN}:Leaves", f"{OWN}:Writes"]))
    folder = tmp_path / "runs" / "failing-kind-seed0"
    assert result(folder)["steps"] == 8
    assert f"{OWN}:Fails failed at step 3: ConnectionError: no route to; it is told nothing more, and the run goes on" in said
    assert f"{OWN}:Leaves failed at the evaluation after step 4: SystemExit: I am done" in said
    assert f"{OWN}:Fails was not told all of this run (step 3: " in said
    assert [one["step"] for one in told(folder) if one["what"] == "step"][-1] == 8 and told(folder)[-1]["what"] == "end"
    assert f"{OWN}:Fails failed" in (folder / "log.txt").read_text()


def test_the_end_is_told_once_and_so_is_who_was_not_told_all(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    said: list[str] = []
    recipe = load_recipe(str(write_recipe("twice", logging__callbacks=[f"{OWN}:Leaves", f"{OWN}:Writes"])), [])
    callbacks = Callbacks(said.append)
    callbacks.start(recipe, tmp_path, resume=False)
    callbacks.on_evaluate(4, {})
    for _ in range(2):  # by the run, and by its log when that is closed
        callbacks.on_end(None, None)
    assert [sentence.split(" (")[0] for sentence in said[1:]] == [f"{OWN}:Leaves was not told all of this run"]
    assert [one["what"] for one in told(tmp_path)].count("end") == 1


@pytest.mark.slow
def test_one_that_can_not_begin_ends_the_run_on_all_ranks_before_the_backbone_is_loaded(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_recipe("never", logging__callbacks=[f"{OWN}:NeverBegins"])
    done = ranks.run(programs.train, "--recipe", path, processes=2)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: logging: {OWN}:NeverBegins could not begin: no key" in done.stderr
    assert not (tmp_path / "runs" / "never-kind-seed0" / "checkpoints").exists()


@pytest.mark.slow
def test_all_trackers_are_told_a_run_and_its_resume_as_one(write_recipe: Callable[..., Path], offline: Path) -> None:
    path = write_recipe("tracked", logging__report_to=THERE, logging__callbacks=[f"{OWN}:Stops"])
    folder = offline / "runs" / "tracked-kind-seed0"
    stopped = ranks.run(programs.train, "--recipe", path)
    assert stopped.returncode == 1 and told(folder)[-1] == {"what": "end", "score": None, "error": "Interrupted"}
    first = json.loads((folder / IDS).read_text())
    train("--resume", path)
    assert json.loads((folder / IDS).read_text()) == first and set(first) == {*THERE, f"{OWN}:Stops"}
    begins = [one for one in told(folder) if one["what"] == "begin"]
    assert [one["resumed"] for one in begins] == [False, True] and len({one["id"] for one in begins}) == 1
    assert told(folder)[-1]["error"] == "NoneType"
    losses = {line["step"]: line["loss"] for line in metrics(folder) if line["kind"] == "train"}
    final = result(folder)["scores"]["score"]
    for name in THERE:
        steps, score = READ[name](offline, folder, first[name])
        assert steps == pytest.approx(losses, rel=1e-5), name
        assert score is None or score == pytest.approx(final, rel=1e-5), name


def test_one_that_could_not_begin_begins_anew_when_the_run_is_resumed(
    write_recipe: Callable[..., Path], offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(str(write_recipe("away", logging__report_to=["mlflow"])), [])
    with monkeypatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
        patched.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(ArgumentError, match="logging: mlflow could not begin"):
            Callbacks(print).start(recipe, offline, resume=False)
    for _ in range(2):
        Callbacks(print).start(recipe, offline, resume=True)
    from mlflow import MlflowClient

    client = MlflowClient()
    experiments = [one.experiment_id for one in client.search_experiments()]
    assert [run.info.run_id for run in client.search_runs(experiments)] == [json.loads((offline / IDS).read_text())["mlflow"]]


def _tensorboard(place: Path, folder: Path, _: str) -> tuple[dict[int, float], float | None]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"validation/score", "train/learning_rate"} <= set(found.Tags()["scalars"])
    return {event.step: event.value for event in found.Scalars("train/loss")}, None


def _wandb(place: Path, folder: Path, id: str) -> tuple[dict[int, float], float | None]:
    from wandb.proto import wandb_internal_pb2

    steps, score = {}, None
    files = sorted(folder.glob(f"wandb/offline-run-*/run-{id}.wandb"))
    assert len(files) == 2, "one for each start, of one run"
    for data in (data for file in files for data in _records(file.read_bytes())):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in row:
            steps[row["step"]] = row["train/loss"]
        for item in record.summary.update:
            if "result/score" in (item.key, "/".join(item.nested_key)):
                score = json.loads(item.value_json)
    assert score is not None
    return steps, score


def _records(data: bytes) -> Iterator[bytes]:
    """Yield what a log of LevelDB's form holds: blocks of 32 KiB, records with a checksum, a length and which part of a whole they are."""
    place, whole = 7, b""  # after the file's own header
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, length, part = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # all of it, or its last part
            yield whole
            whole = b""


def _trackio(place: Path, folder: Path, id: str) -> tuple[dict[int, float], float | None]:
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("lst_scale", f"tracked-kind-seed0-{id}")
    return {row["step"]: row["train/loss"] for row in logs if "train/loss" in row}, logs[-1]["result/score"]


def _mlflow(place: Path, folder: Path, id: str) -> tuple[dict[int, float], float | None]:
    from mlflow import MlflowClient

    client = MlflowClient()
    run = client.get_run(id)
    assert run.info.status == "FINISHED" and run.data.params["method.name"] == "lst"
    return {one.step: one.value for one in client.get_metric_history(id, "train/loss")}, run.data.metrics["result/score"]


READ: dict[str, Callable[[Path, Path, str], tuple[dict[int, float], float | None]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_package_that_is_missing_is_told_with_what_to_install(
    name: str, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *rest: None if module == name else find(module, *rest))
    recipe = load_recipe(str(write_recipe("missing", logging__report_to=[name])))
    message = rf"^logging.report_to needs {name}: pip install 'lst_scale\[{name}\]'$"
    with pytest.raises(ArgumentError, match=message):
        check_callbacks(recipe.logging)
    with pytest.raises(NotReady, match=message):
        check_before_start([recipe], resume=False)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"{OWN}:Write"], rf"^logging.callbacks: {OWN} has no class 'Write'. Did you mean 'Writes'\?$"),
        ([f"{OWN}:Lacks"], rf"^logging.callbacks: {OWN}:Lacks has no on_end: write on_step, on_evaluate, on_end$"),
        (["nowhere.at_all:X"], r"^logging.callbacks: nowhere.at_all can't be imported: No module named 'nowhere'$"),
        (["mine.py:X"], r"^logging.callbacks: .*mine.py can't be imported: No such file or directory$"),
    ],
)
def test_a_class_that_is_none_is_one_line(names: list[str], message: str, write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(str(write_recipe("none", logging__callbacks=names)))
    with pytest.raises(RecipeError, match=message):
        check_callbacks(recipe.logging)


def test_a_file_beside_the_recipe_is_found_from_anywhere(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = write_recipe("beside", logging__callbacks=["mine:Mine"])
    (tmp_path / "mine.py").write_text("class Mine:\n    def __init__(self, about): pass\n    on_step = on_evaluate = on_end = print\n")
    recipe = load_recipe(str(path))
    assert recipe.logging.callbacks == (f"{tmp_path / 'mine.py'}:Mine",)
    check_callbacks(recipe.logging)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("logging.report_to=[wandb,wandb]", "report_to names wandb twice: write it once"),
        ("logging.report_to=[weights]", "logging.report_to"),
        ("logging.report_to=[tensorboard] logging.tensorboard=true", "tensorboard: true says what report_to says too: remove it"),
        ("logging.callbacks=[mine]", "names no class: write module:Class"),
        ("logging.project=x", "project has no effect without wandb, trackio or mlflow in report_to: remove it"),
    ],
)
def test_what_a_recipe_can_not_mean_is_told(override: str, message: str, write_recipe: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(write_recipe("wrong")), override.split())


def test_every_tracker_of_the_recipe_is_there() -> None:
    from lst_scale.runs.callbacks import PACKAGES

    assert list(TRACKERS) == list(PACKAGES) and About.__dataclass_params__.frozen  # type: ignore[attr-defined]

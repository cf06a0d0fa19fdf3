"""What an ensemble's result.json says is the ensemble's own, and a damaged member stops it before anything is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.models import make_t5
from helpers.recipes import recipe_writer
from lst_scale.errors import LstScaleError
from lst_scale.inference.ensemble import score_together
from lst_scale.recipe.schema import load_recipe
from lst_scale.runs.compare import rows
from lst_scale.training.run import run

OF_A_RUN_ALONE = ("best_step", "validation_score", "steps", "tokens_per_second", "peak_memory_bytes_by_rank", "mark")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("ensemble")
    make = recipe_writer(folder, make_t5(folder / "t5"))
    members = {"seed": [0, 1]}
    recipe = make(
        "pair", members=members, data__shuffle_seed=0, training__max_steps=2, training__evaluate_every=2, evaluation__method="likelihood"
    )
    run(load_recipe(str(recipe)))
    return sorted((folder / "runs").iterdir())


@pytest.fixture
def pair(made: list[Path], tmp_path: Path) -> list[Path]:
    """Two finished runs of one's own, to be damaged; what is made of them goes below tmp_path too."""
    copies = [Path(shutil.copytree(run, tmp_path / "runs" / run.name)) for run in made]
    for copy in copies:
        recipe = (copy / "recipe.yaml").read_text()
        (copy / "recipe.yaml").write_text(recipe.replace(f"output_dir: {made[0].parent}", f"output_dir: {tmp_path / 'runs'}"))
    return copies


def change_result(run: Path, **changes: Any) -> None:
    path = run / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_ensemble_s_result_takes_over_nothing_of_its_first_run(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    change_result(pair[0], command=["of the run"], versions={"torch": "0"}, best_step=7, loading_seconds=-1, mark=1, train_seconds=2.5)
    change_result(pair[1], train_seconds=1.25, peak_memory_bytes=10**15)
    monkeypatch.setattr("sys.argv", ["lst-scale", "ensemble"])
    folder, result = score_together(pair, "both")
    told = json.loads((folder / "result.json").read_text())
    assert told["command"] == ["lst-scale", "ensemble"] and told["versions"]["torch"] != "0" and told["loading_seconds"] >= 0
    assert not [key for key in OF_A_RUN_ALONE if told.get(key) is not None]
    assert told["name"] == told["recipe"]["name"] == "both" and told["ensemble_of"] == [str(run) for run in pair]
    assert told["train_seconds"] == 3.75 and told["seconds_per_step"] is None and told["peak_memory_bytes"] == 10**15
    assert (
        told["labels"]
        and told["longest_target"]
        and result["scores_alone"] == [json.loads((run / "result.json").read_text())["scores"]["score"] for run in pair]
    )
    (row,) = [row for row in rows([folder, *pair]) if row["run"] == "both"]
    assert row["seconds_per_step"] == "" and row["train_seconds"] == "3.8"
    with pytest.raises(LstScaleError, match="is an ensemble itself: give the runs that it is made of"):
        score_together([folder, pair[0]], "again")


@pytest.mark.parametrize(
    "changes",
    [
        "",
        "{",
        "[]",
        "\xff",
        {"scores": {}},
        {"scores": None},
        {"scores": {"score": "high"}},
        {"scores": {"score": float("nan")}},
        {"split": "train"},
        {"split": ["test"]},
        {"split": None},
        {"trainable_parameters": "many"},
        {"train_seconds": [1]},
        {"peak_memory_bytes": -1},
        {"saved_bytes": True},
    ],
    ids=str,
)
def test_a_damaged_result_of_a_member_is_one_line_and_leaves_no_folder(changes: Any, pair: list[Path]) -> None:
    if isinstance(changes, str):
        (pair[1] / "result.json").write_bytes(changes.encode("latin-1"))
    else:
        change_result(pair[1], **changes)
    with pytest.raises(LstScaleError) as caught:
        score_together(pair, "both")
    assert "\n" not in str(caught.value) and str(pair[1] / "result.json") in str(caught.value)
    assert sorted(pair[0].parent.iterdir()) == pair


def test_what_a_member_lacks_is_told_and_leaves_no_folder(pair: list[Path]) -> None:
    change_result(pair[1], split="test")
    with pytest.raises(LstScaleError, match=r"was scored on test rows, .* on validation rows"):
        score_together(pair, "both")
    change_result(pair[0], split="test")
    with pytest.raises(LstScaleError, match=r"'split' is test, and its recipe has no task\.test"):
        score_together(pair, "both")
    for each in pair:
        change_result(each, split="validation")
    (pair[1] / "side_network" / "side_network.safetensors").write_bytes(b"no")
    with pytest.raises(LstScaleError, match=r"side_network\.safetensors is damaged"):
        score_together(pair, "both")
    shutil.rmtree(pair[1] / "side_network")
    with pytest.raises(LstScaleError, match="holds no saved side network"):
        score_together(pair, "both")
    assert sorted(pair[0].parent.iterdir()) == pair


@pytest.mark.parametrize("name", ["", "../victim", "a/b", "-x", "a\nb", ".", "x" * 300])
def test_an_ensemble_s_name_is_one_for_a_folder(name: str, pair: list[Path]) -> None:
    with pytest.raises(LstScaleError, match=r"names a folder|letters"):
        score_together(pair, name, overwrite=True)
    assert sorted(pair[0].parent.iterdir()) == pair

"""`training.start_from`: a new run begins with the weights of a finished one, and with nothing else of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.models import make_t5
from helpers.recipes import recipe_writer
from lst_scale.errors import ArgumentError, CheckpointError, LadderError, LstScaleError, NotReady
from lst_scale.recipe.schema import load_recipe
from lst_scale.training.preflight import check_before_start
from lst_scale.training.run import run, run_together

LORA = {"name": "lora", "rank": 2, "dropout": 0.0}
FEW = {"training__max_steps": 2, "training__micro_batch_size": 6, "evaluation__method": "likelihood", "data__max_eval_rows": 2}


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("warm")
    return recipe_writer(folder, make_t5(folder / "t5", dropout_rate=0.0))


@pytest.fixture(scope="module")
def finished(write: Callable[..., Path]) -> dict[str, Path]:
    """A run of two steps of lst and of lora."""
    runs = {}
    for name, changes in {"lst": {}, "lora": {"method": LORA}}.items():
        recipe = load_recipe(str(write(name, **FEW, **changes)))
        run(recipe)
        runs[name] = Path(recipe.output_dir) / recipe.run_name
    return runs


def first_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(min((folder / "checkpoints").glob("step-*")) / "weights.safetensors")


@pytest.mark.parametrize(("name", "inner", "changes"), [("lst", "", {}), ("lst", "side_network", {}), ("lora", "", {"method": LORA})])
def test_a_run_begins_where_another_ended(
    name: str, inner: str, changes: dict[str, Any], finished: dict[str, Path], write: Callable[..., Path]
) -> None:
    # A rate that moves no float32 weight shows what the run began with.
    still = {"optimizer__learning_rate": 1e-30, "training__start_from": str(finished[name] / inner)}
    recipe = load_recipe(str(write(f"again-{name}-{inner or 'run'}", **FEW, **changes, **still)))
    (result,) = run(recipe)
    folder = Path(recipe.output_dir) / recipe.run_name
    expected = load_file(max((finished[name] / "best").glob("step-*")) / "weights.safetensors")
    found = first_checkpoint(folder)
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())
    assert result["recipe"]["training"]["start_from"] == still["training__start_from"] in (folder / "recipe.yaml").read_text()
    assert "starting from the weights in" in (folder / "log.txt").read_text()
    assert result["steps"] == 2


def test_members_may_begin_where_one_run_ended(finished: dict[str, Path], write: Callable[..., Path]) -> None:
    members = ["optimizer.learning_rate=1e-3", "optimizer.learning_rate=1e-2"]
    recipe = load_recipe(str(write("both", **FEW, members=members, training__start_from=str(finished["lst"]))))
    results = run(recipe)
    logs = [(Path(recipe.output_dir) / f"{each['name']}-kind-seed0" / "log.txt").read_text() for each in results]
    assert len(logs) == 2 and all("starting from the weights in" in log for log in logs)


@pytest.mark.parametrize(
    ("start", "changes", "error", "message"),
    [
        ("{lst}", {"method__reduction_factor": 2}, LadderError, "training.start_from: "),
        ("{lst}", {"method__normalize_taps": True}, LadderError, "normalize_taps False"),
        ("{lora}", {"method": LORA | {"rank": 4}}, LadderError, "does not fit this"),
        ("{lst}", {"method": LORA}, ArgumentError, "holds what another method than lora trained: give a run of the same method.name"),
        ("{lora}", {}, ArgumentError, "holds what another method than lst trained"),
        ("/nowhere", {}, ArgumentError, "training.start_from: /nowhere is no folder: give the folder of a finished run"),
        ("{t5}", {}, LadderError, "holds no saved side network, but another model"),
        ("{t5}/..", {}, ArgumentError, "holds no trained weights: give the folder of a finished run, or its side_network/"),
        ("{unfinished}", {}, ArgumentError, "is a run that is not finished: end it with --resume first"),
        ("{lst}", {"backbone__checkpoint": "{other}"}, LadderError, "was trained on"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_in_one_line(
    start: str, changes: dict[str, Any], error: type[LstScaleError], message: str, finished: dict[str, Path], write: Callable[..., Path]
) -> None:
    root = finished["lst"].parent.parent
    (root / "unfinished").mkdir(exist_ok=True)
    (root / "unfinished" / "recipe.yaml").write_text("name: x\n")
    if "{other}" in changes.values():
        changes = {"backbone__checkpoint": str(make_t5(root / "other", dropout_rate=0.0, d_kv=12))}
    places = {"lst": finished["lst"], "lora": finished["lora"], "t5": root / "t5", "unfinished": root / "unfinished"}
    recipe = load_recipe(str(write("refused", **FEW, **changes, training__start_from=start.format(**places))))
    with pytest.raises(error) as caught:
        run(recipe, overwrite=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_that_would_begin_with_what_it_overwrites_is_refused_and_nothing_is_removed(
    finished: dict[str, Path], write: Callable[..., Path]
) -> None:
    runs = finished["lst"].parent
    shutil.copytree(finished["lst"], runs / "own-kind-seed0")
    (runs / "link").symlink_to("own-kind-seed0")
    there = {file: file.read_bytes() for file in (runs / "own-kind-seed0").rglob("*") if file.is_file()}
    alone = [load_recipe(str(write("own", **FEW, training__start_from=str(runs / "link" / "side_network"))))]
    beside = [load_recipe(str(write(name, **FEW, training__start_from=str(runs / "own-kind-seed0")))) for name in ("new", "own")]
    for recipes in (alone, beside):
        message = r"^training.start_from: \S+ is in a run that --overwrite removes: write another name=$"
        with pytest.raises(NotReady, match=message):
            check_before_start(recipes, resume=False, overwrite=True)
        with pytest.raises(ArgumentError, match=message):
            run_together(recipes, overwrite=True)
    assert {file: file.read_bytes() for file in (runs / "own-kind-seed0").rglob("*") if file.is_file()} == there


def test_more_steps_of_a_finished_run_are_refused_with_a_way_to_have_them(finished: dict[str, Path], write: Callable[..., Path]) -> None:
    with pytest.raises(
        CheckpointError, match=r"is of a run of 2 steps.* this recipe has 4: .* name= and training.start_from=\S+lst-kind-seed0$"
    ):
        run(load_recipe(str(write("lst", **FEW | {"training__max_steps": 4}))), resume=True)
    assert json.loads((finished["lst"] / "result.json").read_text())["steps"] == 2

"""Several side networks on one backbone pass: each ends as it would alone, bit for bit."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers import ending_members, programs, ranks
from helpers.runs import final_weights, losses
from helpers.training import train
from lst_scale.errors import RecipeError, TrainingError
from lst_scale.recipe import decode
from lst_scale.recipe.grid import grid_as_lines
from lst_scale.recipe.members import members_of, share_passes
from lst_scale.recipe.schema import load_recipe, parse_recipe, to_yaml
from lst_scale.training.run import run_together

MEMBERS = [
    "seed=0 optimizer.learning_rate=1e-2",
    "seed=1 optimizer.learning_rate=3e-3",
    "seed=0 optimizer.learning_rate=3e-3 method.reduction_factor=2 method.side_layers=[1]",
    "seed=2 optimizer.learning_rate=1e-2 method.design=cross_attention method.side_layers=all",
]
SHARED: dict[str, Any] = {"data__shuffle_seed": 0, "method__dropout": 0.1, "evaluation__max_new_tokens": 5}


def write_each_alone(recipe: Path, folder: Path) -> list[str]:
    """Write a recipe file for each member, into another output folder."""
    paths = []
    for each in members_of(load_recipe(str(recipe))):
        tree = each.model_dump(mode="json") | {"output_dir": str(folder / "alone")}
        path = folder / f"{each.run_name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        paths.append(str(path))
    return paths


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"cache__enabled": True, "cache__dtype": "fp32", "evaluation__method": "likelihood"}], ids=["live", "cached"]
)
def test_members_end_as_they_would_alone(changes: dict[str, Any], write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    shared = SHARED | changes
    if "cache__enabled" in changes:
        shared = {**shared, "cache__folder": str(tmp_path / "taps"), "training__epochs": 1}
        shared.pop("evaluation__max_new_tokens")
    together = write_recipe("together", members=MEMBERS, **shared)
    alone = write_each_alone(together, tmp_path)
    for path in alone:  # alone, live
        tree = yaml.safe_load(Path(path).read_text())
        tree["cache"] = {"enabled": False}
        Path(path).write_text(yaml.safe_dump(tree))
    train(together)
    train(*alone)
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert len(runs) == len(MEMBERS)
    for run in runs:
        found, expected = final_weights(tmp_path / "runs" / run), final_weights(tmp_path / "alone" / run)
        assert all(torch.equal(found[name], expected[name]) for name in expected), run
        assert losses(tmp_path / "runs" / run) == losses(tmp_path / "alone" / run)
        results = [json.loads((tmp_path / where / run / "result.json").read_text()) for where in ("runs", "alone")]
        assert results[0]["scores"] == results[1]["scores"]


@pytest.mark.slow
def test_members_on_two_ranks_resume_and_one_that_is_behind_catches_up(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = write_recipe("resumed", members=MEMBERS[:3], training__save_every_steps=2, training__keep_checkpoints=9, **SHARED)
    train(path, processes=2)
    runs = sorted(path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    expected = {run.name: final_weights(run) for run in runs}
    for run, kept in zip(runs, (3, 2, 1), strict=True):  # back to steps 6, 4 and 2
        (run / "result.json").unlink()
        for checkpoint in sorted((run / "checkpoints").glob("step-*"))[kept:]:
            shutil.rmtree(checkpoint)
    assert train("--resume", path, processes=2).count("resuming at step") == 3
    for run in runs:
        found = final_weights(run)
        assert all(torch.equal(found[name], expected[run.name][name]) for name in found), run.name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_member_whose_loss_is_not_finite_fails_alone(processes: int, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    members = ["optimizer.learning_rate=1e-2", "optimizer.learning_rate=1000 optimizer.weight_decay=1000", "optimizer.learning_rate=3e-3"]
    together = write_recipe("together", members=members, **SHARED)
    first, wild, last = (recipe.run_name for recipe in members_of(load_recipe(str(together))))
    alone = write_each_alone(together, tmp_path)
    train(alone[0], alone[2], processes=processes)
    done = ranks.run(programs.train, "--recipe", together, processes=processes)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("error: 1 of 3 members failed, the others are finished") == 1
    assert f"{wild}: the loss of step " in done.stderr and "optimizer.learning_rate below 1000\n" in done.stderr
    assert not (tmp_path / "runs" / wild / "result.json").exists()
    assert "failed: the loss of step" in (tmp_path / "runs" / wild / "log.txt").read_text()
    for name in (first, last):
        assert (tmp_path / "runs" / name / "result.json").exists()
        found, expected = final_weights(tmp_path / "runs" / name), final_weights(tmp_path / "alone" / name)
        assert all(torch.equal(found[n], expected[n]) for n in expected), name


@pytest.mark.parametrize(("rate", "what"), [(3e37, "loss"), (1e30, "gradient")])
def test_a_run_that_diverges_stops_with_one_line(rate: float, what: str, write_recipe: Callable[..., Path]) -> None:
    """Weights of 1e30 give a finite loss, whose gradient has no finite norm. Such rates are past what a recipe takes."""
    recipe = load_recipe(str(write_recipe("wild")))
    wild = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"learning_rate": rate})})
    with pytest.raises(TrainingError, match=rf"^the {what} of step .*[^\n]$"):
        run_together([wild])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_a_member_that_ends_is_gone_while_others_train_on(stage: str, write_recipe: Callable[..., Path]) -> None:
    members = [f"training.max_steps={steps} seed={steps}" for steps in (3, 1, 2)]
    path = write_recipe("ending", members=members, training__deepspeed=stage, **SHARED)
    done = ranks.run(ending_members.train_and_tell, path)
    assert done.returncode == 0, done.stderr[-3000:]
    alive = [json.loads(line.removeprefix("alive ")) for line in done.stdout.splitlines() if line.startswith("alive ")]
    assert alive == [[True, True, True], [True, False, True], [True, False, False]]


def test_what_can_share_a_pass_is_put_together_in_order() -> None:
    lines = ["method.reduction_factor=8", "task=rte", "method.reduction_factor=4", "method={name: lora}", "task=rte optimizer.warmup=3"]
    lines += ["method.reduction_factor=2"]
    recipes = [load_recipe("t5-base", line.split(maxsplit=0) if "{" in line else line.split()) for line in lines]
    groups = share_passes([recipe.model_copy(update={"name": f"n{n}"}) for n, recipe in enumerate(recipes)], 2)
    assert [[each.name for each in group] for group in groups] == [["n0", "n1"], ["n2", "n4"], ["n3"], ["n5"]]
    with pytest.raises(RecipeError, match="seeds differ, so batches would"):
        share_passes([load_recipe("t5-base", [f"seed={seed}"]) for seed in (0, 1)], 4)


def test_a_name_that_looks_like_a_number_comes_back_as_a_name(write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(str(write_recipe("numbers")), ["name='1e5'", "backbone.revision='12e4567'"])
    assert parse_recipe(to_yaml(recipe), "stored") == recipe and (recipe.name, recipe.backbone.revision) == ("1e5", "12e4567")


def test_a_name_of_its_own_is_a_member_s_folder_and_one_that_two_have_is_not(write_recipe: Callable[..., Path]) -> None:
    lines = ["name=one optimizer.learning_rate=1e-3", "name=two seed=0 optimizer.learning_rate=1e-2", "name=two seed=0"]
    found = [member.name for member in members_of(load_recipe(str(write_recipe("named", members=lines, **SHARED))))]
    assert found == ["one", "two-learning_rate-1e-2", "two"]


def test_a_grid_stands_for_every_combination_and_is_stored_as_lines(write_recipe: Callable[..., Path]) -> None:
    path = write_recipe("grid", **SHARED)
    grid = "members={seed: [0, 1], method.side_layers: [all, [0, 2]], optimizer.learning_rate: [1e-3, 3e-3]}"
    recipe = load_recipe(str(path), [grid])
    assert recipe.members is not None and recipe.members[2] == "seed=0 'method.side_layers=[0, 2]' optimizer.learning_rate=0.001"
    assert parse_recipe(to_yaml(recipe), "stored") == recipe
    found = [(m.seed, m.method.side_layers, m.optimizer.learning_rate) for m in members_of(recipe)]  # type: ignore[union-attr]
    assert found == [(seed, layers, rate) for seed in (0, 1) for layers in ("all", (0, 2)) for rate in (1e-3, 3e-3)]
    assert len({m.run_name for m in members_of(recipe)}) == 8


@pytest.mark.parametrize(
    "value", [0.003, 1e-05, 7, True, None, "fisher", "true", "no", "", "a b", "12", "~", [1, 2], {"name": "tensor_parallel", "size": 2}]
)
def test_a_value_of_a_grid_is_read_back_as_it_was_written(value: Any) -> None:
    (line,) = grid_as_lines({"key": (value,)})
    tree: dict[str, Any] = {}
    assert decode.apply_overrides(tree, shlex.split(line)) == [] and tree == {"key": value}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"seed": 0}, "members: seed needs a list of values, such as seed: [1, 2]"),
        ({"seed": []}, "members: seed needs a list of values"),
        ([], "members: needs at least 1 value"),
        ({"sed": [0, 1]}, "sed: there is no such key. Did you mean 'seed'?"),
    ],
)
def test_a_grid_without_values_is_refused(grid: Any, message: str, write_recipe: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError) as caught:
        members_of(load_recipe(str(write_recipe("wrong", members=grid, **SHARED))))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("members", "changes", "message"),
    [
        (["seed=0", "seed=1"], {}, "members: seeds differ, so batches would: write data.shuffle_seed=0 for one order of batches"),
        (
            ["training.global_batch_size=6", "training.global_batch_size=4"],
            {},
            "members: training.global_batch_size must be the same for all",
        ),
        (["optimizer.learning_rate=x"], {}, "optimizer.learning_rate: 'x' should be number"),
        (["'method={name: lora}'"], {}, "members: method lora changes the backbone and can't share its pass: write method.name=lst"),
        (["seed=0", "seed=0"], {}, "two of them would share the folder"),
    ],
)
def test_members_that_can_not_share_are_refused(
    members: list[str], changes: dict[str, Any], message: str, write_recipe: Callable[..., Path]
) -> None:
    with pytest.raises(RecipeError) as caught:
        members_of(load_recipe(str(write_recipe("wrong", members=members, **changes))))
    assert message in str(caught.value)

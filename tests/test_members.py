"""Several side networks on one backbone pass: each ends as it would alone, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import train
from test_training import final_weights, losses

from lst_scale.errors import RecipeError
from lst_scale.members import members_of
from lst_scale.recipe import load_recipe

MEMBERS = [
    "seed=0 optimizer.learning_rate=1e-2",
    "seed=1 optimizer.learning_rate=3e-3",
    "seed=0 optimizer.learning_rate=3e-3 method.reduction_factor=2 method.side_layers=[1]",
    "seed=2 optimizer.learning_rate=1e-2 method.design=cross_attention method.side_layers=all",
]
SHARED: dict[str, Any] = {"data__shuffle_seed": 0, "method__dropout": 0.1, "evaluation__max_new_tokens": 3}


def write_each_alone(recipe: Path, folder: Path) -> list[str]:
    """Write a recipe file for each member, into another output folder."""
    paths = []
    for member in members_of(load_recipe(str(recipe))):
        tree = member.model_dump(mode="json") | {"output_dir": str(folder / "alone")}
        path = folder / f"{member.run_name}.yaml"
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

"""What is typed first: --help, --version, `train my.yaml`, and what Python shows of the package."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lst_scale
from helpers.launchers import fresh
from helpers.paths import ROOT
from lst_scale import train
from lst_scale.cli.main import app
from lst_scale.errors import ArgumentError, RecipeError
from lst_scale.recipe.schema import load_recipe
from lst_scale.training.run import run


def told(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def test_help_of_train_shows_its_options() -> None:
    assert all(option in told("train", "--help") for option in ("--recipe", "--resume", "--overwrite", "--print-recipe"))


def test_version_is_told() -> None:
    assert told("--version").strip() == lst_scale.__version__


@pytest.mark.parametrize(
    "words",
    [
        ["RECIPE", "seed=7"],
        ["seed=7", "RECIPE"],
        ["--recipe", "RECIPE", "seed=7"],
        ["--print-recipe", "seed=7", "--recipe=RECIPE"],
        ["--local_rank=0", "RECIPE", "seed=7"],
    ],
)
def test_a_recipe_is_named_by_its_option_or_stands_alone(
    words: list[str], write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_recipe("a=b"))  # a file, whatever its name looks like
    typed = [word.replace("RECIPE", path) for word in words] + ["name=mine", "backbone.checkpoint=t5-small"]
    typed += [] if "--print-recipe" in words else ["--print-recipe"]
    with pytest.raises(RecipeError, match="name"):
        load_recipe(path)
    if "--local_rank=0" not in words:  # which deepspeed inserts into train.py's arguments alone
        assert "seed: 7" in told("train", *typed)
    assert train.main(typed) == 0
    assert "seed: 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no recipe is named: write a YAML file's name, or one of clip-t5-adapters, clip-t5-bitfit, "),
        (["seed=3"], "no recipe is named"),
        (["t5-base", "resume"], "'resume' is no override: write key=value"),
        (["t5-small"], "A model is named by backbone.checkpoint=, not here."),
    ],
)
def test_a_mistake_in_what_is_typed_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words) == 1
    found = capsys.readouterr().err
    assert message in found and found.count("\n") == 1


def test_the_package_lists_its_public_names() -> None:
    assert {"LadderConfig", "LadderEnsemble", "LadderModel", "__version__"} <= set(dir(lst_scale))


def test_an_extra_that_is_missing_is_told_before_anything_is_loaded(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def missing(name: str, *rest: Any) -> Any:
        return None if name == "tensorboard" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    recipe = load_recipe(str(write_recipe("board", logging__tensorboard=True, backbone__checkpoint="/nowhere")))
    with pytest.raises(ArgumentError, match=r"^logging.tensorboard needs tensorboard: pip install 'lst_scale\[tensorboard\]'$"):
        run(recipe)
    assert not (tmp_path / "runs").exists()


def test_deepspeed_has_nothing_to_say_before_a_run_begins() -> None:
    environment = {name: value for name, value in fresh().items() if name != "DS_ACCELERATOR"}
    script = "from lst_scale.system import distributed; distributed.connect(); distributed.disconnect()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout + done.stderr == ""

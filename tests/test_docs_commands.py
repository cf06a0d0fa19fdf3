"""Every command that the README and the documentation show goes through the parser that would carry it out.

Not those in EXCUSED, each with its reason. A new command that is neither fails here. They are carried out in test_commands_in_short.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from packaging.requirements import Requirement
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from helpers.paths import ROOT
from helpers.shown import Shown, commands, folder_of_recipes, lines_of
from lst_scale import train
from lst_scale.cli import slurm
from lst_scale.cli.main import app
from lst_scale.recipe.grid import expand
from lst_scale.recipe.members import load_members
from lst_scale.recipe.schema import load_recipe
from lst_scale.serving.schemas import Classification

SHOWN = commands()
LINES = {shlex.join(shown.words) for shown in SHOWN}
EXCUSED = {  # what a command begins with: why it is not tried
    "jupyter execute": "tests/test_examples.py carries the notebook out",
    "python -m lst_scale.data.easy_vqa": "tests/test_vision_runs.py writes that data set",
    "pip download": "other people's packages, from a registry",
    "apt-get download": "another's package, from Debian",
    "git clone": "git's, and of an older commit",
    "git -C": "git's, and of an older commit",
    "git worktree": "git's, and of an older commit",
    "cd ": "a shell's; what follows it is tried",
    "echo ": "a shell's; what reads it is tried",
    "python benchmarks/pictures.py": "has no options: two paths; tests/test_benchmarks_in_short.py carries it out",
    "python docs/make_": "has no options; tests/test_benchmarks_in_short.py carries both out",
    "sbatch ": "Slurm's; tests/test_slurm_jobs.py submits slurm/train.sbatch",
}
PLANNED = "lst-scale plan --recipe t5-3b backbone.precision=int8 --gpu-memory 16GB --plot plan.png"
NEEDED = {"sweep": ["--recipe", "smollm2-135m"], "plan": ["--recipe", "quickstart"]}  # where a page shows what matters, and leaves it out
NAMES = {"RECIPE": "quickstart", "NAME": "quickstart"}


class Parsed(Exception):
    """The options were understood."""


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, and keep this process's path and environment as they were."""
    path, environment = sys.path.copy(), dict(os.environ)
    with contextlib.chdir(folder):
        yield
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    """Work in a folder that holds the recipes that pages show, and nothing else."""
    with inside(folder_of_recipes(tmp_path / "here")):
        yield


def written_out(words: list[str]) -> list[str]:
    """Put something where a page has a placeholder."""
    return [NAMES.get(word, re.sub(r"=N$", "=0", word)) for word in words if word != "..."]


def try_train(words: list[str]) -> None:
    options = train.parse_arguments(words)
    try_recipe(options.recipe, options.overrides)


def try_recipe(recipe: str | None, words: list[str]) -> None:
    """Decode it with its overrides, as a run does before anything is loaded."""
    rest = list(words)
    name = recipe if recipe is not None else rest.pop(next(n for n, word in enumerate(rest) if "=" not in word))
    load_recipe(name, rest)


def try_command(group: Any, words: list[str]) -> None:
    """Find the command and let it parse its options; decode the recipe that they name."""
    command, name, rest = group, "", written_out(words)
    while isinstance(command, TyperGroup):
        assert rest, "which command?"
        name = rest.pop(0)
        if name.startswith("-"):
            assert not rest and any(name in option.opts for option in command.params), f"there is no option {name!r}"
            return
        assert name in command.commands, f"there is no command {name!r}, but {', '.join(command.commands)}"
        command = command.commands[name]
    if not rest and any(option.required for option in command.params):
        return  # its name alone, in a sentence
    if "--recipe" not in rest:
        rest += NEEDED.get(name, [])
    values = command.make_context(name, rest).params
    if name in ("train", "plan", "submit") and (values.get("recipe") or values.get("words")):
        try_recipe(values.get("recipe"), values.get("words") or values.get("overrides") or [])
    elif name == "sweep":
        assert load_members(values["recipe"], [[*line] for line in expand(values["overrides"] or [])])


def try_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file of ours parse its options, and stop it there."""
    path = ROOT / words[0]
    assert path.is_file(), path
    if path.parent.name == "slurm":
        try_command(get_command(slurm.app), [path.stem, *words[1:]])
        return
    parse = argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> NoReturn:
        _, unknown = parse(self, *arguments, **options)
        assert not unknown, unknown
        raise Parsed

    for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    monkeypatch.setattr(sys, "argv", [str(path), *words[1:]])
    monkeypatch.syspath_prepend(str(path.parent))  # as Python does
    with pytest.raises(Parsed):
        runpy.run_path(str(path), run_name="__main__")


def try_make(words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr


def try_pip(words: list[str]) -> None:
    assert words.pop(0) == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if word != "." and not word.startswith("-"):
            wanted = Requirement(f"lst_scale{word[1:]}" if word.startswith(".[") else word)
            assert wanted.name not in ("lst_scale", "lst-scale") or wanted.extras <= extras.keys(), f"{word}: there are {', '.join(extras)}"


def try_deepspeed(words: list[str]) -> None:
    script = words.index("lst_scale/train.py")
    assert all(word.isdigit() or word in ("--num_accelerators", "--master_port") for word in words[:script])
    try_train(written_out(words[script + 1 :]))


def try_torchrun(words: list[str]) -> None:
    assert words.pop(0).replace("_", "-") == "--nproc-per-node" and words.pop(0).isdigit()
    assert words[:2] == ["-m", "lst_scale.cli"], "torchrun starts lst_scale.cli"
    try_command(get_command(app), words[2:])


def try_curl(words: list[str]) -> None:
    assert any(word.endswith("/v1/classify") for word in words)
    Classification.model_validate(json.loads(words[words.index("-d") + 1]))


def try_shell(words: list[str]) -> None:
    subprocess.run(["bash", "-n", ROOT / words[0]], check=True)


def try_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[:2] == ["-m", "lst_scale.train"]:
        try_train(written_out(words[2:]))
    else:
        try_script(words, monkeypatch)


PARSED: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "lst-scale": lambda words, _: try_command(get_command(app), words),
    "python": try_python,
    "deepspeed": lambda words, _: try_deepspeed(words),
    "torchrun": lambda words, _: try_torchrun(words),
    "make": lambda words, _: try_make(words),
    "pip": lambda words, _: try_pip(words),
    "curl": lambda words, _: try_curl(words),
    "bash": lambda words, _: try_shell(words),
}


def excuse_of(shown: Shown) -> str | None:
    line = shlex.join(shown.words) + " "
    return next((reason for start, reason in EXCUSED.items() if line.startswith(start)), None)


@pytest.mark.parametrize("shown", [each for each in SHOWN if excuse_of(each) is None], ids=lambda each: shlex.join(each.words)[:90])
def test_a_command_that_is_shown_is_understood(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown.program in PARSED, f"{shown.page}: {shown.line}: carry it out here, or excuse it with a reason"
    PARSED[shown.program](list(shown.words[1:]), monkeypatch)


@pytest.mark.slow
def test_the_plan_that_pages_show_is_what_its_command_says() -> None:
    """Four pages name peaks of T5-3B by method and precision; all are the planner's own."""
    assert PLANNED in LINES
    planned = json.loads(CliRunner().invoke(app, [*shlex.split(PLANNED)[1:], "--json"]).stdout)["methods"]
    peaks = {each["method"]: each["peak_bytes"] / 1e9 for each in planned}
    assert Path("plan.png").is_file()
    for page, rows in (("README.md", 5), ("docs/index.md", 5), ("docs/plan.md", 7)):
        text = (ROOT / page).read_text()
        table = re.search(r"^\| T5-3B, 100 rows of 128 tokens.*\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
        assert table is not None, page
        shown = re.findall(r"^\| (\w.*?) \| (\w+) \| ([\d.]+) GB \|$", table[1], flags=re.MULTILINE)
        assert len(shown) == rows, page
        for method, precision, peak in shown:
            assert f"{peaks[name_of(method, precision)]:{'.1f' if '.' in peak else '.0f'}}" == peak, (page, method)


@pytest.mark.slow
def test_the_plans_of_language_models_are_those_of_their_recipes() -> None:
    text = (ROOT / "docs" / "plan.md").read_text()
    lines = re.findall(r"^\| `([\w.-]+)`(.*?) \| (\d+) \| (.*) \|$", text, flags=re.MULTILINE)
    assert len(lines) == 6
    methods = ("lst", "QLoRA, nf4, checkpointed", "LoRA, bf16, checkpointed", "LoRA, bf16")
    for name, more, rows, shown in lines:
        gpus = 2 if "2 GPUs" in more else 1
        planned = json.loads(CliRunner().invoke(app, ["plan", "--recipe", name, "--gpus", str(gpus), "--json"]).stdout)
        peaks = {each["method"]: each["peak_bytes"] / 1e9 for each in planned["methods"]}
        for method, peak in zip(methods, shown.split(" | "), strict=True):
            assert f"{peaks[method]:{'.1f' if '.' in peak else '.0f'}} GB" == peak, (name, method)
        assert load_recipe(name).training.global_batch_size == gpus * int(rows)


def name_of(method: str, precision: str) -> str:
    """Return what the planner calls a line of these tables."""
    kind = "lst" if method.startswith("side network") else method.split()[0]
    return f"{kind}, {precision}{', checkpointed' if 'checkpointing' in method else ''}" if "LoRA" in kind else kind


def test_every_excuse_is_of_a_command_that_is_shown_and_each_program_is_looked_at() -> None:
    assert [start for start in EXCUSED if not any(f"{line} ".startswith(start) for line in LINES)] == []
    assert len(SHOWN) > 60 and {"lst-scale", "python", "deepspeed", "make"} <= {shown.program for shown in SHOWN}


@pytest.mark.parametrize(
    "line",
    [
        "lst-scale trian kinds.yaml",
        "lst-scale train kinds.yaml --nodes 2",
        "lst-scale train kinds.yaml training.epoch=2",
        "deepspeed lst_scale/train.py --recipe t5-4b",
        "python slurm/sweep.py --recipe t5-base seed=0,1 method.factor=2",
        "python examples/with_peft.py --step 3 --nothing",
        "make quickstrat",
        "pip install 'lst_scale[serv]'",
        "lst-scale --instal-completion",
        "rm -rf runs",
    ],
)
def test_a_command_with_a_mistake_would_be_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [text] = lines_of(f"```bash\n{line}\n```")
    words = shlex.split(text)
    with pytest.raises((Exception, SystemExit)) as found:
        PARSED[words[0]](words[1:], monkeypatch)
    assert found.type is not Parsed

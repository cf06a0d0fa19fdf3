"""Ctrl-C, and a terminal that closes: once saves and says how to go on, twice leaves at once; never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.launchers import fresh
from helpers.paths import ROOT
from helpers.recipes import recipe_writer
from lst_scale.errors import LstScaleError
from lst_scale.recipe.schema import load_recipe
from lst_scale.runs import logs
from lst_scale.system import preemption
from lst_scale.system.preemption import Interrupted, Request
from lst_scale.training import checkpoint, evaluation, loop, member, shared
from lst_scale.training.run import run
from lst_scale.training.shared import build_cache

SIGNALS = (signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Begin as at a terminal, where a shell's background job would ignore Ctrl-C, and give pytest its own handlers back."""
    numbers = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    preemption._asked = preemption._Asked()


def python(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh process, which ignores no signal."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=fresh() | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


ASK = "import os, signal, sys, time; from lst_scale.system import preemption; preemption.listen('go on with X')\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_once_only_asks_and_twice_leaves_at_once_with_a_line(number: int) -> None:
    done = python(f"{ASK}os.kill(os.getpid(), {number}); print(int(preemption.requested()), flush=True); os.kill(os.getpid(), {number})")
    assert (done.returncode, done.stdout) == (128 + number, "1\n")
    assert done.stderr == "stopping at the next safe point; once more leaves at once\nleft at once: go on with X\n"


def test_a_launcher_that_passes_ctrl_c_on_to_its_ranks_asks_once() -> None:
    script = f"{ASK}os.kill(os.getpid(), 2); os.kill(os.getpid(), 2); os.kill(os.getpid(), 15); print(int(preemption.requested()))"
    done = python(script, RANK="0")
    assert (done.returncode, done.stdout) == (0, f"{int(Request.STOP)}\n")
    done = python(f"{ASK}preemption.ECHO_SECONDS = 0\nos.kill(os.getpid(), 2); os.kill(os.getpid(), 2)", RANK="0")
    assert done.returncode == 130


def test_ranks_other_than_the_first_are_silent() -> None:
    done = python(f"{ASK}os.kill(os.getpid(), 2); preemption.ECHO_SECONDS = 0; os.kill(os.getpid(), 2)", RANK="1")
    assert (done.returncode, done.stderr) == (130, "")


def test_what_nohup_ignores_stays_ignored() -> None:
    script = "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); from lst_scale.system import preemption; preemption.listen()"
    done = python(f"{script}\nos.kill(os.getpid(), 1); os.kill(os.getpid(), 1); print(int(preemption.requested()))")
    assert done.stdout == "0\n"


def test_the_greatest_request_wins_and_gives_the_exit_status() -> None:
    preemption.listen()
    os.kill(os.getpid(), signal.SIGINT)
    assert preemption.requested() is Request.LEAVE and preemption.exit_status(Interrupted(Request.LEAVE)) == 130
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.requested() is Request.STOP and preemption.exit_status(Interrupted(Request.STOP)) == 1
    assert preemption.exit_status(LstScaleError("x")) == 1
    preemption.listen()
    assert preemption.requested() is Request.NONE


# Ctrl-C while a module is imported: sent by what looks for modules.
WHILE_IMPORTING = """
import os, runpy, signal, sys
wanted, start, *arguments = sys.argv[1:]
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == wanted: os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Hook())
sys.argv = [start, *arguments]
if start.endswith(".py"): runpy.run_path(start, run_name="__main__")
else: runpy.run_module(start, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["typer", "pydantic", "yaml", "lst_scale.cli.main", "lst_scale.recipe.schema"])
@pytest.mark.parametrize("start", ["lst_scale", "lst_scale.cli.main", "lst_scale/train.py", "lst_scale.train"])
def test_ctrl_c_during_the_first_imports_is_one_line(start: str, module: str) -> None:
    if (module == "lst_scale.cli.main" and start != "lst_scale") or (module == "typer" and "train" in start):
        return  # it begins with that, or does not need it
    done = python(WHILE_IMPORTING, module, start, *(["--version"] if "train" in start else ["recipes"]))
    assert (done.returncode, done.stderr) == (130, "stopped\n")


# Each phase by a function that it calls: the signal comes in there.
PHASES: dict[str, tuple[Any, str, int]] = {
    "loading": (shared, "load_tokenizer", 1),
    "training": (loop, "learning_rate", 3),
    "saving": (checkpoint, "save_file", 2),
    "evaluation": (evaluation, "generated", 2),
    "saving the best": (member, "save_file", 1),
    "the last evaluation": (evaluation, "generated", 8),
}


def raise_in(monkeypatch: pytest.MonkeyPatch, phase: str, number: int) -> None:
    """Send this process a signal in the middle of a phase."""
    module, name, at = PHASES[phase]
    real, calls = getattr(module, name), iter(range(1, 10**9))

    def signalled(*arguments: Any, **options: Any) -> Any:
        if next(calls) == at:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, signalled)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_t5_dir: Path) -> dict[str, Tensor]:
    path = recipe_writer(tmp_path_factory.mktemp("whole"), tiny_t5_dir)("whole", training__save_every_steps=3, evaluation__batch_size=2)
    run(load_recipe(str(path)))
    return final_weights(path.parent / "runs" / "whole-kind-seed0")


def final_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(max((folder / "checkpoints").glob("step-*")) / "weights.safetensors")


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_saves_and_the_resumed_run_ends_as_if_nothing_had_been(
    phase: str,
    undisturbed: dict[str, Tensor],
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = load_recipe(str(write_recipe("stopped", training__save_every_steps=3, evaluation__batch_size=2)))
    folder = tmp_path / "runs" / "stopped-kind-seed0"
    preemption.listen()
    raise_in(monkeypatch, phase, signal.SIGINT)
    with pytest.raises(Interrupted, match=r"^stopped by a signal: continue with --resume$") as caught:
        run(recipe)
    assert preemption.exit_status(caught.value) == 130
    lost = {"loading": 0, "training": 3, "saving": 4, "evaluation": 4, "saving the best": 4, "the last evaluation": 8}[phase]
    assert [int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")][-1:] == ([lost] if lost else [])
    preemption.listen()
    monkeypatch.undo()
    run(recipe, resume=True)
    found = final_weights(folder)
    assert found.keys() == undisturbed.keys() and all(torch.equal(found[name], undisturbed[name]) for name in found)


def test_ctrl_c_while_a_cache_is_built_keeps_what_is_written(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe("taps", cache={"enabled": True, "folder": str(tmp_path / "taps"), "dtype": "fp32"})
    preemption.listen("start it again, rows that are written stay")
    real, calls = shared.taps_of, iter(range(100))

    def signalled(*arguments: Any) -> Any:
        if next(calls) == 2:  # at the third batch
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(shared, "taps_of", signalled)
    with pytest.raises(Interrupted, match="start it again, rows that are written stay"):
        build_cache(load_recipe(str(path)))
    preemption.listen()
    monkeypatch.undo()
    written = sum(file.stat().st_size for file in (tmp_path / "taps").rglob("*.taps"))
    assert build_cache(load_recipe(str(path)))[0] == 22
    assert 0 < written < sum(file.stat().st_size for file in (tmp_path / "taps").rglob("*.taps"))


def test_a_terminal_that_is_gone_does_not_keep_a_run_from_saving(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    preemption.listen()
    raise_in(monkeypatch, "training", signal.SIGHUP)
    monkeypatch.setattr(logs.Console, "print", gone)
    with pytest.raises(Interrupted):
        run(load_recipe(str(write_recipe("gone"))))
    assert (tmp_path / "runs" / "gone-kind-seed0" / "checkpoints" / "step-00000003").is_dir()

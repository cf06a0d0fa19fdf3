"""Names to tasks of lm_eval: its own, and those of a folder of YAML files.

A file of tasks may name functions of Python files beside it (`!function`): code of the folder's owner, which runs. Code that the hub would
send is never run: data sets have none since `datasets` 4, and a metric that is such code is refused.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from lst_scale.errors import ArgumentError, LstScaleError, fence, printable, reason_of

NEAR = 5  # names that a message offers


def load_tasks(names: Sequence[str], folders: Sequence[Path], num_fewshot: int | None, *, seed: int) -> dict[str, Any]:
    """Return lm_eval's record of tasks and groups, their rows read.

    Args:
        folders: of YAML files, whose tasks come before those of lm_eval itself.
        num_fewshot: labelled examples before each question; None: as each task says.
        seed: of the choice of these examples.

    Raises:
        ArgumentError: a name is that of no task, a file can't be read, a data set can't be had, or a task runs code that is refused.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ArgumentError(f"--include {folder} is no folder: give one with YAML files of tasks")
    manager = _manager(names, folders)
    with code_of_the_hub_refused() as refused:
        with mistakes_of_tasks(f"--tasks {printable(','.join(names))} can't be loaded", folders):
            loaded: dict[str, Any] = manager.load(list(names))
        if refused:
            raise ArgumentError(
                f"a metric is code that the hub would send ({', '.join(refused)}), which is never run: "
                "name one of lm_eval's own, or a function of yours (metric: !function my.metric)"
            )
    for name, task in loaded["tasks"].items():
        _refuse(name, task)
        _set_examples(task, num_fewshot, seed)
    return loaded


def _manager(names: Sequence[str], folders: Sequence[Path]) -> TaskManager:
    """Return what finds tasks; lm_eval's own 15,000 files are read only where the folders don't hold all that is asked."""
    paths = list(map(str, folders))
    own = TaskManager(include_path=paths, include_defaults=False) if paths else None
    if own is not None and not _unknown(names, own) and not _leads_outside(names, own):
        return own
    for folder in folders:
        _refuse_unreadable(folder)
    manager = TaskManager(include_path=paths or None)
    for name in _unknown(names, manager):
        near = difflib.get_close_matches(name, [] if own is None else own.all_tasks, n=NEAR)
        near = near or difflib.get_close_matches(name, manager.all_tasks, n=NEAR)
        there = near or ([] if own is None else own.all_tasks[:NEAR])
        where = f"no task of lm_eval{' or in ' + ', '.join(paths) if paths else ''} is"
        hint = f"near it are {', '.join(there)}" if near else f"there are {', '.join(there)}" if there else "lm-eval ls tasks lists them"
        raise ArgumentError(f"{where} called {printable(repr(name))}: {printable(hint)}")
    return manager


def _unknown(names: Sequence[str], manager: TaskManager) -> list[str]:
    return [name for name in names if name not in manager.task_index]


def _leads_outside(names: Sequence[str], manager: TaskManager) -> bool:
    """Whether a group among these has members that its folder does not hold."""
    configs = [manager.task_index[name].cfg or {} for name in names]
    members = [member for config in configs if isinstance(config.get("task"), list) for member in config["task"]]
    named = [member if isinstance(member, str) else member.get("task", member.get("group")) for member in members]
    return any(isinstance(name, str) and name not in manager.task_index for name in named)


def _refuse_unreadable(folder: Path) -> None:
    """Refuse a folder with a file that lm_eval would have passed over in silence.

    Raises:
        ArgumentError: names the file, and what is wrong.
    """
    try:
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError:  # it is no public name, and what it does here is to say more
        return
    for path in sorted(folder.rglob("*.yaml")):
        with fence(ArgumentError, f"{path} can't be read as a task"):
            load_yaml(path, resolve_func=False)


def _refuse(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ArgumentError(f"{name} runs code that the model writes, which is not done here: leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise ArgumentError(f"{name} shows pictures or sound, and text alone is read here: leave it out")


def refuse_texts_alone(loaded: dict[str, Any]) -> None:
    """Refuse tasks without questions, for a model that answers a source.

    Raises:
        ArgumentError: names one.
    """
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise ArgumentError(
                f"{name} asks how likely a text is by itself, which a model that answers a source can't say: choose a task with questions"
            )


def _set_examples(task: Any, num_fewshot: int | None, seed: int) -> None:
    """Say how many examples stand before a question, as lm_eval does: a task that says 0 itself keeps that."""
    said = task.get_config("num_fewshot")
    if said is None or (num_fewshot is not None and said != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=seed)


@contextlib.contextmanager
def mistakes_of_tasks(what: str, folders: Sequence[Path], is_ours: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn what a task's rows, templates and functions get wrong into the line "what: reason", with the place in these folders' code.

    Args:
        is_ours: whether a mistake is none of the task's; asked when there is one.

    Raises:
        ArgumentError: something went wrong.
    """
    try:
        yield
    except LstScaleError:
        raise
    except Exception as error:
        if is_ours():
            raise
        inside = [
            frame for frame in traceback.extract_tb(error.__traceback__) if any(map(Path(frame.filename).is_relative_to, _whole(folders)))
        ]
        place = f" ({Path(inside[-1].filename).name}, line {inside[-1].lineno})" if inside else ""
        raise ArgumentError(f"{what}: {reason_of(error)}{place}") from error


def _whole(folders: Sequence[Path]) -> list[Path]:
    return [folder.resolve() for folder in folders]


@contextlib.contextmanager
def code_of_the_hub_refused() -> Iterator[list[str]]:
    """Let `evaluate.load`, which runs what it downloads, refuse while the body runs; give the names that were asked for.

    It stands in for a public function of another library, since lm_eval calls that for every metric that it does not know.
    """
    import evaluate

    asked: list[str] = []
    theirs = evaluate.load

    def refuse(path: str, *_: Any, **__: Any) -> Any:
        asked.append(printable(str(path)))
        raise ArgumentError(f"metric {printable(str(path))} is code that the hub would send, which is never run")

    logger = logging.getLogger("lm_eval")
    level = logger.level
    evaluate.load = refuse
    logger.setLevel(logging.CRITICAL)  # it tells what it assumes of each metric, in lines of its own
    try:
        yield asked
    finally:
        evaluate.load = theirs
        logger.setLevel(level)

"""Who is told how a run goes, beside its own files: trackers (`logging.report_to`) and classes of one's own (`logging.callbacks`).

Rank 0 alone tells. One that can't begin ends the run before the backbone is loaded, in one line. One that fails later never ends it: the
run says so, at once and again at its end, tells that one nothing more, and goes on; what it would have told is in metrics.jsonl.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lst_scale.errors import ArgumentError, LstScaleError, RecipeError, fence, reason_of
from lst_scale.recipe.schema import LoggingRecipe, Recipe
from lst_scale.runs.callback import About, Callback
from lst_scale.runs.trackers import TRACKERS
from lst_scale.system.durable import write_file
from lst_scale.system.extras import require
from lst_scale.system.own_code import own

IDS = "trackers.json"  # in a run's folder: by what name each tracker knows the run
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}  # what is imported, by tracker
METHODS = ("on_step", "on_evaluate", "on_end")


def check_callbacks(recipe: LoggingRecipe) -> None:
    """Refuse what can't be told, before anything is computed: a package that is missing, a class that is none.

    Raises:
        ArgumentError: a package is missing; says how to install it.
        RecipeError: a class of one's own can't be imported, or lacks a method.
    """
    for name in recipe.reports:
        by = "logging.tensorboard" if recipe.tensorboard and name == "tensorboard" else "logging.report_to"
        require(PACKAGES[name], name, asked_by=by)
    for name in recipe.callbacks:
        missing = [method for method in METHODS if not callable(getattr(_own(name), method, None))]
        if missing:
            raise RecipeError(f"logging.callbacks: {name} has no {missing[0]}: write {', '.join(METHODS)}")


class Callbacks:
    """All of one run. What one of them raises is told by `say`, and kept in `failed`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._there: dict[str, Callback] = {}
        self.failed: dict[str, str] = {}

    def start(self, recipe: Recipe, folder: Path, *, resume: bool) -> None:
        """Make them. Rank 0 only.

        Raises:
            ArgumentError: one can't begin.
        """
        ids = _read_ids(folder) if resume else {}
        for name, make in _makers(recipe.logging):
            about = self._about(name, ids, recipe, folder, resume=resume)
            with fence(ArgumentError, f"logging: {name} could not begin"):
                self._there[name] = make(about)
            if not about.resumed:
                about.keep_id(ids[name])  # only now: one that could not begin knows no run that could go on

    def _about(self, name: str, ids: dict[str, str], recipe: Recipe, folder: Path, *, resume: bool) -> About:
        def keep(found: str) -> None:
            ids[name] = found
            write_file(folder / IDS, json.dumps(ids) + "\n")

        resumed = resume and name in ids
        if not resumed:
            ids[name] = uuid.uuid4().hex[:12]
        return About(
            name=recipe.run_name,
            project=recipe.logging.project,
            folder=folder,
            recipe=recipe.model_dump(mode="json"),
            resumed=resumed,
            id=ids[name],
            keep_id=keep,
        )

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self._tell(f"step {step}", lambda each: each.on_step(step, dict(values)))

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        self._tell(f"the evaluation after step {step}", lambda each: each.on_evaluate(step, dict(values)))

    def on_end(self, result: Mapping[str, Any] | None, error: BaseException | None) -> None:
        """Tell the end, once; those that failed are named again."""
        earlier = dict(self.failed)
        self._tell("the end", lambda each: each.on_end(result, error))
        self._there, self.failed = {}, {}
        for name, why in earlier.items():
            self._say(f"{name} was not told all of this run ({why})")

    def _tell(self, what: str, call: Callable[[Callback], None]) -> None:
        for name, each in list(self._there.items()):
            try:
                call(each)
            except (Exception, SystemExit) as error:
                self.failed[name] = f"{what}: {type(error).__name__}: {reason_of(error)}"
                self._say(f"{name} failed at {self.failed[name]}; it is told nothing more, and the run goes on")
                del self._there[name]


def _makers(recipe: LoggingRecipe) -> Iterator[tuple[str, Callable[[About], Callback]]]:
    for name in recipe.reports:
        yield name, TRACKERS[name]
    for name in recipe.callbacks:
        yield name, _own(name)


def _own(name: str) -> Any:
    return own(name, asked_by="logging.callbacks", what="class")


def _read_ids(folder: Path) -> dict[str, str]:
    """Return what the trackers call this run; nothing where they never knew it, or the file is damaged."""
    try:
        with fence(LstScaleError, str(folder / IDS)):
            found = json.loads((folder / IDS).read_bytes())
            return {str(name): value for name, value in found.items() if isinstance(value, str)}
    except LstScaleError:
        return {}

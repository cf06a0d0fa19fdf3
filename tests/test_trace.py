"""What a step costs beside its own work, and where its time goes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lst_scale.errors import RecipeError, TrainingError
from lst_scale.methods.lst import LadderTrainee
from lst_scale.recipe.schema import load_recipe
from lst_scale.system import distributed
from lst_scale.training.loop import Trainer
from lst_scale.training.run import run


def test_the_steps_that_a_recipe_names_are_traced_once_for_all_members(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    members = ["seed=0", "seed=1"]
    path = write_recipe("traced", members=members, data__shuffle_seed=0, training__max_steps=4, logging__profile_steps=[2, 3])
    run(load_recipe(str(path)))
    (trace,) = (tmp_path / "runs").rglob("profile/*")
    assert trace.name == "steps-2-3-rank0.trace.json"
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "Optimizer.step#AdamW.step" in names and len(names) > 50


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_ends_while_it_is_traced_leaves_the_trace_of_what_it_did(
    fails: bool, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(trainer: Trainer, step: int) -> None:
        if fails and step == 2:
            raise TrainingError("no gradient")

    monkeypatch.setattr(Trainer, "_refuse_gradient", refuse)
    recipe = load_recipe(str(write_recipe("short", training__max_steps=3, logging__profile_steps=[2, 9])))
    with pytest.raises(TrainingError, match="no gradient") if fails else contextlib.nullcontext():
        run(recipe)
    (trace,) = (tmp_path / "runs").rglob("profile/*")
    assert trace.name == f"steps-2-{2 if fails else 3}-rank0.trace.json" and json.loads(trace.read_text())["traceEvents"]


def test_a_trace_that_ends_before_it_begins_is_refused(write_recipe: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=r"profile_steps \[13, 10\] ends before it begins: write \[10, 13\]"):
        load_recipe(str(write_recipe("wrong", logging__profile_steps=[13, 10])))


def test_ranks_speak_once_a_step_and_losses_stay_where_they_were_made(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    asked, summed, nll = distributed.poll_interruption, distributed.sum_over_ranks, LadderTrainee.nll

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: calls.append(name) or real(*arguments)  # type: ignore[func-returns-value]

    class Unread(Tensor):
        """A loss that nobody may wait for."""

        def __float__(self) -> float:
            raise AssertionError("a micro-batch's loss was read")

        item = __bool__ = __float__  # type: ignore[assignment]

    monkeypatch.setattr(distributed, "poll_interruption", counted("poll", asked))
    monkeypatch.setattr(distributed, "sum_over_ranks", counted("sum", summed))
    monkeypatch.setattr(LadderTrainee, "nll", lambda *arguments: nll(*arguments).as_subclass(Unread))
    run(load_recipe(str(write_recipe("quiet", training__max_steps=4, training__evaluate_every=4))))
    first, last = calls.index("sum"), len(calls) - calls[::-1].index("sum")
    assert calls[first:last] == ["sum"] * 4

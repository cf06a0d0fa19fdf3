"""A program for a process of its own: DeepSpeed's ZeRO-3 changes torch.nn.functional.linear for the rest of a process."""

from __future__ import annotations

import gc
import json
import weakref
from typing import Any

from lst_scale.recipe.schema import load_recipe
from lst_scale.training import finish, member
from lst_scale.training.run import run


def train_and_tell(arguments: list[str]) -> None:
    """Train the members of one recipe and print, as each writes its result, whose weights are still in memory."""
    weights: list[weakref.ref[Any]] = []
    build, write_result = member.build_trainee, finish.write_result

    def building(*arguments: Any, **options: Any) -> Any:
        trainee = build(*arguments, **options)
        weights.append(weakref.ref(next(iter(trainee.module.parameters()))))
        return trainee

    def writing(*arguments: Any) -> None:
        gc.collect()
        print("alive", json.dumps([weight() is not None for weight in weights]), flush=True)
        write_result(*arguments)

    member.build_trainee, finish.write_result = building, writing
    run(load_recipe(arguments[0]))

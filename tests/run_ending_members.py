"""Train three members of different lengths and print, as each writes its result, whose weights are still in memory.

In a process of its own: DeepSpeed's ZeRO-3 changes torch.nn.functional.linear for the rest of a process.
"""

import gc
import json
import sys
import weakref
from typing import Any

from lst_scale.recipe import load_recipe
from lst_scale.run import run
from lst_scale.training import member

weights: list[weakref.ref[Any]] = []
build, write_result = member.build_trainee, member.write_result


def building(*arguments: Any, **options: Any) -> Any:
    trainee = build(*arguments, **options)
    weights.append(weakref.ref(next(iter(trainee.module.parameters()))))
    return trainee


def writing(*arguments: Any) -> None:
    gc.collect()
    print("alive", json.dumps([weight() is not None for weight in weights]), flush=True)
    write_result(*arguments)


member.build_trainee, member.write_result = building, writing
run(load_recipe(sys.argv[1]))

"""Which of the backbone's weights matter for a task, where a recipe wants its side network carved out by Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lst_scale.backbone.taps import Backbone
from lst_scale.backbone.weights.checkpoint import open_checkpoint
from lst_scale.backbone.weights.fisher import Example, fisher_importance, stored_importance
from lst_scale.data.columns import Numbers
from lst_scale.data.encode import EncodedSplit
from lst_scale.recipe.method import LstRecipe
from lst_scale.recipe.schema import Recipe
from lst_scale.system import distributed
from lst_scale.system.assets import cache_folder
from lst_scale.system.distributed import World


def task_importance(recipe: Recipe, splits: Sequence[EncodedSplit], backbone: Backbone, world: World) -> Callable[[str], Tensor] | None:
    """Return the backbone's Fisher information on the training rows of all tasks, shuffled together; from an earlier run on this machine
    where there was one.

    None: the recipe asks for none. All ranks must call it.
    """
    method = recipe.method
    if not isinstance(method, LstRecipe) or method.initialization != "fisher":
        return None
    rows = [split.rows_of_epoch(0, recipe.seed) for split in splits]
    ends = np.cumsum([len(each) for each in rows])
    order = torch.randperm(int(ends[-1]), generator=torch.Generator().manual_seed(recipe.seed))[: method.fisher_samples].tolist()
    examples = []
    for place in order:
        task = int(np.searchsorted(ends, place, side="right"))
        row = rows[task][place - int(ends[task])]  # counted from the end, where the task's rows end
        examples.append(Example(input_ids_S=_tensor(splits[task].input_ids[row]), labels_T=_tensor(splits[task].labels[row])))
    tree = recipe.model_dump(mode="json")
    key = {"backbone": backbone.identity.fingerprint, "task": tree["task"], "data": tree["data"], "samples": len(examples)}
    key |= {"rows": [split.digest for split in splits], "seed": recipe.seed} | ({} if recipe.tasks is None else {"tasks": tree["tasks"]})
    folder = cache_folder("fisher")

    def make() -> dict[str, Tensor]:
        return fisher_importance(open_checkpoint(recipe.backbone.checkpoint, recipe.backbone.revision), examples, world.device)

    if world.local_rank == 0:
        stored_importance(folder, key, make)
    distributed.barrier()
    return stored_importance(folder, key, make)


def _tensor(ids: Numbers) -> Tensor:
    return torch.tensor(ids, dtype=torch.long)

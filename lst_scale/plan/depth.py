"""A step of a deep model from steps of shallow ones.

Blocks are alike, so whatever a moment of a step holds grows by the same bytes with every block. Two shallow steps give those bytes exactly
(`tests/test_plan.py` compares them with whole steps), in a fraction of the time. Where that is not so (ranks that share a backbone, stacks
of different depths, a ladder on more than the last layer), the whole is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

from lst_scale.plan.footprint import MOMENTS, Footprint, Setting, footprint, packed_otherwise, worst_of
from lst_scale.plan.forward import pass_footprint
from lst_scale.recipe.backbone import Replicated
from lst_scale.recipe.method import LstRecipe, ProbeRecipe
from lst_scale.recipe.schema import Recipe
from lst_scale.side.count import Shape

RUN_PACKED = "int8"  # the packing that steps are run in; in another one only the held weights are other
SHALLOWEST = 2  # the first block of a stack, which holds the position table, and one like all the others


def planned(recipe: Recipe, shape: Shape, setting: Setting) -> Footprint:
    """Return what one step needs on each rank, as `footprint` does."""
    if isinstance(recipe.method, ProbeRecipe):
        return pass_footprint(recipe, shape, setting)
    depth = shape.spec.depth
    shallow = [(number, shape.spec.with_depth(number)) for number in (SHALLOWEST, SHALLOWEST + 1)]
    if depth <= SHALLOWEST + 1 or not isinstance(recipe.backbone.placement, Replicated):
        return _run(recipe, shape, setting)
    if isinstance(recipe.method, LstRecipe) and recipe.method.side_layers != (depth - 1,):
        return _run(recipe, shape, setting)
    steps = [_run(_on_the_last(recipe, number), replace(shape, spec=spec), setting) for number, spec in shallow if spec is not None]
    if not steps:
        return _run(recipe, shape, setting)
    first, second = steps
    return _sum([(first, 1 - (depth - SHALLOWEST)), (second, depth - SHALLOWEST)])


@cache
def _run(recipe: Recipe, shape: Shape, setting: Setting) -> Footprint:
    """Return a step's footprint; where only the packing is another than that of a step that was run, without running it again."""
    if setting.packed in (None, RUN_PACKED):
        return footprint(recipe, shape, setting)
    found = _run(recipe, shape, replace(setting, packed=RUN_PACKED))
    return packed_otherwise(found, recipe, shape, before=RUN_PACKED, after=setting.packed)


def _on_the_last(recipe: Recipe, number: int) -> Recipe:
    """Return a ladder's recipe for so many blocks, the last of them kept; any other recipe as it is."""
    if not isinstance(recipe.method, LstRecipe):
        return recipe
    return recipe.model_copy(update={"method": recipe.method.model_copy(update={"side_layers": (number - 1,)})})


def _sum(weighted: list[tuple[Footprint, int]]) -> Footprint:
    """Return a sum of footprints, each as often as said; the weights' sum is one."""

    def parts(moment: str) -> Mapping[str, int]:
        names = dict.fromkeys(name for found, _ in weighted for name in found.moments[moment])
        return {name: sum(times * found.moments[moment].get(name, 0) for found, times in weighted) for name in names}

    return worst_of(
        {moment: dict(parts(moment)) for moment in MOMENTS},
        kept=sum(times * found.kept for found, times in weighted),
        trainable=sum(times * found.trainable for found, times in weighted),
    )

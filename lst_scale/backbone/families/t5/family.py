"""The T5 family as one object; each of its sides is a file of its own."""

from __future__ import annotations

from lst_scale.backbone.families import Family
from lst_scale.backbone.families.t5.inside import T5Inside
from lst_scale.backbone.families.t5.model import T5Blocks, T5Model
from lst_scale.backbone.families.t5.side import T5Side, T5Start
from lst_scale.backbone.families.two_stacks import TwoStacks


class T5(TwoStacks, T5Model, T5Blocks, T5Inside, T5Side, T5Start):
    """All that the package must know of T5."""


FAMILY: Family = T5()

"""The T5Gemma family as one object; each of its sides is a file of its own."""

from __future__ import annotations

from lst_scale.backbone.families import Family
from lst_scale.backbone.families.t5gemma.inside import T5GemmaInside
from lst_scale.backbone.families.t5gemma.model import T5GemmaBlocks, T5GemmaModel
from lst_scale.backbone.families.t5gemma.side import T5GemmaSide, T5GemmaStart
from lst_scale.backbone.families.two_stacks import TwoStacks


class T5Gemma(TwoStacks, T5GemmaModel, T5GemmaBlocks, T5GemmaInside, T5GemmaSide, T5GemmaStart):
    """All that the package must know of T5Gemma 2."""


FAMILY: Family = T5Gemma()

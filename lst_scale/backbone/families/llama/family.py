"""Llama and its kin as one object; each of its sides is a file of its own."""

from __future__ import annotations

from lst_scale.backbone.families import Family
from lst_scale.backbone.families.llama.inside import LlamaInside
from lst_scale.backbone.families.llama.model import LlamaBlocks, LlamaModel
from lst_scale.backbone.families.llama.side import LlamaSide, LlamaStart
from lst_scale.backbone.families.llama.tail import LlamaTail


class Llama(LlamaModel, LlamaBlocks, LlamaInside, LlamaSide, LlamaStart, LlamaTail):
    """All that the package must know of decoder-only models."""


FAMILY: Family = Llama()

"""LoRA as peft runs it (Hu et al. 2021), in sizes alone: on fake tensors it takes the room that peft's takes, and importing peft takes
longer than planning (with bitsandbytes, which it brings along, two seconds).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone.families import Family
from lst_scale.backbone.weights.precision import replace
from lst_scale.methods.inside import add_biases
from lst_scale.recipe.method import LoraRecipe


class SizedLora(nn.Module):
    """A frozen matrix and its update: the operations of peft's layer, in their order."""

    def __init__(self, base_layer: nn.Linear, recipe: LoraRecipe) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.dropout = nn.Dropout(recipe.dropout) if recipe.dropout > 0 else nn.Identity()
        self.down = nn.Linear(base_layer.in_features, recipe.rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(recipe.rank, base_layer.out_features, bias=False, dtype=torch.float32)
        self._scaling = recipe.alpha / recipe.rank

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # a feed-forward may ask for its dtype

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.base_layer(hidden)
        dtype = output.dtype
        hidden = hidden.to(self.down.weight.dtype)
        output = output + self.up(self.down(self.dropout(hidden))) * self._scaling
        return output.to(dtype)


def add_lora(model: Any, family: Family, recipe: LoraRecipe) -> None:
    """Put updates on the matrices that `with_lora` of lst_scale/methods/peft.py puts them on."""
    if recipe.bitfit:
        add_biases(model, family)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.removesuffix(".inner").rpartition(".")[2] in recipe.targets:
            replace(model, path, SizedLora(module, recipe))

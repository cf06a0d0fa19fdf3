"""What Adapters and BitFit add inside a backbone (Sung et al. 2022, section 4.2, after Houlsby et al. 2019 and Ben Zaken et al. 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lst_scale.backbone.families import Family
from lst_scale.backbone.weights.precision import replace
from lst_scale.recipe.method import AdaptersRecipe

ADAPTER_STD = 0.01


class WithAdapter(nn.Module):
    """A sublayer's last linear map, then x + up(gelu_new(down(x)))."""

    def __init__(self, inner: nn.Linear, bottleneck: int, *, small: bool) -> None:
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(inner.out_features, bottleneck)
        self.activation = nn.GELU("tanh")
        self.up = nn.Linear(bottleneck, inner.out_features)
        for linear in (self.down, self.up) if small else ():
            nn.init.normal_(linear.weight, std=ADAPTER_STD)
            nn.init.zeros_(linear.bias)

    @property
    def weight(self) -> Tensor:
        return self.inner.weight  # a feed-forward may ask for its dtype

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.inner(hidden)
        wide = output.to(self.down.weight.dtype)
        result: Tensor = (wide + self.up(self.activation(self.down(wide)))).to(output.dtype)
        return result


class WithBias(nn.Module):
    """A linear map or a norm, plus a bias that starts at zero."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        assert isinstance(inner.weight, Tensor)
        self.bias = nn.Parameter(torch.zeros(inner.weight.shape[0], device=inner.weight.device))

    @property
    def weight(self) -> Tensor:
        weight = self.inner.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.inner(hidden)
        result: Tensor = output + self.bias.to(output.dtype)
        return result


def add_adapters(model: Any, family: Family, recipe: AdaptersRecipe, seed: int) -> None:
    """Put an adapter after self-attention and feed-forward of every block, and let all norms train, as the release does on text."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        device = model.device
        for path in list(family.adapter_sites(model, after_source_attention=recipe.cross_attention)):
            replace(model, path, WithAdapter(model.get_submodule(path), recipe.bottleneck, small=recipe.start_small))
    model.to(device)
    for module in model.modules():
        if isinstance(module, WithAdapter):
            for linear in (module.down, module.up):
                linear.requires_grad_(True)
        elif recipe.train_norms and family.is_norm(module):
            assert isinstance(module.weight, Tensor)
            module.weight = nn.Parameter(module.weight.detach().float())
            module.register_forward_hook(_in_the_input_s_dtype)


def _in_the_input_s_dtype(_norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(inputs[0].dtype)


def add_biases(model: Any, family: Family) -> None:
    """Give every linear map, norm and the head a trained bias of zeros, beside one that it may have: their sum is what trains."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module.bias is not None and module.bias.requires_grad:
            continue
        if (isinstance(module, nn.Linear) or family.is_norm(module)) and not path.endswith(".inner") and "lora_" not in path:
            replace(model, path, WithBias(module))

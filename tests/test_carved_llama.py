"""Side blocks that start as parts of a Llama's own: whole heads, chosen with the keys that they share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.llamas import make_llama
from lst_scale.backbone.families import numbers_of
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.errors import BackboneError, LadderError
from lst_scale.recipe.method import LstRecipe
from lst_scale.side.config import LadderConfig
from lst_scale.side.initialize import initialize_by_pruning, initialize_random
from lst_scale.side.network import SideNetwork

SHAPE: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": False}


def carved(model: Any, r: int = 2, importance: Any = None, **changes: Any) -> dict[str, Tensor]:
    backbone = LocalBackbone.wrap(model)
    side = SideNetwork(backbone.spec, LadderConfig(reduction_factor=r, **({"side_layers": (0, 3)} | changes)))
    initialize_random(side, seed=0)
    initialize_by_pruning(side, backbone.weight_source, importance)
    return {name: parameter.detach() for name, parameter in side.named_parameters()}


def largest(scores: Tensor, count: int) -> list[int]:
    return sorted(scores.argsort(descending=True)[:count].tolist())


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma"])
def test_the_first_block_keeps_the_heads_that_matter_most(model_type: str) -> None:
    """Of four heads of keys one, and with it the better of its two heads of queries."""
    model = make_llama(model_type, **(SHAPE if model_type != "gemma" else {"num_attention_heads": 8, "num_key_value_heads": 4}))
    model.model.layers[0].input_layernorm.weight.data.normal_()
    ours, block = carved(model, 8), model.model.layers[0]
    kept = largest(model.model.embed_tokens.weight.abs().double().sum(0), 8)
    adds = 1.0 if model_type == "gemma" else 0.0
    assert torch.equal(ours["stack.blocks.0.input_layernorm.weight"], block.input_layernorm.weight[kept] + adds)
    q, k, v = (getattr(block.self_attn, f"{name}_proj").weight.detach()[:, kept] for name in "qkv")
    by_head = [matrix.abs().double().view(-1, 16, 8).sum((1, 2)) for matrix in (q, k, v)]
    score = torch.stack([by_head[0][2 * g : 2 * g + 2].max() * by_head[1][g] * by_head[2][g] for g in range(4)])
    groups = largest(score, 1)
    heads = [2 * g + int(by_head[0][2 * g : 2 * g + 2].argmax()) for g in groups]
    side = "stack.blocks.0.self_attn"
    assert torch.equal(ours[f"{side}.q_proj.weight"], torch.cat([q.view(8, 16, 8)[head] for head in heads]))
    for name, matrix in (("k", k), ("v", v)):
        assert torch.equal(ours[f"{side}.{name}_proj.weight"], torch.cat([matrix.view(4, 16, 8)[group] for group in groups]))
    output = torch.cat([block.self_attn.o_proj.weight.detach().view(64, 8, 16)[:, head] for head in heads], 1)
    assert torch.equal(ours[f"{side}.o_proj.weight"], output[largest(output.abs().double().sum(1), 8)])


def test_a_factor_of_one_gives_the_backbone_s_own_blocks() -> None:
    model = make_llama("llama", **SHAPE)
    ours = carved(model, 1)
    for index in (0, 3):
        for name, parameter in model.model.layers[index].named_parameters():
            assert torch.equal(ours[f"stack.blocks.{index}.{name}"], parameter), name
    assert torch.equal(ours["stack.final_norm.weight"], model.model.norm.weight)


def test_importance_chooses_and_weights_are_what_is_copied() -> None:
    model = make_llama("llama", **SHAPE)
    read = LocalBackbone.wrap(model).weight_source
    plain, scaled = carved(model), carved(model, importance=lambda name: read(name) * 1e-25)
    other = carved(model, importance=lambda name: 1 / (read(name).abs() + 1e-3))
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)
    assert any(not torch.equal(plain[name], other[name]) for name in plain)
    nothing = carved(model, importance=lambda name: torch.zeros_like(read(name)))
    assert all(tensor.isfinite().all() for tensor in nothing.values())


@pytest.mark.parametrize(("model_type", "changes"), [("qwen3", {}), ("gemma2", {}), ("phi3", {}), ("llama", {"attention_bias": True})])
def test_where_more_is_in_a_block_it_is_one_line_from_torch_and_without(model_type: str, changes: dict[str, Any]) -> None:
    model = make_llama(model_type, **changes)
    reason = f"^side blocks are not carved out of this {model_type}, whose blocks hold more than a side block has a place for: write "
    with pytest.raises(LadderError, match=reason + "initialization: random$"):
        carved(model)
    spec = LocalBackbone.wrap(model).spec
    with pytest.raises(BackboneError, match=reason + "method.initialization=random$"):
        numbers_of(model_type, "it").trainable_parameters(spec, False, LstRecipe(name="lst", side_layers=(0, 3)))


def test_more_heads_than_a_group_has_are_refused() -> None:
    model = make_llama("llama", num_attention_heads=22, num_key_value_heads=11, hidden_size=176, attention_bias=False)
    with pytest.raises(LadderError, match="side blocks have more heads for each head of keys than the backbone: write"):
        carved(model, 8)

"""How a side network starts: the table of random starts, and pruning as a walk that reads every tensor once."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from helpers.tiny import tiny_t5
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.errors import LadderError
from lst_scale.side.config import LadderConfig
from lst_scale.side.initialize import initialize_by_pruning, initialize_random
from lst_scale.side.network import SideNetwork


def network(backbone: LocalBackbone, *, seed: int = 0, weights: Any = None, **changes: Any) -> SideNetwork:
    side = SideNetwork(backbone.spec, LadderConfig(**({"reduction_factor": 2, "side_layers": (0, 2)} | changes)))
    initialize_random(side, seed=seed, weights=weights)
    return side


def pruned(backbone: LocalBackbone, weights: Callable[[str], Tensor], importance: Any = None, **changes: Any) -> dict[str, Tensor]:
    side = network(backbone, **changes)
    initialize_by_pruning(side, weights, importance)
    return {name: parameter.detach() for name, parameter in side.named_parameters()}


def largest(scores: Tensor, r: int) -> Tensor:
    return scores.argsort(descending=True)[: len(scores) // r].sort().values


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    backbone = LocalBackbone.wrap(tiny_t5())
    torch.manual_seed(1)
    first = network(backbone, seed=3).state_dict()
    torch.manual_seed(2)
    second, other = network(backbone, seed=3).state_dict(), network(backbone, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["upsample.weight"], other["upsample.weight"])


@pytest.mark.parametrize("gated", [False, True])
def test_random_starts_have_the_scales_of_the_table(gated: bool) -> None:
    backbone = LocalBackbone.wrap(tiny_t5(gated=gated, d_model=256, d_ff=512, d_kv=32))
    side = network(backbone, merge_last=True)
    width, d_kv, heads, d_ff = 128, 16, 4, 256
    scales = {"q": (width * d_kv) ** -0.5, "k": width**-0.5, "v": width**-0.5, "o": (heads * d_kv) ** -0.5, "wo": d_ff**-0.5}
    scales |= dict.fromkeys(("wi", "wi_0", "wi_1"), width**-0.5)
    for name, parameter in side.named_parameters():
        leaf = name.split(".")[-2]
        if "gate" in name or name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            scale = 0.01 if "sample" in name else width**-0.5 if "relative" in name else scales[leaf]
            # the estimate of a standard deviation from n draws is off by 1 / sqrt(2 n); five of those
            assert parameter.std().item() == pytest.approx(scale, rel=5 / (2 * parameter.numel()) ** 0.5), name
            assert abs(parameter.mean().item()) < 5 * scale / parameter.numel() ** 0.5, name


def test_random_attention_starts_with_scores_of_order_one() -> None:
    """T5 divides by no sqrt(d_kv): on normed input, q and k of the table give scores of variance 1; N(0, 0.01^2) would give about 0."""
    side = network(LocalBackbone.wrap(tiny_t5(d_model=256, d_kv=32)))
    attention = next(module for module in side.modules() if isinstance(module, T5Attention))
    hidden = torch.randn(500, 128)
    query, key = (linear(hidden).view(500, 4, 16) for linear in (attention.q, attention.k))
    scores = torch.einsum("qhd,khd->hqk", query, key)
    assert 0.7 < scores.std().item() < 1.4


def test_position_tables_start_from_the_backbone_s_block_0_when_there_is_one() -> None:
    backbone = LocalBackbone.wrap(tiny_t5())
    side = network(backbone, weights=backbone.weight_source, side_layers=(1, 2))
    for prefix, stack in (("encoder", side.encoder), ("decoder", side.decoder)):
        table = backbone.weight_source(f"{prefix}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        assert torch.equal(stack.blocks["1"].layer[0].SelfAttention.relative_attention_bias.weight, table)


def test_pruning_by_magnitude_takes_the_weights_for_their_own_importance() -> None:
    backbone = LocalBackbone.wrap(tiny_t5())
    ours = pruned(backbone, backbone.weight_source)
    spelled_out = pruned(backbone, backbone.weight_source, lambda name: backbone.weight_source(name).abs())
    assert all(torch.equal(ours[name], spelled_out[name]) for name in ours)


@pytest.mark.parametrize("gated", [False, True])
def test_pruning_by_magnitude_equals_the_procedure_written_out(gated: bool) -> None:
    """The first encoder block by hand: embedding, norm, q k v together, o, norm, wi (wi_0 and wi_1 together), wo."""
    backbone, r = LocalBackbone.wrap(tiny_t5(gated=gated)), 2
    read = backbone.weight_source
    ours = pruned(backbone, read)
    block, kept = "encoder.block.0.layer", largest(read("shared.weight").abs().sum(0), r)
    assert torch.equal(ours["encoder.blocks.0.layer.0.layer_norm.weight"], read(f"{block}.0.layer_norm.weight")[kept])
    for index, kind, inputs, out in (
        (0, "SelfAttention", ["q", "k", "v"], "o"),
        (1, "DenseReluDense", ["wi_0", "wi_1"] if gated else ["wi"], "wo"),
    ):
        matrices = {name: read(f"{block}.{index}.{kind}.{name}.weight")[:, kept] for name in inputs}
        product = torch.stack([matrix.double().abs() for matrix in matrices.values()]).prod(0)
        rows = largest(product.sum(1), r)
        for name, matrix in matrices.items():
            assert torch.equal(ours[f"encoder.blocks.0.layer.{index}.{kind}.{name}.weight"], matrix[rows]), name
        matrix = read(f"{block}.{index}.{kind}.{out}.weight")[:, rows]
        kept = largest(matrix.double().abs().sum(1), r)
        assert torch.equal(ours[f"encoder.blocks.0.layer.{index}.{kind}.{out}.weight"], matrix[kept])


def test_a_layer_that_is_not_kept_still_carries_the_chain_on() -> None:
    backbone = LocalBackbone.wrap(tiny_t5())
    some = pruned(backbone, backbone.weight_source, side_layers=(2,))
    every = pruned(backbone, backbone.weight_source, side_layers=(0, 1, 2))
    compared = [name for name in some if ".blocks.2." in name and "relative" not in name]
    assert len(compared) == 8 + 13 and all(torch.equal(some[name], every[name]) for name in compared)
    assert all(torch.equal(some[f"{stack}.final_norm.weight"], every[f"{stack}.final_norm.weight"]) for stack in ("encoder", "decoder"))


def test_pruning_leaves_downsamples_gates_and_upsample_at_their_random_start() -> None:
    backbone = LocalBackbone.wrap(tiny_t5())
    before, after = network(backbone).state_dict(), pruned(backbone, backbone.weight_source)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if "sample" in name or "gate" in name} <= same
    assert not {name for name in same if ".layer." in name and "layer_norm" not in name}


@pytest.mark.parametrize("scale", [1e-18, 1e-30])
def test_tiny_importances_do_not_underflow(scale: float) -> None:
    backbone = LocalBackbone.wrap(tiny_t5())
    read = backbone.weight_source
    ours, scaled = pruned(backbone, read), pruned(backbone, read, lambda name: read(name) * scale)
    assert all(torch.equal(ours[name], scaled[name]) for name in ours)


def test_importance_of_zero_everywhere_is_no_obstacle() -> None:
    backbone = LocalBackbone.wrap(tiny_t5())
    weights = pruned(backbone, backbone.weight_source, lambda name: torch.zeros_like(backbone.weight_source(name)))
    assert all(tensor.isfinite().all() for tensor in weights.values())


class Source:
    """Hands out copies, and knows how often each was asked for and how many are in use at once."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self.read, self.asked, self.alive, self.most_alive = read, Counter[str](), 0, 0

    def __call__(self, name: str) -> Tensor:
        tensor = self.read(name).clone()
        self.asked[name] += 1
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(tensor, self._gone)
        return tensor

    def _gone(self) -> None:
        self.alive -= 1


def test_pruning_reads_every_tensor_once_and_holds_two_at_most() -> None:
    model = tiny_t5(gated=True)
    backbone = LocalBackbone.wrap(model)
    source = Source(backbone.weight_source)
    initialize_by_pruning(network(backbone), source)
    assert source.most_alive <= 2 and source.alive == 0
    assert set(source.asked.values()) == {1}
    assert set(source.asked) == {name for name, _ in model.named_parameters() if name != "lm_head.weight"}


def test_pruning_with_an_importance_reads_each_of_both_once() -> None:
    backbone = LocalBackbone.wrap(tiny_t5())
    weights, importance = Source(backbone.weight_source), Source(backbone.weight_source)
    initialize_by_pruning(network(backbone), weights, importance)
    assert set(weights.asked.values()) == set(importance.asked.values()) == {1}
    assert "shared.weight" not in weights.asked  # only its importance counts


def test_a_quantized_backbone_prunes_from_its_checkpoint_s_own_weights(tmp_path: Path) -> None:
    tiny_t5(d_model=64, d_ff=128, d_kv=16).save_pretrained(tmp_path)
    exact, coarse = (LocalBackbone.load(str(tmp_path), precision=precision) for precision in ("fp32", "nf4"))
    ours, theirs = (pruned(backbone, backbone.weight_source) for backbone in (coarse, exact))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_half_precision_weights_rank_columns_by_exact_sums() -> None:
    """Column 1 is larger than column 0 by 1 in 3,000: bf16 sums, of 8 bits, would tie them."""
    backbone = LocalBackbone.wrap(tiny_t5(vocab_size=3000))
    table = torch.zeros(3000, 32, dtype=torch.bfloat16)
    table[:, :17], table[0, 1:17] = 1.0, 2.0
    names = {"shared.weight": table}
    norm = backbone.weight_source("encoder.block.0.layer.0.layer_norm.weight")
    with torch.no_grad():
        norm.copy_(torch.arange(32.0))
    weights = pruned(backbone, lambda name: names.get(name, backbone.weight_source(name)))
    assert weights["encoder.blocks.0.layer.0.layer_norm.weight"].tolist() == list(range(1, 17))


def test_a_position_table_of_another_backbone_is_refused() -> None:
    backbone, other = LocalBackbone.wrap(tiny_t5()), LocalBackbone.wrap(tiny_t5(relative_attention_num_buckets=16))
    with pytest.raises(LadderError, match=r"^the backbone's position table is \(16, 4\), the side network's \(32, 4\)$"):
        network(backbone, weights=other.weight_source)

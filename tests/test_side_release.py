"""Weights of the original release load here, ours load there, and anything else is named in one line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.tiny import batch, tiny_ladder, tiny_t5
from lst_scale import LadderModel
from lst_scale.errors import LadderError


def release_weights(model: LadderModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.release_state_dict().items()}


def test_another_ladder_computes_the_same_after_loading_the_release_weights() -> None:
    backbone = tiny_t5()
    ours, other = tiny_ladder(backbone, merge_last=True), tiny_ladder(backbone, merge_last=True, seed=5)
    assert not torch.equal(ours(**batch()).logits, other(**batch()).logits)
    other.load_release_state_dict(release_weights(ours))
    assert torch.equal(ours(**batch()).logits, other(**batch()).logits)


def test_release_names_hold_one_name_for_every_weight() -> None:
    model = tiny_ladder(merge_last=True)
    names = release_weights(model)
    assert len(names) == len(list(model.parameters()))
    assert {
        "encoder.side_first_downsample.weight",
        "decoder.side_downsamples.2.bias",
        "encoder.side_block.0.layer.0.SelfAttention.q.weight",
        "decoder.side_gate_params.2",
        "decoder.final_side_layer_norm.weight",
        "side_final_upsample.bias",
        "side_gate_params_merge_last",
    } <= names.keys()


def test_keep_vars_gives_the_live_parameters() -> None:
    model = tiny_ladder()
    live = {id(parameter) for parameter in model.parameters()}
    assert {id(tensor) for tensor in model.release_state_dict(keep_vars=True).values()} == live
    assert not any(tensor.requires_grad for tensor in model.release_state_dict().values())


def test_gates_of_blocks_without_a_side_block_are_passed_over() -> None:
    model = tiny_ladder(side_layers=(0, 2))
    weights = release_weights(model)
    for stack, num_layers in (("encoder", 3), ("decoder", 4)):
        for layer in range(num_layers):
            weights.setdefault(f"{stack}.side_gate_params.{layer}", torch.zeros(1))
    model.load_release_state_dict(weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.side_gate_params.0": None}, "missing: encoder.side_gate_params.0"),
        ({"encoder.side_gate_params.3": torch.zeros(1)}, "unknown: encoder.side_gate_params.3"),
        ({"side_gate_params_merge_last": torch.zeros(1)}, "unknown: side_gate_params_merge_last"),
        ({"side_final_upsample.bias": torch.zeros(31)}, "mis-shaped: side_final_upsample.bias is (31,), not (32,)"),
        ({"encoder.side_downsamples.1.bias": torch.zeros(16)}, "unknown: encoder.side_downsamples.1.bias"),
        ({"shared.weight": torch.zeros(2)}, "unknown: shared.weight (pass only the weights whose names contain 'side')"),
    ],
    ids=["missing", "gate beyond the stack", "gate of another design", "mis-shaped", "block that is not kept", "backbone weight"],
)
def test_a_wrong_weight_is_refused_by_name_and_nothing_is_loaded(change: dict[str, Tensor | None], message: str) -> None:
    model = tiny_ladder(side_layers=(0, 2))
    before = release_weights(model)
    wrong = {name: torch.zeros_like(tensor) for name, tensor in before.items()} | change
    with pytest.raises(LadderError) as caught:
        model.load_release_state_dict({name: tensor for name, tensor in wrong.items() if tensor is not None})
    assert str(caught.value) == f"these weights are not of this side network: {message}"
    assert all(torch.equal(tensor, before[name]) for name, tensor in release_weights(model).items())


def test_many_wrong_weights_are_three_names_and_a_count() -> None:
    model = tiny_ladder()
    total = len(release_weights(model))
    with pytest.raises(
        LadderError, match=rf"^these weights are not of this side network: missing: [^,]+, [^,]+, [^,]+ and {total - 3} more$"
    ):
        model.load_release_state_dict({})

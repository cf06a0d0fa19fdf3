"""Inputs and outputs of the original release, in float32 with dropout 0. Tolerance 1e-5 relative: float32 sums in another order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.parity import PARITY, backbone_of, below, close_gradients, read
from lst_scale import LadderConfig, LadderModel
from lst_scale.side.initialize import initialize_by_pruning

TRANSFORMER = sorted(PARITY.glob("transformer_*.safetensors"))
OTHERS = sorted([*PARITY.glob("adapter_*.safetensors"), *PARITY.glob("cross_attention_*.safetensors")])


def ladder(config: dict[str, Any], tensors: dict[str, Tensor]) -> LadderModel:
    model = LadderModel(
        backbone_of(config, below("backbone.", tensors)),
        LadderConfig(
            design=config["design"],
            reduction_factor=config["reduction_factor"],
            side_layers=config["side_layers"],
            merge_last=config["merge_last"],
        ),
    )
    model.load_release_state_dict(below("side.", tensors))
    return model


@pytest.mark.parametrize("path", [*TRANSFORMER, *OTHERS], ids=lambda path: path.stem)
def test_loss_logits_and_every_gradient_equal_the_release(path: Path) -> None:
    config, tensors = read(path)
    model = ladder(config, tensors)
    output = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"], labels=tensors["labels"])
    torch.testing.assert_close(output.loss.reshape(1), tensors["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(output.logits, tensors["logits"], rtol=1e-5, atol=1e-5 * float(tensors["logits"].abs().max()))
    output.loss.backward()
    close_gradients(model.release_state_dict(keep_vars=True), below("grad.side.", tensors))


def test_the_transformer_vectors_cover_gated_untied_and_merge_last() -> None:
    names = {path.stem for path in TRANSFORMER}
    assert {"transformer_gated_untied", "transformer_merge_last", "transformer_kept_last", "transformer_kept_1_3"} <= names


def test_release_weights_survive_a_round_trip_through_our_names() -> None:
    config, tensors = read(PARITY / "transformer_kept_1_3.safetensors")
    model = ladder(config, tensors)
    for name, tensor in model.release_state_dict().items():
        assert torch.equal(tensor.view_as(tensors[f"side.{name}"]), tensors[f"side.{name}"])


def test_pruning_equals_the_release_given_the_same_importance() -> None:
    config, tensors = read(PARITY / "pruning.safetensors")
    weights, importance, pruned = (below(prefix, tensors) for prefix in ("backbone.", "importance.", "pruned."))
    model = LadderModel(
        backbone_of(config, weights), LadderConfig(reduction_factor=config["reduction_factor"], side_layers=range(config["num_layers"]))
    )
    initialize_by_pruning(model.side, weights.__getitem__, importance.__getitem__)
    ours = {name: parameter.detach() for name, parameter in model.side.named_parameters()}
    compared = 0
    for name, expected in pruned.items():
        if "relative_attention_bias" in name or name.startswith("shared"):
            continue
        renamed = name.replace(".block.", ".blocks.").replace("final_layer_norm", "final_norm")
        if "DenseReluDense" in name:
            # The release lists the kept hidden units of a feed-forward in the order of a Python set, ours ascending. The same units,
            # in wi's rows and wo's columns alike, are the same function: compare after bringing them into the release's order.
            order = order_of_rows(ours[renamed.replace("wo", "wi")], pruned[name.replace("wo", "wi")])
            found = ours[renamed][order] if "wi" in name else ours[renamed][:, order]
        else:
            found = ours[renamed]
        assert torch.equal(found, expected), name
        compared += 1
    # Encoder block: 4 attention matrices, 2 norms, wi, wo; decoder block: 4 more matrices and one more norm; 2 final norms.
    assert compared == config["num_layers"] * (8 + 13) + 2


def order_of_rows(rows: Tensor, expected: Tensor) -> list[int]:
    """Return where each expected row stands in `rows`; every one must stand there exactly once."""
    order = [index for row in expected for index in range(len(rows)) if torch.equal(rows[index], row)]
    assert sorted(order) == list(range(len(rows)))
    return order

"""A ladder beside a T5Gemma 2: its taps, its first predictions, generation, training, files, counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.t5gemmas import STACK, make_t5gemma
from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone import as_backbone, load_backbone
from lst_scale.backbone.families import family_of, numbers_of
from lst_scale.backbone.placement.load import load_placed
from lst_scale.backbone.spec import refuse_placement
from lst_scale.backbone.taps import TapRequest
from lst_scale.errors import BackboneError, LadderError
from lst_scale.inputs.batch import Inputs
from lst_scale.recipe.backbone import BackboneRecipe, TensorParallel
from lst_scale.recipe.method import LstRecipe
from lst_scale.side.count import backbone_parameters, shape_of, trainable_parameters
from lst_scale.system import distributed

CONFIG: dict[str, Any] = {"reduction_factor": 2, "side_layers": [1, 3], "start_as_backbone": True, "merge_last": True}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_t5gemma()


def ladder(model: Any, *, trained: bool = False, **changes: Any) -> LadderModel:
    made = LadderModel(model, LadderConfig(**(CONFIG | changes))).eval()
    if trained:
        torch.manual_seed(1)
        for parameter in made.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return made


def texts(rows: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def targets(labels: Tensor) -> Tensor:
    return torch.cat([torch.full((len(labels), 1), STACK["bos_token_id"]), labels[:, :-1]], 1)


def test_taps_are_what_blocks_return(model: Any) -> None:
    source, target, seen = texts(), targets(texts(length=8, seed=1)), dict[tuple[str, int], Tensor]()
    stacks = {"source": model.model.encoder.text_model, "target": model.model.decoder}
    handles = [
        block.register_forward_hook(lambda _m, _i, out, key=(name, number): seen.__setitem__(key, out))
        for name, stack in stacks.items()
        for number, block in enumerate(stack.layers)
    ]
    mask = torch.ones_like(source)
    mask[1, 5:] = 0
    with torch.no_grad():
        final = model.model(input_ids=source, attention_mask=mask, decoder_input_ids=target).last_hidden_state
    for handle in handles:
        handle.remove()
    request = TapRequest(layers=(0, 2, 3), target_final=True)
    taps = as_backbone(model)(Inputs(source_BS=source, source_mask_BS=mask, target_BT=target), request)
    for name, stack in (("source", taps.source), ("target", taps.target)):
        for layer, tap in zip(request.layers, stack.tensors, strict=True):
            assert torch.equal(tap, seen[name, layer])
    assert torch.equal(taps.final_BTD, final)


def test_first_predictions_are_the_model_s_own_bit_for_bit(model: Any) -> None:
    source, labels = texts(), texts(length=8, seed=1)
    mask = torch.ones_like(source)
    mask[1, 5:] = 0
    with torch.no_grad():
        found = ladder(model)(input_ids=source, attention_mask=mask, labels=labels)
        expected = model(input_ids=source, attention_mask=mask, labels=labels)
    assert torch.equal(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)


def test_padding_of_a_source_changes_nothing(model: Any) -> None:
    made, source, labels = ladder(model, trained=True), texts(), texts(length=8, seed=1)
    nothing = torch.zeros(2, 3, dtype=torch.long)
    right, left = torch.cat([source, nothing], 1), torch.cat([nothing, source], 1)
    with torch.no_grad():
        expected = made(input_ids=source, labels=labels).logits
        for padded in (right, left):
            mask = (padded != 0).long()
            torch.testing.assert_close(made(input_ids=padded, attention_mask=mask, labels=labels).logits, expected, rtol=1e-4, atol=1e-4)
    answers = made.generate(source, max_new_tokens=10, do_sample=False)
    for padded in (right, left):
        assert torch.equal(made.generate(padded, attention_mask=(padded != 0).long(), max_new_tokens=10, do_sample=False), answers)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_cache_changes_no_answer(model: Any, options: dict[str, Any]) -> None:
    """Past the window of blocks that see a few tokens alone."""
    made, source = ladder(model, trained=True), texts()
    cached = made.generate(source, max_new_tokens=12, **options)
    assert cached.shape[1] > 8 and not torch.equal(cached[0], cached[1])
    assert torch.equal(made.generate(source, max_new_tokens=12, use_cache=False, **options), cached)


def test_what_starts_as_the_backbone_generates_as_it_does(model: Any) -> None:
    source = texts()
    expected = model.generate(source, max_new_tokens=12, do_sample=False, decoder_start_token_id=STACK["bos_token_id"])
    assert torch.equal(ladder(model).generate(source, max_new_tokens=12, do_sample=False), expected)


def test_a_step_moves_the_side_network_alone(model: Any) -> None:
    made, source, labels = ladder(model, dropout=0.1).train(), texts(), texts(length=8, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = {name: tensor.clone() for name, tensor in made.named_parameters()}
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = made(input_ids=source, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(tensor, start[name]) for name, tensor in made.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_saved_reads_back_and_fits_its_own_backbone_alone(model: Any, tmp_path: Path) -> None:
    made, source, labels = ladder(model, trained=True), texts(), texts(length=8, seed=1)
    source[0, 4] = model.config.eoi_token_index
    made.save_pretrained(tmp_path / "side")
    model.save_pretrained(tmp_path / "backbone")
    again = LadderModel.from_pretrained(tmp_path / "side", model)
    whole = LadderModel.from_pretrained(tmp_path / "side", load_backbone(str(tmp_path / "backbone"), revision=None, precision="fp32"))
    with torch.no_grad():
        expected = made(input_ids=source, labels=labels).logits
        assert torch.equal(again(input_ids=source, labels=labels).logits, expected)
        assert torch.equal(whole(input_ids=source, labels=labels).logits, expected)
    other = make_t5gemma()
    other.model.decoder.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    with pytest.raises(LadderError, match="was trained on"):
        LadderModel.from_pretrained(tmp_path / "side", other)


def test_closed_forms_count_what_there_is(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    assert shape is not None and not shape.own_head
    of_text = [p for name, p in model.named_parameters() if "vision" not in name and "multi_modal" not in name]
    assert backbone_parameters(shape) == sum(p.numel() for p in of_text)
    assert load_backbone(str(tmp_path), revision=None, precision="fp32").num_parameters == backbone_parameters(shape)
    method = LstRecipe(name="lst", **(CONFIG | {"side_layers": (1, 3), "initialization": "random"}))
    assert trainable_parameters(shape, method) == sum(p.numel() for p in ladder(model).parameters())
    assert shape.spec == family_of("t5gemma2", "it").spec(model.config)


@pytest.mark.parametrize("precision", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("placement", [{"name": "streamed", "source": "host"}, {"name": "streamed", "source": "disk"}], ids=str)
def test_blocks_that_come_and_go_give_the_same_taps(model: Any, placement: dict[str, Any], precision: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    if placement["source"] == "disk":
        placement = placement | {"folder": str(tmp_path / "blocks")}
    common = {"checkpoint": str(tmp_path / "model"), "precision": precision}
    inputs = Inputs(source_BS=texts(), source_mask_BS=torch.ones(2, 9, dtype=torch.long), target_BT=targets(texts(length=8, seed=1)))
    request, found = TapRequest(layers=(0, 3), target_final=True), []
    for each in ({"name": "replicated"}, placement):
        found.append(load_placed(BackboneRecipe.model_validate(common | {"placement": each}), distributed.connect())(inputs, request))
    for one, other in zip(
        found[0].source.tensors + found[0].target.tensors, found[1].source.tensors + found[1].target.tensors, strict=True
    ):
        assert torch.equal(one, other)
    assert found[0].final_BTD is not None and torch.equal(found[0].final_BTD, found[1].final_BTD)


def test_matrices_are_divided_by_what_divides_their_heads(model: Any) -> None:
    spec = as_backbone(model).spec
    refuse_placement(spec, TensorParallel(name="tensor_parallel", size=2))
    with pytest.raises(BackboneError, match=r"^4 heads, 2 heads of keys and values and 96 feed-forward channels can't be divided over 4"):
        refuse_placement(spec, TensorParallel(name="tensor_parallel", size=4))


def test_what_does_not_fit_is_one_line(model: Any) -> None:
    with pytest.raises(LadderError, match=r"^design cross_attention stands beside a T5: beside a T5Gemma write design transformer$"):
        ladder(model, design="cross_attention", start_as_backbone=False)
    spec = as_backbone(model).spec
    with pytest.raises(BackboneError, match=r"^side blocks are not carved out of a t5gemma2: write method.initialization=random$"):
        numbers_of("t5gemma2", "it").trainable_parameters(spec, False, LstRecipe(name="lst"))
    config = model.config.to_dict()
    config["decoder"]["num_attention_heads"] = 2
    problem = numbers_of("t5gemma2", "it").problem_of(config)
    assert problem == "num_attention_heads should be the same in both stacks, not 4 in the encoder and 2 in the decoder"
    with pytest.raises(BackboneError, match=r"^old is a T5Gemma 1, whose stacks have a word table each: choose a T5Gemma 2$"):
        family_of("t5gemma", "old")

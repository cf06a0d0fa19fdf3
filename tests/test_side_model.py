"""LadderModel from outside: what it accepts, where it lives, which folders it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel, T5ForConditionalGeneration

from helpers.tiny import batch, tiny_ladder, tiny_t5
from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone.placement.load import load_placed
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.errors import BackboneError, LadderError, LstScaleError
from lst_scale.recipe.backbone import BackboneRecipe
from lst_scale.side import files
from lst_scale.side.model import save_side_network
from lst_scale.system import distributed

CONFIG = LadderConfig(reduction_factor=2, side_layers=[1])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny_t5().save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.fixture
def saved(tmp_path: Path, checkpoint: Path) -> Path:
    """A saved ladder on a backbone on disk."""
    tiny_ladder(LocalBackbone.load(str(checkpoint), precision="fp32")).save_pretrained(tmp_path / "side")
    return tmp_path / "side"


def test_a_hugging_face_model_and_its_backbone_give_the_same_ladder() -> None:
    model = tiny_t5()
    ours, theirs = tiny_ladder(model), tiny_ladder(LocalBackbone.wrap(model))
    assert torch.equal(ours(**batch()).logits, theirs(**batch()).logits)


@pytest.mark.parametrize("kind", ["gated", "multilingual"])
def test_gated_and_multilingual_models_are_accepted(kind: str) -> None:
    output = tiny_ladder(tiny_t5(**{kind: True}))(**batch())
    assert output.logits.shape == (4, 5, 64) and output.loss.ndim == 0


def test_anything_else_is_refused_by_name() -> None:
    with pytest.raises(LstScaleError, match="Linear can't be a backbone"):
        LadderModel(torch.nn.Linear(2, 2), CONFIG)


def test_only_a_whole_model_of_a_known_family_can_be_wrapped() -> None:
    class Mine(T5ForConditionalGeneration):
        """Somebody's own, by inheritance."""

    class Around(torch.nn.Module):
        """As wrappers do that give out the model's attributes, and its weights by other names."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.config, self.lm_head = inner, inner.config, inner.lm_head

    config = tiny_t5().config
    assert LocalBackbone.wrap(Mine(config)).spec == LocalBackbone.wrap(tiny_t5()).spec
    for other in (T5EncoderModel(config), Around(tiny_t5())):
        with pytest.raises(LstScaleError, match="can't be a backbone: pass a T5ForConditionalGeneration or a MT5ForConditionalGeneration"):
            LocalBackbone.wrap(other)


def test_a_fresh_ladder_is_the_same_every_time() -> None:
    first, second = (LadderModel(tiny_t5(), CONFIG).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_all_side_layers_are_those_of_the_backbone_and_are_saved_by_number(tmp_path: Path) -> None:
    model = LadderModel(tiny_t5(), LadderConfig(reduction_factor=2, side_layers="all"))
    assert model.side.config.side_layers == (0, 1, 2)
    model.save_pretrained(tmp_path)
    assert LadderModel.from_pretrained(tmp_path, tiny_t5()).side.config == model.side.config
    with pytest.raises(LadderError, match=r'side_layers 3 must be a list of block numbers, such as \[1, 3, 5\], or "all"'):
        LadderConfig(side_layers=3)  # type: ignore[arg-type]


def test_moving_a_ladder_takes_the_backbone_along_or_says_why_not(checkpoint: Path) -> None:
    model = tiny_ladder()
    assert model.to("cpu") is model and model.float() is model
    moved = tiny_ladder().to("meta")
    assert moved.device.type == moved.backbone.head.weight_VD.device.type == next(moved.parameters()).device.type == "meta"
    streamed = load_placed(BackboneRecipe(checkpoint=str(checkpoint), precision="fp32", placement="streamed"), distributed.connect())
    with pytest.raises(BackboneError, match=r"^this backbone's blocks come to cpu and leave it again: load it where it is to run"):
        LadderModel(streamed, CONFIG).to("meta")
    with pytest.raises(LadderError, match=r"^side weights are float32, not torch\.bfloat16: write LadderConfig\(precision='bf16'\)"):
        model.bfloat16()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "a forward pass needs labels or decoder_input_ids"),
        ({"labels": torch.ones(1, 2, dtype=torch.long)}, "a forward pass needs input_ids or encoder_outputs"),
        ({"labels": torch.ones(1, 2, dtype=torch.long), "return_dict": False}, "leave return_dict out"),
    ],
    ids=["no target", "no source", "a tuple"],
)
def test_a_forward_pass_names_what_it_lacks(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LadderError, match=message):
        tiny_ladder()(**arguments)


def test_decoder_inputs_are_the_labels_shifted_right() -> None:
    model, inputs = tiny_ladder(), batch()
    shifted = torch.nn.functional.pad(inputs["labels"].clamp(min=0), (1, -1))
    source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model(**inputs).logits, model(**source, decoder_input_ids=shifted).logits)


def test_a_ladder_learns() -> None:
    model, inputs = LadderModel(tiny_t5(), CONFIG), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(**inputs).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


def test_a_saved_ladder_finds_its_backbone_and_computes_the_same(saved: Path, checkpoint: Path) -> None:
    expected = tiny_ladder(LocalBackbone.load(str(checkpoint), precision="fp32"))(**batch()).logits
    again = LadderModel.from_pretrained(saved)
    assert not again.training
    assert torch.equal(again(**batch()).logits, expected)
    given = LadderModel.from_pretrained(saved, LocalBackbone.load(str(checkpoint), precision="fp32"))
    assert torch.equal(given(**batch()).logits, expected)


def test_a_ladder_on_a_live_model_is_read_back_onto_that_model(tmp_path: Path) -> None:
    backbone = tiny_t5()
    model = tiny_ladder(backbone)
    model.save_pretrained(tmp_path / "side")
    assert torch.equal(LadderModel.from_pretrained(tmp_path / "side", backbone)(**batch()).logits, model(**batch()).logits)


def test_saving_again_replaces_the_folder_and_leaves_nothing_else(saved: Path, checkpoint: Path) -> None:
    other = tiny_ladder(LocalBackbone.load(str(checkpoint), precision="fp32"), seed=9)
    other.save_pretrained(saved)
    assert torch.equal(LadderModel.from_pretrained(saved)(**batch()).logits, other(**batch()).logits)
    assert {path.name for path in saved.parent.iterdir()} == {"backbone", "side"}


def test_a_gathered_state_dict_is_saved_without_a_network(tmp_path: Path) -> None:
    model = tiny_ladder()
    weights = {name: tensor.t() if tensor.ndim == 2 else tensor for name, tensor in model.side.state_dict().items()}
    views = {name: tensor.contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in weights.items()}  # not contiguous
    save_side_network(tmp_path / "side", views, model.side.config, model.backbone)
    again = LadderModel.from_pretrained(tmp_path / "side", model.backbone)
    assert all(torch.equal(tensor, again.side.state_dict()[name]) for name, tensor in model.side.state_dict().items())


def test_another_backbone_is_refused_unless_allowed(saved: Path) -> None:
    other = tiny_t5(seed=7)
    with pytest.raises(LadderError, match=r"was trained on .* with fingerprint [0-9a-f]{12}, .* allow_other_backbone=True$"):
        LadderModel.from_pretrained(saved, other)
    LadderModel.from_pretrained(saved, other, allow_other_backbone=True)


def test_a_backbone_of_another_architecture_is_refused_even_then(saved: Path) -> None:
    with pytest.raises(LadderError, match=r"which has d_ff 64 instead of 48: give one of its own architecture$"):
        LadderModel.from_pretrained(saved, tiny_t5(d_ff=64), allow_other_backbone=True)


def edit(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / files.CONFIG).read_text())
    (folder / files.CONFIG).write_text(json.dumps(record | changes))


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / files.WEIGHTS)
    del weights["upsample.bias"]
    save_file(weights, folder / files.WEIGHTS)


def reshape_weight(folder: Path) -> None:
    weights = load_file(folder / files.WEIGHTS)
    save_file(weights | {"upsample.bias": torch.zeros(3)}, folder / files.WEIGHTS)


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / files.WEIGHTS), folder / "pytorch_model.bin")
    (folder / files.WEIGHTS).unlink()


DAMAGE: dict[str, tuple[Any, str]] = {
    "no configuration": (lambda folder: (folder / files.CONFIG).unlink(), "holds no saved side network: it lacks"),
    "a pickle in place of the weights": (pickle_weights, "holds no saved side network: it lacks"),
    "a list": (lambda folder: (folder / files.CONFIG).write_text("[]"), "ladder_config.json is damaged"),
    "an unknown knob": (lambda folder: edit(folder, config={"side_layers": [1], "knob": 1}), "ladder_config.json is damaged"),
    "a weight less": (drop_weight, "does not fit its ladder_config.json: upsample.bias (1 in all)"),
    "a weight of another shape": (reshape_weight, "does not fit its ladder_config.json: upsample.bias (1 in all)"),
}


@pytest.mark.parametrize("name", DAMAGE, ids=lambda name: name.replace(" ", "_"))
def test_a_damaged_folder_is_refused_in_one_line(saved: Path, checkpoint: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(saved)
    with pytest.raises(LadderError) as caught:
        LadderModel.from_pretrained(saved)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LadderError, match="nowhere holds no saved side network"):
        LadderModel.from_pretrained(tmp_path / "nowhere")


def test_a_ladder_saved_on_a_live_model_finds_that_model_s_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    model = tiny_ladder(T5ForConditionalGeneration.from_pretrained(checkpoint))
    model.save_pretrained(tmp_path / "side")
    assert torch.equal(LadderModel.from_pretrained(tmp_path / "side")(**batch()).logits, model(**batch()).logits)

"""Side networks that read images: the release's own inputs and outputs, what is stored, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.parity import PARITY, backbone_of, below, close_gradients, read
from helpers.tiny import batch, tiny_ladder, tiny_t5
from lst_scale import LadderConfig, LadderEnsemble, LadderModel, VisionConfig
from lst_scale.errors import LadderError
from lst_scale.inputs.images import Images
from lst_scale.side.loss import cross_entropy

VECTORS = sorted((PARITY / "vision").glob("*.safetensors"))
FEATURES, GRID = 12, 4


def release_ladder(config: dict[str, Any], tensors: dict[str, Tensor]) -> LadderModel:
    vision = VisionConfig(feature_dim=config["feature_dim"], pooled_grid=config["pooled"], num_images=config["images"])
    model = LadderModel(
        backbone_of(config, below("backbone.", tensors)),
        LadderConfig(reduction_factor=config["reduction_factor"], side_layers=config["side_layers"], vision=vision),
    )
    model.load_release_state_dict(below("side.", tensors) | below("visual.", tensors))
    return model


def scale_of(tensor: Tensor) -> float:
    return 1e-5 * float(tensor.abs().max())


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_tokens_logits_loss_and_every_gradient_equal_the_release(path: Path) -> None:
    config, tensors = read(path)
    model = release_ladder(config, tensors)
    images = Images(features_BIGF=tensors["vis_feats"], boxes_BIG4=tensors["boxes"])
    tokens = model.side.encoder.image_tokens(images)
    torch.testing.assert_close(tokens, tensors["visual_tokens"], rtol=1e-5, atol=scale_of(tensors["visual_tokens"]))
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    source, side = model.encode(ids, mask, images=images)
    for found, expected in ((source.final, "backbone_encoder_states"), (side.final_BSR, "side_encoder_states")):
        torch.testing.assert_close(found, tensors[expected], rtol=1e-5, atol=scale_of(tensors[expected]))
    output = model(
        input_ids=ids,
        attention_mask=mask,
        labels=tensors["labels"],
        image_features=tensors["vis_feats"],
        boxes=tensors["boxes"],
        loss_form=config["loss"],
        scores=tensors.get("scores"),
    )
    torch.testing.assert_close(output.logits, tensors["logits"], rtol=1e-5, atol=scale_of(tensors["logits"]))
    torch.testing.assert_close(output.loss.reshape(1), tensors["loss"], rtol=1e-5, atol=0)
    output.loss.backward()
    close_gradients(model.release_state_dict(keep_vars=True), below("grad.side.", tensors) | below("grad.visual.", tensors))


def test_boxes_of_zeros_are_no_boxes() -> None:
    config, tensors = read(PARITY / "vision" / "vl_two_images.safetensors")
    assert not tensors["boxes"].any()
    model = release_ladder(config, tensors)
    given = {"input_ids": tensors["input_ids"], "labels": tensors["labels"], "image_features": tensors["vis_feats"]}
    with_zeros = model(**given, boxes=tensors["boxes"])
    assert torch.equal(model(**given).logits, with_zeros.logits)
    with_zeros.loss.backward()
    boxes = model.release_state_dict(keep_vars=True)["encoder.visual_embedding.absolute_vis_pos_embedding.0.weight"]
    assert boxes.grad is not None and not boxes.grad.any()


@pytest.fixture(scope="module")
def ladder() -> LadderModel:
    return vision_ladder()


def vision_ladder(**changes: Any) -> LadderModel:
    vision: dict[str, Any] = {"feature_dim": FEATURES, "pooled_grid": 2, "num_images": (1, 2)} | changes.pop("vision", {})
    return tiny_ladder(vision=VisionConfig(**vision), **changes)


def image_features(rows: int = 4, images: int = 1, *, seed: int = 3) -> Tensor:
    return torch.randn(rows, images, GRID**2, FEATURES, generator=torch.Generator().manual_seed(seed))


def test_an_image_reaches_the_answer_and_no_state_of_the_backbone(ladder: LadderModel) -> None:
    one, other = (ladder(**batch(), image_features=image_features(seed=seed)).logits for seed in (3, 4))
    assert not torch.allclose(one, other, atol=1e-3)
    assert not torch.allclose(one[0], ladder(**batch(), image_features=image_features(images=2)).logits[0], atol=1e-3)
    read = ladder.read(batch()["input_ids"], batch()["attention_mask"])
    assert read.taps.embedding.shape[1] == batch()["input_ids"].shape[1]


@pytest.mark.parametrize(
    "changes", [{}, {"normalize_taps": True}, {"vision": {"scale_image_rows": False}}, {"downsample_rank": 4}], ids=str
)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_with_a_cache_equals_generation_without(changes: dict[str, Any], num_beams: int) -> None:
    model, inputs = vision_ladder(**changes), {name: batch()[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "num_beams": num_beams, "eos_token_id": 63, "image_features": image_features(images=2)}
    ids = model.generate(**inputs, **options)
    assert torch.equal(ids, model.generate(**inputs, **options, use_cache=False))
    if num_beams == 1:
        logits = model(**inputs, decoder_input_ids=ids[:, :-1], image_features=options["image_features"]).logits
        assert torch.equal(logits.argmax(-1), ids[:, 1:])


def test_padding_of_the_text_changes_nothing_before_an_image(ladder: LadderModel) -> None:
    inputs = batch()
    together = ladder(**inputs, image_features=image_features()).logits
    for row in range(4):
        length = int(inputs["attention_mask"][row].sum())
        alone = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        alone |= {name: alone[name][:, :length] for name in ("input_ids", "attention_mask")}
        logits = ladder(**alone, image_features=image_features()[row : row + 1]).logits
        torch.testing.assert_close(logits[0], together[row], rtol=1e-4, atol=1e-4)  # float32 sums over another number of keys


def test_image_rows_that_no_gate_scales_stay_as_they_enter() -> None:
    scaled, whole = (vision_ladder(vision={"scale_image_rows": scale}) for scale in (True, False))
    whole.load_state_dict({name: tensor for name, tensor in scaled.state_dict().items() if name != "ladder_config"})
    inputs = {**batch(), "image_features": image_features()}
    assert not torch.allclose(scaled(**inputs).logits, whole(**inputs).logits, atol=1e-3)
    with torch.no_grad():  # a gate that is open for the side state alone scales nothing
        for model in (scaled, whole):
            for gate in model.side.gates().values():
                gate.alpha.fill_(10.0)
    torch.testing.assert_close(scaled(**inputs).logits, whole(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("object_order", ["backbone", "random"])
def test_a_saved_side_network_brings_its_object_order_along(object_order: str, tmp_path: Path) -> None:
    backbone = tiny_t5()
    model = vision_ladder(backbone=backbone, vision={"object_order": object_order})
    order = model.side.encoder.object_order
    table = backbone.shared.weight
    assert torch.equal(order, table[-4:].flip(0)) == (object_order == "backbone")
    with torch.no_grad():
        order.add_(1.0)
    inputs = {**batch(), "image_features": image_features()}
    model.save_pretrained(tmp_path / "side")
    again = LadderModel.from_pretrained(tmp_path / "side", backbone)
    assert again.side.config == model.side.config
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    both = LadderEnsemble(backbone, [model.side, again.side])
    torch.testing.assert_close(both(**inputs).logits, model(**inputs).logits.log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_release_names_hold_what_trains_and_no_object_order(ladder: LadderModel) -> None:
    live = {id(parameter) for parameter in ladder.parameters()}
    assert {id(tensor) for tensor in ladder.release_state_dict(keep_vars=True).values()} == live
    assert {"encoder.visual_embedding.img_order_embedding.weight", "encoder.side_gate_params.0"} <= ladder.release_state_dict().keys()


def test_the_forms_of_the_loss_are_means_of_other_things() -> None:
    logits, labels = (
        torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[1, 2, 3, 4], [5, -100, -100, -100], [-100] * 4]),
    )
    nll = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(cross_entropy(logits, labels), (nll[0].sum() + nll[1, 0]) / 5)
    torch.testing.assert_close(cross_entropy(logits, labels, "example_mean"), (nll[0].mean() + nll[1, 0]) / 3)
    scored = cross_entropy(logits, labels, "scored_example_mean", torch.tensor([0.3, 1.0, 0.0]))
    torch.testing.assert_close(scored, (0.3 * nll[0].mean() + nll[1, 0]) / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_features": None}, "this side network reads images: pass image_features (4, 1 or 2, grid positions, 12)"),
        ({"image_features": torch.zeros(4, 16, 12)}, "image_features are (4, 16, 12), but must have four dimensions"),
        ({"image_features": torch.zeros(3, 1, 16, 12)}, "image_features are of 3 rows, but the texts are 4"),
        ({"image_features": torch.zeros(4, 3, 16, 12)}, "image_features hold 3 images a row, but this side network reads 1 or 2"),
        ({"image_features": torch.zeros(4, 1, 16, 11)}, "image_features have 11 channels, but this side network reads 12"),
        ({"image_features": torch.zeros(4, 1, 17, 12)}, "image_features hold 17 positions an image, which is no square grid"),
        (
            {"image_features": torch.zeros(4, 1, 1, 12)},
            "image_features hold 1 positions an image, which is no square grid of at least 2 x 2",
        ),
        ({"boxes": torch.zeros(4, 1, 3, 4)}, "boxes are (4, 1, 3, 4), but must be (4, 1, 4, 4) or more"),
        ({"loss_form": "mean"}, "loss_form 'mean' is unknown"),
        ({"scores": torch.ones(4)}, "scores go with loss_form='scored_example_mean' and with no other"),
        ({"loss_form": "scored_example_mean"}, "scores go with loss_form='scored_example_mean' and with no other"),
        ({"loss_form": "scored_example_mean", "scores": torch.ones(3)}, "scores are (3,), but must be (4,): one a row"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_one_line(change: dict[str, Any], message: str, ladder: LadderModel) -> None:
    with pytest.raises(LadderError) as caught:
        ladder(**batch(), **({"image_features": image_features()} | change))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_side_network_without_vision_refuses_images() -> None:
    with pytest.raises(LadderError, match="this side network reads no images: leave image_features and boxes out"):
        tiny_ladder()(**batch(), image_features=image_features())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"pooled_grid": 0}}, "vision.pooled_grid 0 must be a whole number of at least 1"),
        ({"vision": {"num_images": ()}}, "vision.num_images [] must name at least one number of images"),
        ({"vision": {"num_images": (1, "2")}}, "vision.num_images '2' must be a whole number"),
        ({"vision": {"object_order": "backbon"}}, "vision.object_order 'backbon' is unknown. Did you mean 'backbone'?"),
        ({"design": "adapter"}, "design adapter reads no images: write design transformer, or leave vision out"),
    ],
    ids=str,
)
def test_a_vision_that_can_not_be_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LadderError) as caught:
        vision_ladder(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)

"""Recipes with pictures, from files to answers: every method trains, resumes, answers; two processes equal one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers.models import make_t5
from helpers.pictures import make_pictures, make_tower, task_of, vision_of
from helpers.recipes import recipe_writer
from helpers.runs import assert_same_weights, final_weights, losses, result
from helpers.training import train
from lst_scale import LadderModel
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.data.batches import training_steps
from lst_scale.errors import RecipeError
from lst_scale.inference.predict import predict_file
from lst_scale.inputs.images import Images
from lst_scale.methods import build_trainee
from lst_scale.methods.base import trained_parameters
from lst_scale.plan.footprint import footprint
from lst_scale.plan.report import setting_of
from lst_scale.recipe.schema import load_recipe
from lst_scale.side.count import shape_of, trainable_of
from lst_scale.training.shared import load_data

LST = {"name": "lst", "reduction_factor": 4, "side_layers": "all", "normalize_taps": True, "scale_image_rows": False, "dropout": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "lst": LST,
    "full": {"name": "full"},
    "adapters": {"name": "adapters", "bottleneck": 8, "cross_attention": True, "train_norms": False, "start_small": False},
    "lora": {"name": "lora", "rank": 4, "dropout": 0.0},
    "bitfit": {"name": "bitfit"},
    "prompt": {"name": "prompt", "num_vectors": 5, "hidden": 12},
}


class Place:
    """A folder with a backbone, a vision tower, pictures, and a function that writes recipes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint = make_t5(folder / "t5", dropout_rate=0.0)
        self.tower, self.rows = make_tower(folder / "tower"), make_pictures(folder / "pictures")
        self._write = recipe_writer(folder, self.checkpoint)

    def recipe(self, name: str, method: dict[str, Any], **changes: Any) -> Path:
        vision = vision_of(self.tower) | ({} if method["name"] == "lst" else {"vocab_size": 4200})
        given: dict[str, Any] = {"task": task_of(self.rows), "vision": vision, "method": method, "evaluation__method": "likelihood"}
        return self._write(name, **(given | changes))

    def run(self, name: str) -> Path:
        return self.folder / "runs" / f"{name}-colours-seed0"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("vision"))


@pytest.mark.parametrize("name", METHODS)
def test_the_count_formula_equals_what_trains(name: str, place: Place) -> None:
    recipe = load_recipe(str(place.recipe(f"count-{name}", METHODS[name])))
    shape = shape_of(str(place.checkpoint))
    assert shape is not None
    trainee = build_trainee(recipe, LocalBackbone.load(str(place.checkpoint), precision="fp32"), zero_stage=0)
    assert trainable_of(recipe, shape) == sum(p.numel() for p in trained_parameters(trainee.module).values())


@pytest.fixture(scope="module")
def trained(place: Place) -> Callable[[str], Path]:
    """Every method, four steps in one go, and two and two more; LST on two processes, too."""
    common = {
        "training__save_every_steps": 2,
        "training__evaluate_every": 4,
        "training__keep_checkpoints": 9,
        "optimizer__learning_rate": 1e-3,
    }
    whole = [str(place.recipe(name, method, training__max_steps=4, **common)) for name, method in METHODS.items()]
    train(*whole)
    cut = [str(place.recipe(f"{name}-cut", method, training__max_steps=4, **common)) for name, method in METHODS.items()]
    train(*cut)
    for name in METHODS:
        for newer in sorted((place.run(f"{name}-cut") / "checkpoints").glob("step-*"))[1:]:
            for file in newer.iterdir():
                file.unlink()
            newer.rmdir()
        (place.run(f"{name}-cut") / "result.json").unlink()
    train("--resume", *cut)
    two = [str(place.recipe(f"{name}-two", METHODS[name], training__max_steps=4, **common)) for name in ("lst", "lora")]
    train(*two, processes=2)
    return place.run


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_pictures_and_resumes_bit_for_bit(name: str, trained: Callable[[str], Path]) -> None:
    assert len(losses(trained(name))) == 4
    assert_same_weights(trained(f"{name}-cut"), final_weights(trained(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lst", "lora"])
def test_two_processes_equal_one(name: str, trained: Callable[[str], Path]) -> None:
    # float32 sums in another order
    assert losses(trained(f"{name}-two")) == pytest.approx(losses(trained(name)), rel=1e-4)


@pytest.mark.slow
def test_a_run_answers_about_other_pictures(trained: Callable[[str], Path], place: Place, tmp_path: Path) -> None:
    rows = [{"question": "which colour is it", "image": "new.png", "answer": "?"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    Image.new("RGB", (50, 50), (10, 10, 250)).save(tmp_path / "new.png")
    for name in ("lst", "prompt"):
        assert predict_file([trained(name)], tmp_path / "rows.jsonl", tmp_path / f"{name}.jsonl") == 1
        (answer,) = map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
        assert answer["prediction"] in task_of(place.rows)["labels"]


@pytest.mark.slow
def test_a_saved_side_network_of_a_run_answers_in_python(trained: Callable[[str], Path], place: Place) -> None:
    model = LadderModel.from_pretrained(trained("lst") / "side_network", str(place.checkpoint))
    ids = torch.tensor([[5, 6, 1]])
    features = [torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    one, other = (model(input_ids=ids, labels=ids, image_features=each).logits for each in features)
    assert not torch.equal(one, other)
    assert result(trained("lst"))["trainable_parameters"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["lst", "full"])
def test_a_scored_row_weighs_its_score_times_the_mean_over_its_tokens(name: str, place: Place) -> None:
    scored = place.rows.with_name("scored.jsonl")
    rows = [json.loads(line) for line in place.rows.read_text().splitlines()[:6]]
    scored.write_text("".join(json.dumps(row | {"worth": number / 5}) + "\n" for number, row in enumerate(rows)))
    task = task_of(scored, loss="example_mean", score="worth")
    recipe = load_recipe(str(place.recipe(f"scored-{name}", METHODS[name], task=task)))
    (step,) = training_steps(
        load_data(recipe).tasks[0].train, epoch=0, seed=0, global_batch_size=6, micro_batch_size=4, rank=0, world_size=1
    )
    trainee = build_trainee(recipe, LocalBackbone.load(str(place.checkpoint), precision="fp32"), zero_stage=0)
    trainee.module.eval()
    found = sum(trainee.nll(trainee.module, batch, trainee.prepare(batch)) for batch in step.micro_batches) / step.divisor
    expected = 0.0
    for batch in step.micro_batches:  # one row at a time, by its own tokens alone
        for row, index in enumerate(batch.indices):
            if index >= 0:
                one = {"input_ids_BS": batch.input_ids_BS[[row]], "attention_mask_BS": batch.attention_mask_BS[[row]], "weights_B": None}
                images = Images(features_BIGF=batch.images.features_BIGF[[row]])
                alone = replace(batch, **one, labels_BT=batch.labels_BT[[row]], indices=(index,), target_lengths=None, images=images)
                nll = trainee.nll(trainee.module, alone, trainee.prepare(alone))
                expected += nll.item() / int((alone.labels_BT != -100).sum()) * index / 5 / 6
    assert found.item() == pytest.approx(expected, rel=1e-5)  # float32 sums in another order


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": None}, "task.images names pictures, but nothing says how they are read"),
        ({"task__images": None}, "vision has no effect without pictures: name their columns in task.images, or remove it"),
        ({"vision__image_model": "resnet"}, "vision.image_model: 'resnet' is not valid: write efficientnet-lite0, timm:"),
        ({"vision__vocab_size": 4200}, "vision.vocab_size has no effect on method lst"),
        ({"task__images": ["question"]}, "images holds 'question', which is read as text"),
        ({"method__design": "adapter", "method__initialization": "random"}, "method.design adapter reads no images: write transformer"),
    ],
    ids=str,
)
def test_a_recipe_that_can_not_be_meant_is_refused(changes: dict[str, Any], message: str, place: Place) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(place.recipe("wrong", dict(LST), **changes)))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_with_pictures_is_planned(name: str, place: Place) -> None:
    recipe = load_recipe(str(place.recipe(f"plan-{name}", METHODS[name])))
    shape = shape_of(str(place.checkpoint))
    assert shape is not None
    setting = setting_of(recipe, world_size=1, on_gpu=False, target=4)
    without = recipe.model_copy(update={"vision": None, "task": recipe.task.model_copy(update={"images": None})})
    found, on_text = footprint(recipe, shape, setting), footprint(without, shape, setting)
    assert found.trainable == trainable_of(recipe, shape) and found.kept > on_text.kept

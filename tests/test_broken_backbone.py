"""NaN in the backbone's weights is told as such, never as a learning rate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5ForConditionalGeneration

from helpers.models import make_t5
from lst_scale.errors import BackboneError, TrainingError
from lst_scale.recipe.schema import load_recipe
from lst_scale.training.run import run

LORA, FULL = {"name": "lora", "rank": 2}, {"name": "full"}


def broken(folder: Path, weight: str, value: float) -> Path:
    make_t5(folder, dropout_rate=0.0)
    model = T5ForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(weight)[-1] = value
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("weight", "value", "changes", "message"),
    [
        (
            "encoder.block.1.layer.1.DenseReluDense.wo.weight",
            float("nan"),
            {},
            "the backbone's taps are not finite at block 2 of the source",
        ),
        (
            "decoder.block.0.layer.0.SelfAttention.o.weight",
            float("inf"),
            {},
            "the backbone's taps are not finite at block 0 of the target",
        ),
        ("shared.weight", float("nan"), {}, "the backbone's output head is not finite"),  # of a token that no row holds
        ("encoder.block.1.layer.1.DenseReluDense.wo.weight", float("nan"), {"method": LORA}, "weights are not finite in base_model"),
        ("decoder.block.2.layer.2.DenseReluDense.wi.weight", float("nan"), {"method": FULL}, "weights are not finite in decoder.block.2"),
    ],
)
def test_a_backbone_that_is_not_finite_is_named(
    weight: str, value: float, changes: dict[str, Any], message: str, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = broken(tmp_path / "broken", weight, value)
    recipe = load_recipe(str(write_recipe("nan", backbone__checkpoint=str(checkpoint), data__max_train_rows=6, **changes)))
    with pytest.raises(BackboneError) as caught:
        run(recipe)
    assert message in str(caught.value) and "no learning rate mends that; look at the weights of" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_learning_rate_is_blamed_where_the_backbone_is_finite(write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(str(write_recipe("wild")))
    wild = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"learning_rate": 3e37})})  # past what a recipe takes
    with pytest.raises(TrainingError, match=r"optimizer\.learning_rate below"):
        run(wild)

"""Recipes on a T5Gemma 2: precisions, the tap cache, members, methods inside the model, predictions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import llama_runs
from helpers.llama_runs import trained
from helpers.paths import EMBEDDED
from helpers.runs import assert_same_weights, final_weights, result
from helpers.training import train
from lst_scale.inference.predict import predict_file
from lst_scale.recipe.schema import load_recipe
from lst_scale.side.count import shape_of, trainable_parameters

tokenizer, checkpoint, write = llama_runs.tokenizer, llama_runs.checkpoint, llama_runs.write
KIND = "t5gemma2"


def test_a_run_from_the_tap_cache_ends_as_the_live_one(write: Callable[..., Path], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data__shuffle_seed": 0, "training__epochs": 1}
    cached = changes | {"cache": {"enabled": True, "dtype": "fp32", "folder": str(tmp_path / "taps")}}
    live = trained(write("live", KIND, **changes))
    first, second = (trained(write(name, KIND, **cached)) for name in ("first", "second"))
    for folder in (first, second):
        assert_same_weights(folder, final_weights(live))
        assert result(folder)["scores"] == result(live)["scores"]
    assert result(second)["cache"]["rows_run"] < result(first)["cache"]["rows_run"]


def test_members_on_one_pass_end_as_each_would_alone(write: Callable[..., Path], tmp_path: Path) -> None:
    train(write("both", KIND, members=["seed=0", "seed=1"], data__shuffle_seed=0))
    for seed in (0, 1):
        alone = trained(write(f"alone{seed}", KIND, seed=seed, data__shuffle_seed=0))
        (together,) = (tmp_path / "runs").glob(f"both*seed{seed}")
        assert_same_weights(together, final_weights(alone))


@pytest.mark.parametrize("answers", ["generation", "likelihood"])
def test_a_finished_run_answers_a_file_as_it_was_scored(answers: str, write: Callable[..., Path], tmp_path: Path) -> None:
    folder = trained(write("scored", KIND, evaluation__method=answers, training__epochs=4))
    rows = [json.loads(line) for line in (EMBEDDED / "wordnet/validation.jsonl").read_text().splitlines()[:7]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({k: row[k] for k in ("word", "definition")}) + "\n" for row in rows))
    assert predict_file([folder], tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 7
    said = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    right = 100 * sum(answer == row["kind"] for answer, row in zip(said, rows, strict=True)) / 7
    assert right == pytest.approx(result(folder)["scores"]["accuracy"], abs=0.01)


@pytest.mark.parametrize(
    "method", [{"name": "lora", "rank": 2, "targets": ["q", "v_proj"]}, {"name": "full"}], ids=lambda method: method["name"]
)
def test_methods_inside_the_model_train_too(method: dict[str, Any], write: Callable[..., Path]) -> None:
    path = write("inside", KIND, method=method)
    folder, recipe = trained(path), load_recipe(str(path))
    shape = shape_of(recipe.backbone.checkpoint)
    assert shape is not None
    count = result(folder)["trainable_parameters"]
    assert count == sum(tensor.numel() for tensor in final_weights(folder).values()) == trainable_parameters(shape, recipe.method)


@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4"])
def test_a_packed_backbone_trains_a_side_network(precision: str, write: Callable[..., Path]) -> None:
    allowed = {"nf4": 0.9}.get(precision)  # random weights have no directions that matter more: 4 bits of them are off by half
    changes = {"backbone__precision": precision, "backbone__max_quantization_error": allowed}
    assert result(trained(write("packed", KIND, **changes)))["scores"]

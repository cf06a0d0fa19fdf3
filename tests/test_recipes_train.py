"""Every recipe of the paper's tables, as shipped but for a small backbone and little data: two steps, and a resume to the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.models import make_t5
from helpers.runs import final_weights, losses
from helpers.training import train
from lst_scale.recipe.schema import load_recipe, to_yaml

pytestmark = pytest.mark.slow
RIVALS = ("t5-base-full", "t5-base-adapters", "t5-base-lora", "t5-base-bitfit", "t5-base-prompt")
LADDERS = ("t5-base-lst", "t5-base-lst-all-layers", "t5-base-lst-adapter-block", "t5-base-lst-cross-attention", "t5-large-lst", "t5-3b-lst")
SHORT = ("t5-base", "t5-large", "t5-3b")
SMALL = [
    "training.max_steps=2",
    "training.save_every_steps=1",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    "data.max_train_rows=8",
    "data.max_eval_rows=4",
    "data.max_source_length=24",
    "logging.log_every_steps=1",
]
TASK = "task={name: kind, kind: classification, train: 'embedded:wordnet/train.jsonl', validation: 'embedded:wordnet/validation.jsonl', "
TASK += "source: [word, definition], target: kind}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Each recipe's file and run, after two steps; as many blocks as the real ones have, so that all side layers are there."""
    folder = tmp_path_factory.mktemp("recipes")
    depths = {
        12: make_t5(folder / "base", num_layers=12, d_kv=16, num_heads=2),
        24: make_t5(folder / "large", num_layers=24, d_kv=16, num_heads=2),
    }
    found = {}
    for name in (*RIVALS, *LADDERS, *SHORT):
        t5 = depths[12 if name.startswith("t5-base") else 24]
        recipe = load_recipe(name, [*SMALL, TASK, f"name={name}", f"backbone.checkpoint={t5}", f"output_dir={folder / 'runs'}"])
        path = folder / f"{name}.yaml"
        path.write_text(to_yaml(recipe))
        found[name] = path, folder / "runs" / recipe.run_name
    train(*(path for path, _ in found.values()), timeout=900)
    return found


@pytest.fixture(scope="module")
def resumed(trained: dict[str, tuple[Path, Path]]) -> dict[str, dict[str, Any]]:
    """What each run ended with, before it was put back to its first step and resumed."""
    before = {}
    for name, (_, run) in trained.items():
        before[name] = {"weights": final_weights(run), "losses": losses(run), "result": json.loads((run / "result.json").read_text())}
        shutil.rmtree(run / "checkpoints" / "step-00000002")
        (run / "result.json").unlink()
    assert train("--resume", *(path for path, _ in trained.values()), timeout=900).count("resuming at step 1 ") == len(trained)
    return before


@pytest.mark.parametrize("name", (*RIVALS, *LADDERS, *SHORT))
def test_a_recipe_trains_two_steps_and_resumes_to_the_same(
    name: str, trained: dict[str, tuple[Path, Path]], resumed: dict[str, dict[str, Any]]
) -> None:
    _, run = trained[name]
    before, result = resumed[name], json.loads((run / "result.json").read_text())
    weights = final_weights(run)
    assert all(torch.equal(weights[n], before["weights"][n]) for n in weights) and weights.keys() == before["weights"].keys()
    assert losses(run) == before["losses"] and len(losses(run)) == result["steps"] == 2
    assert result["scores"] == before["result"]["scores"]
    assert 0 < result["trainable_parameters"] == sum(weight.numel() for weight in weights.values())
    first = load_file(run / "checkpoints" / "step-00000001" / "weights.safetensors")
    assert any(not torch.equal(first[n], weights[n]) for n in weights), "the second step moved a weight"

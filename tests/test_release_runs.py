"""The recipes of the supplement's Table 3, as shipped but for a small backbone and made-up features: four tasks in one run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers.models import make_t5
from helpers.release import CHANNELS, FEATURES, make_datasets
from helpers.runs import final_weights, losses, metrics, result
from helpers.training import train
from lst_scale.errors import ArgumentError
from lst_scale.inference.predict import predict_file
from lst_scale.recipe.schema import load_recipe, to_yaml
from lst_scale.side.count import shape_of, trainable_of

METHODS = ("lst", "full", "adapters", "lora", "bitfit", "prompt")
TASKS = ("vqa", "gqa", "nlvr2", "caption")
COUNTS = {"lst": 17_967_384, "full": 224_540_160, "adapters": 19_333_632, "lora": 18_170_112, "bitfit": 1_865_416, "prompt": 2_842_400}


class Place:
    """A folder with a backbone and the release's files, and a function that writes small versions of the shipped recipes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.datasets = folder, make_datasets(folder / "datasets")
        self.checkpoint = make_t5(folder / "t5", dropout_rate=0.0)

    def recipe(self, method: str, name: str, *overrides: str) -> Path:
        tasks = ", ".join(f"{{format: {task}, folder: {self.datasets}}}" for task in TASKS)
        small = [
            f"tasks=[{tasks}]",
            f"name={name}",
            f"backbone.checkpoint={self.checkpoint}",
            f"output_dir={self.folder / 'runs'}",
            f"vision.feature_dim={CHANNELS}",
            "vision.pooled_grid=2",
            "training.global_batch_size=6",
            "training.max_steps=4",
            "training.save_every_steps=2",
            "training.keep_checkpoints=9",
            "logging.log_every_steps=1",
            *(["vision.vocab_size=4200"] if method != "lst" else []),
        ]
        path = self.folder / f"{name}.yaml"
        path.write_text(to_yaml(load_recipe(f"clip-t5-{method}", [*small, *overrides])))
        return path

    def run(self, name: str) -> Path:
        return self.folder / "runs" / f"{name}-{'-'.join(TASKS)}-seed9595"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("release"))


@pytest.mark.parametrize("method", METHODS)
def test_a_shipped_recipe_trains_as_many_weights_as_the_release(method: str, tmp_path: Path) -> None:
    from transformers import T5Config

    from lst_scale.backbone.families import family_of
    from lst_scale.side.count import Shape

    base = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
    shape = Shape(spec=family_of("t5", "t5").spec(base), own_head=False)
    assert trainable_of(load_recipe(f"clip-t5-{method}"), shape) == COUNTS[method]


@pytest.fixture(scope="module")
def trained(place: Place) -> Place:
    """Every recipe, four steps; put back to the second step and resumed; LST and LoRA on two processes; a whole epoch of LST."""
    paths = [place.recipe(method, method) for method in METHODS]
    train(*paths, timeout=900)
    for method in METHODS:
        shutil.copytree(place.run(method), place.folder / "before" / method)
        shutil.rmtree(place.run(method) / "checkpoints" / "step-00000004")
        (place.run(method) / "result.json").unlink()
    assert train("--resume", *paths, timeout=900).count("resuming at step 2 ") == len(METHODS)
    pairs = {"lst": (), "lora": ("method.dropout=0",)}
    for processes in (1, 2):
        train(*(place.recipe(method, f"{method}-on-{processes}", *changes) for method, changes in pairs.items()), processes=processes)
    train(place.recipe("lst", "epoch", "training.epochs=1", "training.max_steps=null"))
    return place


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_trains_on_four_tasks_and_resumes_to_the_same(method: str, trained: Place) -> None:
    before, after = trained.folder / "before" / method, trained.run(method)
    expected, found = final_weights(before), final_weights(after)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert losses(after) == losses(before) and len(losses(after)) == 4
    assert result(after)["scores"] == result(before)["scores"]
    assert any(not torch.equal(found[name], weight) for name, weight in _at_step_2(after).items())


def _at_step_2(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / "checkpoints" / "step-00000002" / "weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lst", "lora"])
def test_two_processes_equal_one(method: str, trained: Place) -> None:
    # float32 sums in another order
    assert losses(trained.run(f"{method}-on-2")) == pytest.approx(losses(trained.run(f"{method}-on-1")), rel=1e-4)


@pytest.mark.slow
def test_an_epoch_has_each_task_s_steps_and_each_is_scored_by_its_own_metric(trained: Place) -> None:
    found = result(trained.run("epoch"))
    assert found["steps"] == 2 + 3 + 6 + 6  # 12 questions by 6, 24 by 10, 12 statements by 2, 30 captions by 5
    assert {name for name in found["scores"] if not name.endswith("score")} - {"caption/cider_ptb", "caption/cider_plain"} == {
        "vqa/vqa_accuracy",
        "gqa/gqa_accuracy",
        "nlvr2/accuracy",
        "nlvr2/consistency",
    }
    each = [found["scores"][f"{task}/score"] for task in TASKS]
    assert found["scores"]["score"] == pytest.approx(sum(each) / 4, abs=1e-3)  # all are rounded
    assert found["split"] == {"vqa": "test", "gqa": "validation", "nlvr2": "test", "caption": "test"}
    assert found["labels"] == {"vqa": None, "gqa": None, "nlvr2": ["true", "false"], "caption": None}
    assert found["best_step"] == found["steps"], "the last weights are the result"
    (validation,) = (line for line in metrics(trained.run("epoch")) if line["kind"] == "validation")
    assert validation["score"] == pytest.approx(found["validation_score"], abs=1e-4)


@pytest.mark.slow
def test_a_run_of_four_tasks_answers_each(trained: Place, tmp_path: Path) -> None:
    rows = {
        "vqa": {"sent": "what color is it?", "img_id": "COCO_val2014_1"},
        "nlvr2": {"sent": "both are red.", "img0": "test-0-img0", "img1": "test-1-img1"},
        "caption": {"img_id": str(trained.datasets / "COCO" / FEATURES / "COCO_val2014_2.h5")},
    }
    for task, row in rows.items():
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
        assert predict_file([trained.run("epoch")], tmp_path / f"{task}.jsonl", tmp_path / f"{task}.out", [f"task={task}"]) == 1
    answers = {task: json.loads((tmp_path / f"{task}.out").read_text())["prediction"] for task in rows}
    assert answers["nlvr2"] in ("true", "false") and isinstance(answers["caption"], str)
    with pytest.raises(ArgumentError, match="was trained on vqa, gqa, nlvr2, caption: say which of them is asked, such as task=vqa"):
        predict_file([trained.run("epoch")], tmp_path / "vqa.jsonl", tmp_path / "none.out")
    card = (trained.run("epoch") / "side_network" / "README.md").read_text()
    assert "task=vqa" in card and "gqa, in the files of the release, text" in card


@pytest.mark.slow
def test_members_share_the_passes_of_several_tasks(place: Place) -> None:
    changes = [
        "training.micro_batch_size=3",
        "members={optimizer.learning_rate: [1e-3, 3e-3]}",
        "cache.enabled=true",
    ]
    path = place.recipe("lst", "members", *changes, f"cache.folder={place.folder / 'taps'}")
    train(path)
    alone = place.recipe("lst", "alone", "training.micro_batch_size=3", "optimizer.learning_rate=1e-3")
    train(alone)
    member = place.run("members-learning_rate-0.001")
    # taps are remembered in bf16
    assert losses(member) == pytest.approx(losses(place.run("alone")), rel=2e-2)
    assert shape_of(str(place.checkpoint)) is not None

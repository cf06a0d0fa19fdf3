"""The paper's other methods in the same harness: they train, resume, save only what trains, and load in plain peft."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5ForConditionalGeneration

from helpers import programs, ranks
from helpers.models import make_t5
from helpers.recipes import recipe_writer
from helpers.runs import final_weights, losses
from helpers.training import train
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.data.batches import Batch
from lst_scale.errors import BackboneError
from lst_scale.methods import build_trainee, check_method
from lst_scale.methods.base import Trainee, trained_parameters
from lst_scale.recipe.schema import Recipe
from lst_scale.side.count import shape_of, trainable_parameters

METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "adapters": {"name": "adapters", "bottleneck": 8},
    "lora": {"name": "lora", "rank": 4},
    "lora-bitfit": {"name": "lora", "rank": 4, "bitfit": True},
    "bitfit": {"name": "bitfit"},
    "prompt": {"name": "prompt", "num_vectors": 5},
    "lst-cross": {"name": "lst", "design": "cross_attention", "reduction_factor": 4},
    "lst-fisher": {"name": "lst", "reduction_factor": 4, "initialization": "fisher", "fisher_samples": 9},
    "lst-adapter": {"name": "lst", "design": "adapter", "reduction_factor": 4, "initialization": "random"},
}
INSIDE = [name for name in METHODS if not name.startswith("lst")]


def recipe_for(method: dict[str, Any], checkpoint: Path, **backbone: Any) -> Recipe:
    task = {"kind": "text", "train": "x", "validation": "x", "source": ("a",), "target": "b"}
    tree = {"name": "m", "task": task, "backbone": {"checkpoint": str(checkpoint), "precision": "fp32"} | backbone, "method": method}
    return Recipe.model_validate(tree)


def trainee_of(name: str, checkpoint: Path, **changes: Any) -> Trainee:
    recipe = recipe_for(METHODS[name] | changes, checkpoint)
    return build_trainee(recipe, LocalBackbone.load(str(checkpoint), precision="fp32"), zero_stage=0)


def batch() -> Batch:
    ids = torch.randint(3, 4000, (3, 7), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[5, 6, 1], [7, 1, -100], [8, 9, 1]])
    return Batch(input_ids_BS=ids, attention_mask_BS=torch.ones_like(ids), labels_BT=labels, indices=(0, 1, 2))


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_added_changes_nothing_at_first_and_everything_that_trains_gets_a_gradient(name: str, tiny_gated_t5_dir: Path) -> None:
    trainee = trainee_of(name, tiny_gated_t5_dir)
    trainee.module.eval()
    nll = trainee.nll(trainee.module, batch(), None)
    stored = load_file(tiny_gated_t5_dir / "model.safetensors")
    plain = T5ForConditionalGeneration.from_pretrained(tiny_gated_t5_dir).eval()
    plain.lm_head.weight = torch.nn.Parameter(stored["lm_head.weight"])
    expected = plain(input_ids=batch().input_ids_BS, labels=batch().labels_BT).loss * 8
    if name not in ("prompt", "adapters"):  # these two change the function from the start
        torch.testing.assert_close(nll, expected, rtol=1e-4, atol=1e-4)
    nll.backward()
    # LoRA's A has no gradient while B is zero.
    silent = [n for n, p in trained_parameters(trainee.module).items() if (p.grad is None or not p.grad.abs().sum()) and "lora_A" not in n]
    assert not silent, silent
    assert all(p.grad is None for p in trainee.module.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fixture", ["tiny_t5_dir", "tiny_gated_t5_dir"])
def test_the_count_formula_equals_what_trains(name: str, fixture: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(fixture)
    shape = shape_of(str(folder))
    assert shape is not None
    count = sum(p.numel() for p in trained_parameters(trainee_of(name, folder).module).values())
    assert trainable_parameters(shape, recipe_for(METHODS[name], folder).method) == count


@pytest.mark.parametrize("name", INSIDE)
def test_gradient_checkpointing_gives_the_same_gradient(name: str, tmp_path: Path) -> None:
    folder = make_t5(tmp_path / "t5", dropout_rate=0.0)
    gradients = []
    for checkpointed in (False, True):
        changes = {"dropout": 0.0} if "lora" in name else {}
        trainee = trainee_of(name, folder, gradient_checkpointing=checkpointed, **changes)
        trainee.nll(trainee.module, batch(), None).backward()
        gradients.append({n: p.grad for n, p in trained_parameters(trainee.module).items()})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", INSIDE)
def test_several_targets_of_a_row_share_one_encoder_pass(name: str, tiny_t5_dir: Path) -> None:
    trainee = trainee_of(name, tiny_t5_dir)
    weights = {n: p.detach() + 0.1 * torch.rand_like(p) for n, p in trained_parameters(trainee.module).items()}
    targets = [torch.tensor([[0, 5], [0, 7], [0, 9]]), torch.tensor([[0, 8, 4], [0, 3, 11], [0, 6, 2]])]
    ids, mask = batch().input_ids_BS, batch().attention_mask_BS
    with trainee.evaluating(weights) as model:
        apart = [next(iter(model.logits_for_targets(ids, mask, [target]))) for target in targets]
        passes = []
        next(m for n, m in trainee.module.named_modules() if n.endswith("encoder")).register_forward_hook(lambda *_: passes.append(1))
        together = list(model.logits_for_targets(ids, mask, targets))
    assert len(passes) == 1
    torch.testing.assert_close(together, apart, rtol=0, atol=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every method, three steps and a resume, on one process; and a few under ZeRO on two."""
    folder = tmp_path_factory.mktemp("methods")
    make = recipe_writer(folder, make_t5(folder / "t5", dropout_rate=0.0))
    common = {"training__max_steps": 3, "training__save_every_steps": 2, "training__keep_checkpoints": 9, "optimizer__learning_rate": 1e-3}
    runs, recipes = {}, []
    for name, method in METHODS.items():
        recipes.append(str(make(name, method=method, **common)))
        runs[name] = folder / "runs" / f"{name}-kind-seed0"
    train(*recipes)
    recipes = []
    for name, stage in (("full", "zero3"), ("lora", "zero3"), ("lora", "zero2"), ("adapters", "zero1"), ("prompt", "zero2")):
        changes = {"dropout": 0.0} if name == "lora" else {}
        recipes.append(str(make(f"{name}-{stage}", method=METHODS[name] | changes, training__deepspeed=stage, **common)))
        runs[f"{name}-{stage}"] = folder / "runs" / f"{name}-{stage}-kind-seed0"
    train(*recipes, processes=2)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_scores_and_saves_what_trains_alone(name: str, trained: dict[str, Path]) -> None:
    run = trained[name]
    result = json.loads((run / "result.json").read_text())
    assert result["method"] == METHODS[name]["name"] and len(losses(run)) == 3
    weights = final_weights(run)
    assert sum(w.numel() for w in weights.values()) == result["trainable_parameters"]
    before = load_file(min((run / "checkpoints").glob("step-*")) / "weights.safetensors")
    assert any(not torch.equal(before[n], weights[n]) for n in weights)
    assert 0 < result["saved_bytes"] < 4 * result["trainable_parameters"] + 60_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full-zero3", "lora-zero3", "lora-zero2", "adapters-zero1", "prompt-zero2"])
def test_two_processes_under_zero_train_as_one(name: str, trained: dict[str, Path]) -> None:
    method = name.split("-")[0]
    if method == "lora":  # one process ran with LoRA's dropout
        torch.testing.assert_close(
            torch.tensor(losses(trained["lora-zero3"])), torch.tensor(losses(trained["lora-zero2"])), rtol=1e-4, atol=0
        )
        return
    torch.testing.assert_close(torch.tensor(losses(trained[name])), torch.tensor(losses(trained[method])), rtol=1e-4, atol=1e-5)
    expected = final_weights(trained[method])
    for parameter, weight in final_weights(trained[name]).items():
        torch.testing.assert_close(weight, expected[parameter], rtol=1e-3, atol=2e-4, msg=parameter)


@pytest.mark.slow
def test_every_method_resumes_to_the_same_weights(trained: dict[str, Path], tmp_path: Path) -> None:
    recipes, expected = [], {}
    for name in METHODS:
        run = tmp_path / name / f"{name}-kind-seed0"
        shutil.copytree(trained[name], run)
        expected[name] = final_weights(run)
        shutil.rmtree(max((run / "checkpoints").glob("step-*")))
        (run / "result.json").unlink()
        text = (run / "recipe.yaml").read_text()
        path = tmp_path / f"{name}.yaml"
        path.write_text(re.sub(r"output_dir: .*", f"output_dir: {tmp_path / name}", text))
        recipes.append(str(path))
    assert train("--resume", *recipes).count("resuming at step 2") == len(METHODS)
    for name, weights in expected.items():
        found = final_weights(tmp_path / name / f"{name}-kind-seed0")
        assert all(torch.equal(found[n], weights[n]) for n in weights), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "prompt"])
def test_what_we_save_loads_in_plain_peft_and_the_other_way_round(name: str, trained: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    run = trained[name]
    base = T5ForConditionalGeneration.from_pretrained(run.parent.parent / "t5").eval()
    theirs = PeftModel.from_pretrained(base, run / "trained").eval()
    ids = batch().input_ids_BS
    checkpoint = run.parent.parent / "t5"
    ours = trainee_of(name, checkpoint)
    with ours.evaluating(ours.load(run / "trained")) as model:
        mine = model.generate(ids, torch.ones_like(ids), max_new_tokens=4)
        (logits,) = model.logits_for_targets(ids, torch.ones_like(ids), [torch.tensor([[0, 5]] * 3)])
    assert torch.equal(theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4), mine)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([[0, 5]] * 3)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "peft")
    again = ours.load(tmp_path / "peft")
    assert all(torch.equal(tensor, ours.load(run / "trained")[key]) for key, tensor in again.items())


@pytest.mark.parametrize(
    ("method", "backbone", "message"),
    [
        ("full", {"precision": "bf16"}, "method full trains the backbone's own weights, which bf16 would round at every step"),
        ("lora", {"precision": "int8"}, "method lora runs backward through the backbone, whose int8 layers here run forward only"),
        ("bitfit", {"placement": "streamed"}, "method bitfit trains inside the backbone, which streamed runs forward only"),
        ("adapters", {"placement": {"name": "tensor_parallel"}}, "write backbone.placement=replicated, or method.name=lst"),
    ],
)
def test_a_backbone_that_a_method_can_not_train_in_is_refused(method: str, backbone: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=re.escape(message)):
        check_method(recipe_for(METHODS[method], tmp_path, **backbone))


@pytest.mark.slow
def test_predictions_of_another_method(trained: dict[str, Path], tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    inputs, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    inputs.write_text('{"word": "cat", "definition": "a feline"}\n')
    done = ranks.run(programs.command, "predict", trained["lora"], inputs, "--output", output)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "prediction" in json.loads(output.read_text())


@pytest.mark.slow
def test_fisher_information_starts_the_side_network_otherwise_than_magnitude(trained: dict[str, Path]) -> None:
    first = {name: losses(trained[name])[0] for name in ("lst-fisher", "lst-cross")}
    assert len(set(first.values())) == 2
    recipe = recipe_for({"name": "lst", "reduction_factor": 4}, trained["lst-fisher"].parent.parent / "t5")
    backbone = LocalBackbone.load(recipe.backbone.checkpoint, precision="fp32")
    plain = build_trainee(recipe, backbone, zero_stage=0).module.state_dict()
    flipped = build_trainee(
        recipe, backbone, zero_stage=0, importance=lambda name: 1 / backbone.weight_source(name).abs()
    ).module.state_dict()
    assert any(not torch.equal(plain[name], flipped[name]) for name in plain)


@pytest.mark.parametrize(("fixture", "target"), [("tiny_t5_dir", "wi_0"), ("tiny_gated_t5_dir", "wi"), ("tiny_t5_dir", "q_proj")])
def test_lora_on_a_matrix_that_the_backbone_lacks_is_refused_before_anything_is_loaded(
    fixture: str, target: str, request: pytest.FixtureRequest
) -> None:
    recipe = recipe_for({"name": "lora", "targets": ("q", target)}, request.getfixturevalue(fixture))
    with pytest.raises(BackboneError, match=rf"method.targets: blocks of this backbone have no matrix '{target}'\..*"):
        check_method(recipe)

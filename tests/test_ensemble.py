"""Side networks of any kind on one backbone answer as one."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import programs, ranks
from helpers.ladders import LADDERS, generate, source
from helpers.models import make_t5
from helpers.tiny import batch, tiny_ladder
from helpers.training import train
from lst_scale import LadderEnsemble, LadderModel
from lst_scale.errors import ArgumentError, LadderError
from lst_scale.inference.ensemble import score_together
from lst_scale.recipe.schema import load_recipe
from lst_scale.runs.compare import compare


def ladders() -> list[LadderModel]:
    """One of each kind, on one backbone; all weights moved, so that no two answer alike."""
    first = tiny_ladder(**LADDERS["two layers"])
    found = []
    for seed, options in enumerate(LADDERS.values()):
        other = tiny_ladder(**options)
        draw = torch.Generator().manual_seed(seed)
        for parameter in other.side.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
        found.append(LadderModel(first.backbone, other.side).eval())
    return found


def together(models: list[LadderModel]) -> LadderEnsemble:
    return LadderEnsemble(models[0].backbone, [copy.deepcopy(model.side) for model in models])


def test_an_ensemble_s_probabilities_are_the_mean_of_its_members() -> None:
    models, inputs = ladders(), batch(4)
    with torch.no_grad():
        probabilities = torch.stack([model(**inputs).logits.softmax(-1) for model in models])
        found = together(models)(**inputs)
    assert (probabilities[0] - probabilities[1]).abs().max() > 1e-3, "members differ"
    torch.testing.assert_close(found.logits.exp(), probabilities.mean(0), rtol=1e-4, atol=1e-7)
    targets = [torch.tensor([[0, 5]] * 4), torch.tensor([[0, 7, 9]] * 4)]
    ids, mask = source()["input_ids"], source()["attention_mask"]
    each = list(zip(*(model.logits_for_targets(ids, mask, targets) for model in models), strict=True))
    for mine, theirs in zip(together(models).logits_for_targets(ids, mask, targets), each, strict=True):
        expected = torch.stack([logits.log_softmax(-1) for logits in theirs]).logsumexp(0) - math.log(len(models))
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_with_one_cache_for_all_equals_generation_without(num_beams: int) -> None:
    models = ladders()
    found = generate(together(models), source(), num_beams=num_beams)
    assert torch.equal(found, generate(together(models), source(), num_beams=num_beams, use_cache=False))
    alone = [generate(model, source(), num_beams=num_beams) for model in models]
    assert any(other.shape != found.shape or not torch.equal(other, found) for other in alone)
    same = [models[1], models[1], models[1]]
    assert torch.equal(generate(together(same), source(), num_beams=num_beams), alone[1])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_ensemble_leaves_its_side_networks_as_they_were_to_other_ensembles_and_to_themselves(num_beams: int) -> None:
    models = ladders()
    backbone, sides = models[0].backbone, [model.side for model in models]
    alone = [generate(model, source(), num_beams=num_beams) for model in models]
    first = LadderEnsemble(backbone, sides)
    before = generate(first, source(), num_beams=num_beams)
    second = LadderEnsemble(backbone, sides[::-1])
    assert torch.equal(generate(second, source(), num_beams=num_beams), generate(second, source(), num_beams=num_beams, use_cache=False))
    assert torch.equal(generate(first, source(), num_beams=num_beams), before)
    for model, expected in zip(models, alone, strict=True):
        assert torch.equal(generate(model, source(), num_beams=num_beams), expected)


@pytest.mark.parametrize("number", range(len(LADDERS)), ids=list(LADDERS))
def test_the_same_side_network_twice_answers_as_itself(number: int) -> None:
    model = ladders()[number]
    expected = generate(model, source(), num_beams=3)
    twice = LadderEnsemble(model.backbone, [model.side, model.side])
    assert torch.equal(generate(twice, source(), num_beams=3), expected)
    assert sum(p.numel() for p in twice.parameters()) == sum(p.numel() for p in model.parameters())


def test_an_ensemble_says_what_it_can_not_do(tmp_path: Path) -> None:
    with pytest.raises(LadderError, match="at least one side network"):
        LadderEnsemble(ladders()[0].backbone, [])
    with pytest.raises(LadderError, match="its side networks are, each in its own folder"):
        together(ladders()).save_pretrained(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from helpers.recipes import recipe_writer

    folder = tmp_path_factory.mktemp("ensemble")
    make = recipe_writer(folder, make_t5(folder / "t5"))
    grid = {"seed": [0, 1], "method.reduction_factor": [2, 4]}
    members = make("grid", members=grid, data__shuffle_seed=0)
    train(members, make("lora", method={"name": "lora"}), make("short", data__max_source_length=12))
    return {path.name: path for path in (folder / "runs").iterdir()}


@pytest.mark.slow
def test_runs_score_together_predict_together_and_stand_in_the_table(runs: dict[str, Path], tmp_path: Path) -> None:
    grid = [run for name, run in runs.items() if name.startswith("grid")]
    assert len(grid) == 4
    folder, result = score_together(grid, "all-four")
    assert folder == grid[0].parent / f"all-four-kind-seed{load_recipe(str(grid[0] / 'recipe.yaml')).seed}"
    each = [json.loads((run / "result.json").read_text()) for run in grid]
    assert result["trainable_parameters"] == sum(one["trainable_parameters"] for one in each)
    assert result["scores_alone"] == [one["scores"]["score"] for one in each]
    assert "all-four" in compare([folder, *grid])
    with pytest.raises(ArgumentError, match="already holds a run"):
        score_together(grid, "all-four")
    with pytest.raises(ArgumentError, match="a run of the ensemble itself: write another name"):
        score_together(grid, load_recipe(str(grid[0] / "recipe.yaml")).name, overwrite=True)
    assert (grid[0] / "side_network").is_dir()
    _, again = score_together([grid[0], grid[0]], "twice-one")
    assert again["scores"] == each[0]["scores"], "two of a kind answer as one of them"

    inputs = tmp_path / "in.jsonl"
    inputs.write_text('{"word": "cat", "definition": "a feline"}\n{"word": "run", "definition": "to move fast"}\n')
    output = tmp_path / "out.jsonl"
    others = [f"--with={run}" for run in grid[1:]]
    done = ranks.run(programs.command, "predict", grid[0], inputs, "--output", output, *others)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    backbone = LadderModel.from_pretrained(grid[0] / "side_network").backbone
    model = LadderEnsemble.from_pretrained([run / "side_network" for run in grid], backbone)
    assert len(lines) == 2 and all("prediction" in line for line in lines)
    assert len(model.side.each) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["grid-reduction_factor-2-kind-seed0"], "an ensemble needs two runs or more"),
        (["grid-reduction_factor-2-kind-seed0", "lora-kind-seed0"], "trained method lora, which is no side network"),
        (["grid-reduction_factor-2-kind-seed0", "short-kind-seed0"], "has another data than .*: an ensemble answers one question"),
        (["grid-reduction_factor-2-kind-seed0", "nowhere"], "nowhere is no finished run: it holds no result.json"),
    ],
)
def test_runs_that_can_not_answer_together_are_named(names: list[str], message: str, runs: dict[str, Path]) -> None:
    found: Any = [runs.get(name, Path("nowhere")) for name in names]
    with pytest.raises(ArgumentError, match=message):
        score_together(found, "wrong")

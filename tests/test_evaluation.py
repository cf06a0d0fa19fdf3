"""What bounds an answer, and how sure a model is of each label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone.placement.replicated import LocalBackbone
from lst_scale.data.batches import collate
from lst_scale.data.encode import EncodedSplit, encode
from lst_scale.data.tasks import Row
from lst_scale.data.tokenizer import load_tokenizer
from lst_scale.methods.lst import SharedPasses
from lst_scale.recipe.schema import EvaluationRecipe
from lst_scale.system import distributed
from lst_scale.training.evaluation import expected, label_scores, predict_split
from lst_scale.training.sessions import EVALUATION, Moment, run_alone


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("embedded:tiny-t5")


@pytest.fixture(scope="module")
def model(tiny_t5_dir: Path) -> LadderModel:
    model = LadderModel(LocalBackbone.load(str(tiny_t5_dir), precision="fp32"), LadderConfig(reduction_factor=4, side_layers=(0, 2)))
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


def split_with(targets: list[str], tokenizer: Any) -> EncodedSplit:
    return encode([Row(f"the cat number {number}", target) for number, target in enumerate(targets)], tokenizer, 16, None)


def test_an_answer_may_be_longer_than_the_expected_answers_of_the_rows_that_are_scored(model: LadderModel, tokenizer: Any) -> None:
    short, long = split_with(["a", "b", "c"], tokenizer), split_with(["a", "b", "a cat and a dog and a cat"], tokenizer)
    assert short.longest_target < long.longest_target
    found = [
        run_alone(
            predict_split(model, split, tokenizer, EvaluationRecipe(), None, distributed.connect(), longest=9),
            SharedPasses(backbone=model.backbone, request=model.side.request),
        )
        for split in (short, long)
    ]
    assert found[0] == found[1], "what is expected has no part in what is answered"
    assert max(len(tokenizer(text).input_ids) for text in found[0]) > short.longest_target


def test_a_label_s_score_is_the_log_likelihood_of_its_tokens(model: LadderModel, tokenizer: Any) -> None:
    split, labels = split_with(["a", "b"], tokenizer), ["act", "a food"]
    batch = collate(split, [0, 1])
    found = run_alone(label_scores(model, batch, tokenizer, labels), SharedPasses(backbone=model.backbone, request=model.side.request))
    for column, label in enumerate(labels):
        ids = torch.tensor([tokenizer(label).input_ids] * 2)
        logits = model(input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, labels=ids).logits
        expected = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].sum(-1)
        torch.testing.assert_close(found[:, column], expected)


@pytest.mark.parametrize("numbers", [["-1.5", "-0.5", "2.5"], ["1", "1.5", "12"]], ids=["none goes on", "one goes on"])
def test_an_expectation_is_the_mean_of_the_numbers_each_as_likely_as_it_is(model: LadderModel, tokenizer: Any, numbers: list[str]) -> None:
    batch, passes = collate(split_with(["a", "b"], tokenizer), [0, 1]), SharedPasses(backbone=model.backbone, request=model.side.request)
    found = run_alone(expected(model, batch, tokenizer, numbers, at=Moment(0, EVALUATION)), passes)
    ends = numbers[0] == "1"  # which 1.5 and 12 go on with: that it ends there is a part of what it says
    scores = []
    for number in numbers:
        ids = torch.tensor([tokenizer(number).input_ids[: None if ends else -1]] * 2)
        logits = model(input_ids=batch.input_ids_BS, attention_mask=batch.attention_mask_BS, labels=ids).logits
        scores.append(logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].sum(-1))
    chances = torch.stack(scores, -1).softmax(-1)
    means = (chances * torch.tensor([float(number) for number in numbers])).sum(-1)
    assert [float(each) for each in found] == pytest.approx(means.tolist(), rel=1e-4)

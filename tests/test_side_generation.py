"""Generation as people use it: beams, sampling, padding, masks, on every kind of backbone and ladder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.ladders import LADDERS, generate, source
from helpers.tiny import batch, tiny_ladder, tiny_t5
from lst_scale import LadderModel
from lst_scale.backbone.cache_argument import CACHE


@pytest.fixture(params=LADDERS, ids=lambda name: name.replace(" ", "_"))
def ladder(request: pytest.FixtureRequest) -> LadderModel:
    return tiny_ladder(**LADDERS[request.param])


def test_beams_with_cache_equal_beams_without_cache(ladder: LadderModel) -> None:
    with_cache = generate(ladder, source(), num_beams=4)
    assert torch.equal(with_cache, generate(ladder, source(), num_beams=4, use_cache=False))
    assert not torch.equal(with_cache, padded_to(generate(ladder, source()), with_cache)), "beams never differ from greedy here"


def padded_to(ids: Tensor, like: Tensor) -> Tensor:
    return torch.nn.functional.pad(ids, (0, like.shape[1] - ids.shape[1]))[:, : like.shape[1]]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_rows_do_not_see_each_other(ladder: LadderModel, num_beams: int) -> None:
    inputs, order = source(), torch.tensor([2, 0, 3, 1])
    permuted = {name: tensor[order] for name, tensor in inputs.items()}
    assert torch.equal(generate(ladder, inputs, num_beams=num_beams)[order], generate(ladder, permuted, num_beams=num_beams))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_padding_of_the_source_changes_nothing(ladder: LadderModel, num_beams: int) -> None:
    inputs = source()
    together = generate(ladder, inputs, num_beams=num_beams)
    for row in range(4):
        length = int(inputs["attention_mask"][row].sum())
        alone = generate(ladder, {name: tensor[row : row + 1, :length] for name, tensor in inputs.items()}, num_beams=num_beams)
        width = min(alone.shape[1], together.shape[1])
        assert torch.equal(alone[0, :width], together[row, :width])


def test_beams_return_scores_of_the_sequences_they_found() -> None:
    model = tiny_ladder()
    result = model.generate(
        **source(2), max_new_tokens=4, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True,
        eos_token_id=63, length_penalty=0.0,
    )  # fmt: skip
    inputs = {name: tensor.repeat_interleave(3, 0) for name, tensor in source(2).items()}
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=result.sequences[:, :-1]).logits
    chosen = logits.log_softmax(-1).gather(-1, result.sequences[:, 1:, None])[..., 0]
    chosen = chosen.masked_fill(result.sequences[:, 1:] == 0, 0.0)
    # float32 sums of 4 log-probabilities, taken once step by step and once in one pass
    torch.testing.assert_close(chosen.sum(1), result.sequences_scores, rtol=1e-5, atol=1e-5)


def test_sampling_gives_every_row_its_own_draws() -> None:
    torch.manual_seed(0)
    model = tiny_ladder()
    ids = generate(model, source(2), do_sample=True, num_return_sequences=5)
    assert ids.shape[0] == 10
    assert len({tuple(row) for row in ids.tolist()}) > 2


@pytest.mark.parametrize("kind", ["gated", "multilingual"])
def test_untied_and_multilingual_backbones_generate_alike_with_and_without_cache(kind: str) -> None:
    model = tiny_ladder(tiny_t5(**{kind: True}))
    assert torch.equal(generate(model, source()), generate(model, source(), use_cache=False))


def test_the_mask_defaults_to_everything_but_padding() -> None:
    model, inputs = tiny_ladder(), source()
    assert torch.equal(generate(model, {"input_ids": inputs["input_ids"]}), generate(model, inputs))
    assert torch.equal(model(**batch()).logits, model(input_ids=inputs["input_ids"], labels=batch()["labels"]).logits)


def test_one_cache_holds_the_backbone_blocks_first_and_the_side_blocks_after_them() -> None:
    model = tiny_ladder(side_layers=(0, 2))
    result = model.generate(**source(), max_new_tokens=3, return_dict_in_generate=True, eos_token_id=63)
    layers = result[CACHE].self_attention_cache.layers
    lengths = [layer.get_seq_length() for layer in layers]
    # 4 decoder blocks, of which the last is not run because nobody reads it; then 2 side blocks
    assert lengths == [3, 3, 3, 0, 3, 3]


def test_an_option_that_nobody_reads_is_an_error() -> None:
    model = tiny_ladder()
    with pytest.raises(ValueError, match="temprature"):
        generate(model, source(), temprature=0.5)
    with pytest.raises(TypeError, match="output_atentions"):
        model(**batch(), output_atentions=True)

"""Generation with caches for backbone and side network agrees with decoding without, and with teacher forcing."""

from __future__ import annotations

import pytest
import torch

from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone.placement.replicated import LocalBackbone

LADDERS = {
    "all layers": {"side_layers": [0, 1, 2]},
    "last layer": {"side_layers": [2]},
    "first layer": {"side_layers": [0]},
    "merged": {"side_layers": [0, 2], "merge_last": True},
}


@pytest.fixture(params=["tiny_t5_dir", "tiny_gated_t5_dir"], ids=["v1.0", "gated"])
def backbone(request: pytest.FixtureRequest) -> LocalBackbone:
    return LocalBackbone.load(str(request.getfixturevalue(request.param)), precision="fp32")


@pytest.fixture(params=LADDERS, ids=str)
def model(request: pytest.FixtureRequest, backbone: LocalBackbone) -> LadderModel:
    model = LadderModel(backbone, LadderConfig(reduction_factor=4, **LADDERS[request.param]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # far from the near-constant start, so that tokens differ
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 4000, (4, 9), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(9)[None, :] < torch.tensor([9, 6, 3, 8])[:, None]).long()
    return ids * mask, mask


def test_cached_greedy_equals_uncached_and_teacher_forced_argmax(model: LadderModel) -> None:
    ids, mask = inputs()
    options = {"max_new_tokens": 7, "do_sample": False}
    cached = model.generate(ids, mask, **options)
    assert torch.equal(cached, model.generate(ids, mask, use_cache=False, **options))
    logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=cached[:, :-1]).logits
    alive = (cached[:, :-1] == 1).cumsum(1) == 0  # after </s> generation pads
    assert torch.equal(logits.argmax(-1)[alive], cached[:, 1:][alive])
    assert len(cached[:, 1:].unique()) >= 4  # the four rows get different answers


def test_one_beam_is_greedy(model: LadderModel) -> None:
    ids, mask = inputs()
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, mask, num_beams=1, **options), model.generate(ids, mask, **options))


def test_beams_with_caches_equal_beams_without_and_follow_a_permuted_batch(model: LadderModel) -> None:
    ids, mask = inputs()
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
    cached = model.generate(ids, mask, **options)
    assert torch.equal(cached, model.generate(ids, mask, use_cache=False, **options))
    order = torch.tensor([2, 0, 3, 1])
    permuted = model.generate(ids[order], mask[order], **options)
    width = min(permuted.shape[1], cached.shape[1])
    assert torch.equal(permuted[:, :width], cached[order][:, :width])


def test_padding_does_not_change_an_answer(model: LadderModel) -> None:
    ids, mask = inputs()
    alone = model.generate(ids[2:3, :3], mask[2:3, :3], max_new_tokens=5, do_sample=False)
    together = model.generate(ids, mask, max_new_tokens=5, do_sample=False)[2:3, : alone.shape[1]]
    assert torch.equal(alone, together)

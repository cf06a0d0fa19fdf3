"""Attention of the side blocks with dropout on the CPU: what torch's own gives, with the same share dropped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lst_scale.side.designs import attention
from lst_scale.side.designs.attention import Dropout, bernoulli_mask, side_attention, with_cheap_dropout

MODULE = nn.Module()


def inputs(seed: int = 0, lengths: tuple[int, int] = (5, 7)) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    T, S = lengths
    query, key, value = (torch.randn(2, 3, length, 4, generator=draw).requires_grad_(True) for length in (T, S, S))
    bias = torch.randn(1, 3, T, S, generator=draw).requires_grad_(True)
    mask = torch.ones(2, 1, 1, S, dtype=torch.bool)
    mask[1, ..., 4:] = False
    return query, key, value, bias, mask


def test_each_element_is_dropped_by_itself_with_the_rate() -> None:
    torch.manual_seed(0)
    for rate in (0.1, 0.5):
        found = 1 - bernoulli_mask(torch.Size([1000, 1003]), rate, torch.empty(0))
        share = found.mean()
        assert share == pytest.approx(rate, abs=0.002), "five standard errors"
        lanes = found.flatten()[: 4 * 250_000].view(-1, 4)
        assert torch.allclose(lanes.mean(0), torch.full((4,), rate), atol=0.004), "all four parts of a drawn number are random"
        assert torch.corrcoef(lanes.T).fill_diagonal_(0).abs().max() < 0.01


@pytest.mark.parametrize("lengths", [(5, 7), (40, 36)], ids=["short", "long enough for transposed products"])
def test_nothing_dropped_equals_torch_s_own_with_its_gradients(lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "bernoulli_mask", lambda shape, rate, like: torch.ones(shape, dtype=like.dtype))
    tensors, reference = inputs(lengths=lengths), inputs(lengths=lengths)
    query, key, value, bias, mask = tensors
    found, _ = side_attention(MODULE, query, key, value, mask, dropout=1e-9, scaling=1.0, position_bias=bias)
    query, key, value, bias, mask = reference
    expected, _ = sdpa_attention_forward(MODULE, query, key, value, mask, dropout=0.0, scaling=1.0, position_bias=bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in zip(tensors[:4], reference[:4], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_dropout_keeps_the_mean() -> None:
    query, key, value, bias, mask = (tensor.detach() for tensor in inputs())
    torch.manual_seed(1)
    draws = [side_attention(MODULE, query, key, value, mask, dropout=0.3, scaling=1.0, position_bias=bias)[0] for _ in range(4000)]
    expected, _ = sdpa_attention_forward(MODULE, query, key, value, mask, dropout=0.0, scaling=1.0, position_bias=bias)
    torch.testing.assert_close(torch.stack(draws).mean(0), expected, rtol=0, atol=0.1)
    assert not torch.equal(draws[0], draws[1])


def test_keys_that_may_not_be_seen_are_not() -> None:
    query, key, value, bias, mask = (tensor.detach() for tensor in inputs())
    torch.manual_seed(1)
    before, _ = side_attention(MODULE, query, key, value, mask, dropout=0.3, scaling=1.0, position_bias=bias)
    value[1, :, 4:] = 1e6
    torch.manual_seed(1)
    after, _ = side_attention(MODULE, query, key, value, mask, dropout=0.3, scaling=1.0, position_bias=bias)
    assert torch.equal(before, after)


def test_dropout_keeps_the_mean_and_acts_in_training_alone() -> None:
    module = with_cheap_dropout(nn.Sequential(nn.Sequential(nn.Dropout(0.25)), nn.Dropout(0.0)))
    assert type(module[0][0]) is Dropout and module[0][0].p == 0.25
    ones = torch.ones(1000, 301, requires_grad=True)
    torch.manual_seed(0)
    found = module(ones)
    assert sorted(found.unique().tolist()) == pytest.approx([0.0, 4 / 3]) and found.mean().item() == pytest.approx(1, abs=0.01)
    found.sum().backward()
    assert torch.equal(ones.grad, found), "what was dropped has no gradient"
    assert torch.equal(module.eval()(ones), ones)

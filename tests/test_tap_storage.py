"""Taps held in fewer bits: what is read, what the gradient is, what is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.inputs import inputs_of
from helpers.tiny import batch, tiny_ladder
from lst_scale.backbone.taps import PackedTap, Tap, Taps, cast_tap, select
from lst_scale.plan.live import LiveBytes
from lst_scale.side.loss import shift_right


def taps_of(model: Any, inputs: dict[str, Tensor]) -> Taps:
    decoder_ids = shift_right(inputs["labels"], model.spec)
    taps: Taps = model.backbone(inputs_of(inputs["input_ids"], inputs["attention_mask"], decoder_ids), model.side.request)
    return taps


def gradients(model: Any, taps: Taps) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    model.side(taps).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_packed_tap_is_off_by_at_most_half_a_step_of_its_position() -> None:
    tap = torch.randn(3, 5, 32) * torch.logspace(-3, 3, 5)[None, :, None]
    packed = PackedTap.pack(tap)
    assert packed.values_BSD.dtype == torch.int8 and packed.values_BSD.abs().max() == 127
    assert ((packed.unpack() - tap).abs() <= tap.abs().amax(-1, keepdim=True) / 254 * 1.001).all()
    torch.testing.assert_close(packed[1:, :2].unpack(), packed.unpack()[1:, :2], rtol=0, atol=0)
    assert PackedTap.pack(torch.zeros(1, 2, 4)).unpack().abs().sum() == 0
    assert torch.equal(PackedTap.pack(tap.bfloat16()).unpack(), PackedTap.pack(tap.bfloat16().float()).unpack())


@pytest.mark.parametrize("design", ["transformer", "cross_attention", "adapter"])
@pytest.mark.parametrize("recompute", [True, False])
def test_the_gradient_is_that_of_the_unpacked_taps(design: str, recompute: bool) -> None:
    model = tiny_ladder(design=design, recompute=recompute, tap_storage="int8").train()
    taps = taps_of(model, batch())
    assert all(isinstance(tap, PackedTap) for tap in (*taps.source.hidden, *taps.target.hidden))

    def plain(stack: Any) -> Any:
        return replace(stack, hidden=tuple(tap.unpack() for tap in stack.hidden))

    found = gradients(model, taps)
    expected = gradients(model, replace(taps, source=plain(taps.source), target=plain(taps.target)))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("storage", "allowed"), [("bf16", 0.02), ("int8", 0.1)])  # of a ladder whose weights are far from small
def test_loss_and_gradient_stay_near_those_of_exact_taps(storage: str, allowed: float) -> None:
    inputs = batch()
    exact, packed = tiny_ladder(), tiny_ladder(tap_storage=storage)
    loss = {}
    for name, model in (("exact", exact), (storage, packed)):
        loss[name] = model(**inputs).loss
        loss[name].backward()
    torch.testing.assert_close(loss[storage], loss["exact"], rtol=allowed, atol=0)
    expected, found = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (exact, packed))
    assert 0 < (found - expected).norm() <= allowed * expected.norm()


def test_members_get_their_own_form_of_one_pass() -> None:
    model = tiny_ladder()
    taps = taps_of(model, batch())
    packed = select(taps, replace(model.side.request, storage="int8", layers=(2,)))
    assert isinstance(packed.source.hidden[0], PackedTap) and len(packed.target.hidden) == 1
    assert select(taps, model.side.request).source.hidden[0] is taps.source.hidden[0]
    assert cast_tap(packed.source.hidden[0], "int8") is packed.source.hidden[0]


def test_what_is_kept_for_the_backward_pass_shrinks_as_said() -> None:
    kept = {}
    for storage in ("exact", "bf16", "int8"):
        model = tiny_ladder(tap_storage=storage).train()
        with LiveBytes() as live:
            taps = taps_of(model, batch(64))
            hidden = model.side(taps)
            kept[storage] = sum(
                tap.nbytes if isinstance(tap, Tensor) else tap.values_BSD.nbytes + tap.scale_BS1.nbytes for tap in taps.source.hidden
            )
            assert live.now >= kept[storage]
        hidden.sum().backward()
    positions = 64 * 9
    assert kept == {"exact": 2 * positions * 32 * 4, "bf16": 2 * positions * 32 * 2, "int8": 2 * positions * (32 + 4)}


def _tensors(tap: Tap) -> list[Tensor]:
    return [tap] if isinstance(tap, Tensor) else [tap.values_BSD, tap.scale_BS1]

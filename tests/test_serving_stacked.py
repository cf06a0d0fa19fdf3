"""Side networks side by side in one module: each row meets its own, whichever come and go."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5ForConditionalGeneration

from helpers.llamas import make_llama
from helpers.models import make_t5
from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone import as_backbone
from lst_scale.serving.networks import shape_of
from lst_scale.serving.passes import Passes
from lst_scale.serving.rows import joined
from lst_scale.serving.stacked import Stack
from lst_scale.side.network import SideNetwork

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gates of channels": {"gate": "per_channel"},
    "two steps down": {"downsample_rank": 4, "normalize_taps": True},
}


def sides_of(backbone: Any, count: int, config: dict[str, Any]) -> list[SideNetwork]:
    found = []
    for number in range(count):
        torch.manual_seed(number)
        side = LadderModel(backbone, LadderConfig(reduction_factor=4, side_layers=[1, 3], **config)).eval().side
        with torch.no_grad():
            for parameter in side.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        found.append(side)
    return found


@pytest.fixture(params=["t5", "llama"])
def backbone(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "llama":
        return as_backbone(make_llama("llama"))
    folder = make_t5(tmp_path / "t5", num_layers=4, num_decoder_layers=4, dropout_rate=0.0)
    return as_backbone(T5ForConditionalGeneration.from_pretrained(folder))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_row_meets_the_weights_of_its_own_network(config: str, backbone: Any) -> None:
    more = {"merge_last": True, "start_as_backbone": True} if backbone.spec.one_stack else {}
    sides, passes, draw = sides_of(backbone, 7, CONFIGS[config] | more), Passes(backbone), random.Random(0)
    stack = Stack(sides[0])
    assert len({shape_of(side) for side in sides}) == 1
    for count in (1, 2, 5, 3, 9, 1, 6, 4):  # room grows, is left, and is taken by others
        chosen = [draw.choice(sides) for _ in range(count)]
        prompts = passes.read([[draw.randrange(5, 90) for _ in range(draw.randint(2, 9))] for _ in chosen], None, passes.request(sides))
        stack.route(chosen)
        first, held = passes.begin(stack.side, prompts)
        tokens = first.argmax(-1)[:, None]
        state, _ = passes.extend(tokens, joined([prompt.rows for prompt in prompts]), passes.request(sides))
        stack.route(chosen)
        second, _ = passes.go_on(stack.side, state, held)
        for number, (side, prompt) in enumerate(zip(chosen, prompts, strict=True)):
            alone, own = passes.begin(side, [prompt])
            torch.testing.assert_close(first[number], alone[0], rtol=1e-4, atol=1e-4)
            one, _ = passes.extend(tokens[number : number + 1], prompt.rows, passes.request(sides))
            after, _ = passes.go_on(side, one, own)
            torch.testing.assert_close(second[number], after[0], rtol=1e-4, atol=1e-4)


def test_tails_of_one_shape_share_the_blocks_that_they_run_again() -> None:
    backbone = as_backbone(make_llama("llama"))
    config = LadderConfig(design="tail", side_layers=[1], tail={"rank": 2, "alpha": 4, "targets": ["q"]})
    sides = [LadderModel(backbone, config).eval().side for _ in range(2)]
    stack = Stack(sides[0])
    mine = {tensor.data_ptr() for tensor in sides[0].held()}
    assert mine == {tensor.data_ptr() for tensor in stack.side.held()} == {tensor.data_ptr() for tensor in sides[1].held()}


def test_another_design_is_another_shape(backbone: Any) -> None:
    one, other = (sides_of(backbone, 1, {"normalize_taps": normalize})[0] for normalize in (True, False))
    assert shape_of(one) != shape_of(other)

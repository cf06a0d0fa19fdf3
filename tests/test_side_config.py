"""What a ladder can't be is said in one line, with what it could be."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from helpers.tiny import tiny_ladder, tiny_t5
from lst_scale import LadderConfig, LadderModel
from lst_scale.errors import LadderError

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown design": ({"design": "transformers"}, "design 'transformers' is unknown. Did you mean 'transformer'?"),
    "fp16": ({"precision": "fp16"}, "side network precision 'fp16' is unknown: write fp32 or bf16 (fp16 overflows in T5)"),
    "no layer": ({"side_layers": []}, "side_layers [] must be 0-based block numbers, ascending, each once, at least one"),
    "layer twice": ({"side_layers": [1, 1]}, "side_layers [1, 1] must be 0-based block numbers, ascending, each once, at least one"),
    "descending": ({"side_layers": [2, 1]}, "side_layers [2, 1] must be 0-based block numbers, ascending, each once, at least one"),
    "negative": ({"side_layers": [-1]}, "side_layers [-1] must be 0-based block numbers, ascending, each once, at least one"),
    "text": ({"side_layers": "al"}, "side_layers 'al' must be a list of block numbers, such as [1, 3, 5], or \"all\""),
    "one number": ({"side_layers": 2}, 'side_layers 2 must be a list of block numbers, such as [1, 3, 5], or "all"'),
    "beyond the end": ({"side_layers": [0, 3]}, "side_layers names block 3, but this backbone has blocks 0 to 2"),
    "odd factor": (
        {"reduction_factor": 3},
        "reduction_factor 3 must divide d_model 32, d_ff 48 and d_kv 8: write one of 1, 2, 4, 8",
    ),
    "zero factor": (
        {"reduction_factor": 0},
        "reduction_factor 0 must divide d_model 32, d_ff 48 and d_kv 8: write one of 1, 2, 4, 8",
    ),
    "fractional factor": ({"reduction_factor": 2.0}, "reduction_factor 2.0 must be a whole number, such as 8"),
    "dropout of one": ({"dropout": 1.0}, "dropout 1.0 must be at least 0 and below 1"),
    "cold gate": ({"gate_temperature": 0.0}, "gate_temperature 0.0 must be above 0"),
}


@pytest.mark.parametrize("name", MISTAKES, ids=lambda name: name.replace(" ", "_"))
def test_a_mistake_in_the_design_is_one_line_that_says_what_to_write(name: str) -> None:
    changes, message = MISTAKES[name]
    with pytest.raises(LadderError) as caught:
        LadderModel(tiny_t5(), LadderConfig(**{"reduction_factor": 2, "side_layers": [0]} | changes))
    assert str(caught.value) == message


def test_lists_and_ranges_become_tuples() -> None:
    assert LadderConfig(side_layers=[1, 3]) == LadderConfig(side_layers=(1, 3))
    assert LadderConfig(side_layers=range(2)).side_layers == (0, 1)
    with pytest.raises(FrozenInstanceError):
        LadderConfig(side_layers=[1]).side_layers = (2,)  # type: ignore[misc]


def test_dropout_is_the_backbone_s_unless_given() -> None:
    for asked, expected in ((None, 0.1), (0.0, 0.0), (0.3, 0.3)):
        model = tiny_ladder(dropout=asked)
        rates = {module.p for module in model.modules() if type(module).__name__ == "Dropout"}
        rates |= {module.dropout for module in model.modules() if type(module).__name__ == "T5Attention"}
        assert rates == {expected}

"""Python that the README and the documentation show is carried out, with small models in place of large ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5ForConditionalGeneration

from helpers.paths import ROOT
from helpers.shown import PAGES
from lst_scale import LadderConfig, LadderModel
from lst_scale.system.assets import resolve

SMALLER = {"google-t5/t5-base": resolve("embedded:tiny-t5"), "[23]": "[3]", "[3, 7, 11]": "[1, 3]", "[5, 11, 17, 23, 29]": "[1]"}


def blocks() -> list[tuple[str, str]]:
    """Return page and text of each block of Python, those that show a file of examples/ left out."""
    found = [(page, text) for page in PAGES for text in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)]
    return [(page.relative_to(ROOT).as_posix(), text) for page, text in found if "--8<--" not in text]


def block(page: str, part: str) -> str:
    [text] = [text for name, text in blocks() if name == page and part in text]
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    return text


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(vocabulary: int) -> dict[str, Any]:
    ids = torch.randint(5, vocabulary, (2, 6), generator=torch.Generator().manual_seed(0))
    return {"ids": ids, "mask": torch.ones_like(ids), "labels": ids.clone()}


@pytest.mark.parametrize(("page", "part"), [("README.md", "save_pretrained"), ("docs/python.md", "load_release_state_dict")])
def test_a_ladder_on_a_t5_as_pages_show_it(page: str, part: str) -> None:
    t5 = T5ForConditionalGeneration.from_pretrained(SMALLER["google-t5/t5-base"])
    weights = LadderModel(t5, LadderConfig(reduction_factor=8, side_layers=[3])).release_state_dict()
    names = {"t5": t5, "weights": weights, **rows(4000)}
    exec(block(page, part), names)
    assert torch.isfinite(names["loss"]) and Path("side/side_network.safetensors").is_file()


def test_a_ladder_on_a_language_model_as_its_page_shows_it() -> None:
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        )
    )

    class Tokenized:
        input_ids = [7, 8, 9]

    names = {"llm": llm, "tokenizer": lambda text: Tokenized, **rows(200)}
    exec(block("docs/llm.md", "as_backbone"), names)
    assert torch.isfinite(names["loss"])


def test_a_ladder_as_an_adapter_as_its_page_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("docs/peft.md", "get_peft_model"), {})
    assert "trainable params" in capsys.readouterr().out


def test_what_is_converted_to_peft_and_back_as_its_page_shows_it() -> None:
    ladder = LadderModel(SMALLER["google-t5/t5-base"], LadderConfig(reduction_factor=8, side_layers=[3]))
    ladder.save_pretrained("runs/kinds-person-or-food-seed0/side_network")
    exec(block("docs/peft.md", "adapter_from_side_network"), {})
    again = LadderModel.from_pretrained("side", SMALLER["google-t5/t5-base"])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ladder.parameters(), strict=True))


@pytest.mark.parametrize(("page", "text"), blocks(), ids=lambda value: value.split("\n")[0][:60])
def test_python_that_is_shown_is_python(page: str, text: str) -> None:
    compile(text, page, "exec")
    for line in re.findall(r"^(?:from lst_scale.*|import lst_scale.*)$", text, flags=re.MULTILINE):
        exec(line, {})

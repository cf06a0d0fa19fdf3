"""A model card says what was trained, and its code runs as it is printed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.models import make_t5
from helpers.recipes import recipe_writer
from helpers.tiny import tiny_t5
from lst_scale import LadderConfig, LadderModel
from lst_scale.cli.main import app
from lst_scale.recipe.schema import load_recipe
from lst_scale.side.card import licence_of
from lst_scale.training.run import run

CONFIG = LadderConfig(reduction_factor=4, side_layers=[0, 2])
FEW = {"training__max_steps": 1, "training__micro_batch_size": 6, "data__max_eval_rows": 2, "training__patience": None}


def code_of(card: str, language: str = "python") -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)
    return str(found)


def printed(code: str, capsys: pytest.CaptureFixture[str], **given: Any) -> str:
    capsys.readouterr()
    exec(compile(code, "card", "exec"), given)
    return capsys.readouterr().out


def test_the_card_of_a_side_network_on_a_live_t5_asks_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    t5 = tiny_t5()
    LadderModel(t5, CONFIG).save_pretrained(tmp_path / "side")
    card = (tmp_path / "side" / "README.md").read_text()
    assert f"LadderModel.from_pretrained('{tmp_path / 'side'}', t5)" in card and "base_model" not in card
    assert "The backbone's own licence applies to it." in card
    printed(code_of(card), capsys, t5=t5)


def test_the_card_of_a_side_network_on_a_named_backbone_answers_a_text(
    tiny_t5_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LadderModel(str(tiny_t5_dir), CONFIG).save_pretrained(tmp_path / "side")
    assert printed(code_of((tmp_path / "side" / "README.md").read_text()), capsys).endswith("\n")


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("card")
    return recipe_writer(folder, make_t5(folder / "t5", dropout_rate=0.0))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("template", {"task__template": "{{Word}}: {word}\nWhich? {definition} <extra_id_0>", "task__target_prefix": "<extra_id_0>"}),
        ("likelihood", {"evaluation__method": "likelihood", "task__prefix": "kind of {thing}"}),
        ("lora", {"method": {"name": "lora", "rank": 2}}),
        ("prompt", {"method": {"name": "prompt", "num_vectors": 3}, "evaluation__method": "likelihood"}),
        ("bitfit", {"method": {"name": "bitfit"}}),
    ],
)
def test_the_card_of_a_run_tells_its_facts_and_answers(
    name: str,
    changes: dict[str, Any],
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = load_recipe(str(write(name, **FEW, **changes)))
    (result,) = run(recipe)
    folder = Path(recipe.output_dir) / recipe.run_name
    card = (folder / ("side_network" if recipe.method.name == "lst" else "trained") / "README.md").read_text()
    for fact in (
        "kind, classification",
        "act, artifact, attribute",
        "accuracy ",
        "1 steps of 6 rows",
        "24, ",
        "train train.jsonl",
        "torch ",
    ):
        assert fact in card, fact
    assert "{definition}" in card and "backbone's own licence applies" in card and str(result["versions"]["transformers"]) in card
    monkeypatch.chdir(tmp_path)
    if name != "bitfit":
        answer = printed(code_of(card), capsys).strip()
        assert recipe.evaluation.method == "generation" or answer in result["labels"]
        return
    row, predict = code_of(card, "sh").splitlines()
    Path("rows.jsonl").write_text(shlex.split(row)[1] + "\n")
    done = CliRunner().invoke(app, shlex.split(predict)[1:], catch_exceptions=False)
    assert done.exit_code == 0 and Path("answers.jsonl").is_file(), done.output


@pytest.mark.parametrize(
    ("checkpoint", "licence"),
    [
        ("google-t5/t5-3b", "apache-2.0"),
        ("google/flan-t5-xl", "apache-2.0"),
        ("Qwen/Qwen3-8B", "apache-2.0"),
        ("embedded:tiny-t5", "see the backbone's README.md"),
        ("somebody/t5", None),
    ],
)
def test_a_backbones_licence_is_told_where_it_is_known(checkpoint: str, licence: str | None) -> None:
    assert licence_of(checkpoint) == licence

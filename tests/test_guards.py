"""What must stay true of the tree itself."""

from __future__ import annotations

import html
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT
from lst_scale.recipe.schema import parse_recipe


def test_imports_go_one_way() -> None:
    done = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_only_one_file_touches_each_of_torch_distributed_bitsandbytes_and_yaml() -> None:
    owners = {
        r"torch\.distributed|import torch\.distributed": {"distributed.py", "engine.py"},  # engine: ZeRO-3's own process group
        r"from bitsandbytes|import bitsandbytes": {"precision.py"},
        r"^import yaml|^from yaml": {"decode.py", "schema.py"},
        r"trust_remote_code=True|pickle\.load|torch\.load": set(),
    }
    for pattern, allowed in owners.items():
        found = {p.name for p in (ROOT / "lst_scale").rglob("*.py") if re.search(pattern, p.read_text(), flags=re.MULTILINE)}
        assert found <= allowed, (pattern, found)


def test_only_a_family_s_own_folder_names_a_model_s_classes_and_tensors() -> None:
    """But for the reader of the original release's checkpoints. `modeling_` covers transformers' module of every model."""
    words = r"modeling_(?!utils|outputs)\w+|T5Block|T5Config|T5ForConditionalGeneration|lm_head|encoder\.block|decoder\.block"
    words += r"|SelfAttention|EncDecAttention|DenseReluDense|T5LayerNorm|relative_attention|final_layer_norm|\bmodel\.shared\b"
    package = ROOT / "lst_scale"
    allowed = {path for path in package.rglob("*.py") if package / "backbone" / "families" in path.parents or path.name == "release.py"}
    found = {f"{p.relative_to(ROOT)}: {word}" for p in set(package.rglob("*.py")) - allowed for word in re.findall(words, p.read_text())}
    assert not found, found


def test_nobody_asks_which_kind_of_backbone_there_is() -> None:
    """A backbone is its protocol (`taps.Backbone`). `as_backbone` alone looks: it also takes a model of transformers, or its name."""
    words = {
        r"isinstance\([^()]*Backbone\b|AnyBackbone|object\.__setattr__": {"backbone/__init__.py"},
        # What DeepSpeed hangs on parameters, and what a configuration of transformers may leave out.
        r"hasattr\(": {"training/engine.py", "methods/full.py", "backbone/families/t5/model.py"},
    }
    package = ROOT / "lst_scale"
    for word, allowed in words.items():
        found = {p.relative_to(package).as_posix() for p in package.rglob("*.py") if re.search(word, p.read_text())}
        assert found <= allowed, (word, found)


def test_the_harness_speaks_of_source_and_target() -> None:
    """Which stack makes whose states is a family's business. The names allowed are those of files and of transformers."""
    package = ROOT / "lst_scale"
    rooms = ("backbone", "data", "inference", "inputs", "methods", "plan", "runs", "system", "training")
    files = {path for room in rooms for path in (package / room).rglob("*.py") if package / "backbone" / "families" not in path.parents}
    words = {f"{path.relative_to(ROOT)}: {word}" for path in files for word in re.findall(r"\w*(?:en|de)coder\w*", path.read_text())}
    assert {word for word in words if not word.endswith((": decoder_final", ": decoder_start_token_id"))} == set()


def test_training_cache_and_answers_know_the_protocol_and_no_class_behind_it() -> None:
    """But for methods that train inside a model, and the planner, which holds one without weights."""
    package = ROOT / "lst_scale"
    knowing = {path.relative_to(package) for path in package.rglob("*.py") if re.search(r"(?:Local|Grouped)Backbone", path.read_text())}
    others = {path.as_posix() for path in knowing if path.parts[0] != "plan" and path.parts[:2] != ("backbone", "placement")}
    assert others <= {"backbone/__init__.py", "methods/__init__.py", "methods/full.py"}


def test_nobody_reaches_into_a_backbone_or_a_trainee() -> None:
    words = r"\b(?:backbone|live|shared)\._\w+|trainee\.backbone\b|lambda.*\bBackbone\b"
    package = ROOT / "lst_scale"
    found = {f"{p.relative_to(ROOT)}: {word}" for p in package.rglob("*.py") for word in re.findall(words, p.read_text())}
    assert found == set()


def test_no_name_of_a_parameter_is_a_switch() -> None:
    found = [str(p) for p in (ROOT / "lst_scale").rglob("*.py") if '"gate" in' in p.read_text()]
    assert not found, found


def test_no_file_beside_train_py_hides_a_module_of_somebody_else() -> None:
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    ours = {path.stem for path in (ROOT / "lst_scale").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    # But for the name under which PEFT's users look for us: train.py drops its own folder before it imports anything.
    assert not (ours - {"__init__", "peft"}) & taken


def test_train_py_run_as_a_file_drops_its_own_folder_from_the_path() -> None:
    done = subprocess.run(
        [sys.executable, "lst_scale/train.py", "--local_rank=0", "seed=7", "--recipe", "t5-3b", "task=mrpc", "--print-recipe", "name=x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2,494,850" in done.stdout
    assert "seed: 7" in done.stdout and "task: mrpc" in done.stdout and "name: x" in done.stdout  # options between overrides


def test_what_tests_share_is_in_their_helpers() -> None:
    found = [
        f"{path.name}: {line}"
        for path in (ROOT / "tests").rglob("*.py")
        for line in re.findall(r"^ *(?:from|import) (?:test_\w+|conftest|tiny)\b.*", path.read_text(), flags=re.MULTILINE)
    ]
    assert not found, "import these from tests/helpers"


def test_what_only_some_runs_need_is_imported_where_it_is_used() -> None:
    optional = ("datasets", "evaluate", "sklearn", "pandas", "rouge_score", "sacrebleu", "matplotlib", "submitit", "tensorboard")
    program = f"import sys, lst_scale.training.run; print([name for name in {optional} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr + done.stdout


def test_every_command_of_the_readme_and_the_documentation_exists() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), flags=re.DOTALL)]
    lines = [line.strip() for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]
    assert lines
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line in lines:
        for target in re.findall(r"^make ([a-z-]+)", line):
            assert target in targets, line
        for path in re.findall(r"(?<![\w/])(?:lst_scale|benchmarks|pretraining|slurm)/[\w/]+\.py", line):
            assert (ROOT / path).is_file(), line
        for name in re.findall(r"--recipe ([\w.-]+)", line):
            assert (ROOT / "recipes" / f"{name}.yaml").is_file(), line


@pytest.mark.slow
def test_a_wheel_installed_elsewhere_finds_recipes_deepspeed_files_and_the_embedded_backbone(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = next(wheels.glob("*.whl"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    script = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import lst_scale; from lst_scale import recipe;"
        "from lst_scale.system import assets; from pathlib import Path;"
        f"assert lst_scale.__file__.startswith({str(site)!r}), lst_scale.__file__;"
        "assert len(assets.available_recipes()) >= 6; recipe.load_recipe('quickstart'); assets.load_ds_config('zero3');"
        "assert (Path(assets.resolve('embedded:tiny-t5')) / 'model.safetensors').exists(); assets.resolve('embedded:wordnet/test.jsonl')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_promise_of_what_happens_when_names_a_test_that_exists() -> None:
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "happens.md").read_text())
    there = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) >= 8
    assert [name for name in named if f"def {name}(" not in there] == []


def test_the_recipe_at_the_head_of_the_readme_is_whole() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "data.md"):
        first = re.search(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL)
        assert first is not None
        assert parse_recipe(first[1], page.name).run_name == "kinds-person-or-food-seed0"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_picture_of_the_readme_is_drawn_from_its_text_file() -> None:
    text, drawn = ((ROOT / "docs" / name).read_text() for name in ("architecture.dot", "architecture.svg"))
    shown = set(re.findall(r"<text [^>]*>([^<]*)</text>", drawn))
    written = {line for label in re.findall(r'label="([^"]*)"', text) for line in label.split(r"\n")}
    assert {html.escape(line, quote=False) for line in written} == shown, "dot -Tsvg docs/architecture.dot -o docs/architecture.svg"

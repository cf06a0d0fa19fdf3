"""Each mistake ends in one line that says what is wrong, where, and what to write instead."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import ROOT
from lst_scale.data.tasks import load_task
from lst_scale.errors import DataError, LstScaleError, RecipeError
from lst_scale.recipe.schema import load_recipe, parse_recipe, to_yaml
from lst_scale.system.assets import available_recipes, load_ds_config

RECIPE = """
name: t
task: rte
backbone: {checkpoint: x}
method: {name: lst, side_layers: [1, 2]}
optimizer: {learning_rate: 3e-3}
"""

MISTAKES = [
    ("taks=rte", "taks: there is no such key. Did you mean 'tasks'?"),
    ("task=rtee", "task: 'rtee' is not valid. Did you mean 'rte'?"),
    ("method.reduction_facto=4", "method.reduction_facto: there is no such key. Did you mean 'reduction_factor'?"),
    ("method.reduction_factor=0", "method.reduction_factor: 0 should be greater than or equal to 1"),
    ("method.side_layers=[3,1]", "method.side_layers: [3, 1] must be ascending, each block once, at least one; or write all"),
    ("method.side_layers=foo", "method.side_layers: 'foo' is not valid. Valid: all."),
    ("method.name=lara", "method.name: 'lara' is not valid. Did you mean 'lora'?"),
    (
        "method={name: lora, side_layers: [1]}",
        "method.side_layers: there is no such key. Valid: alpha, bitfit, dropout, gradient_checkpointing, name, precision, rank, targets.",
    ),
    ("method={name: lora, targets: [q, 3]}", "method.targets.1: 3 should be string"),
    (
        "method={name: lst, design: adapter}",
        "method: design adapter has no blocks to carve out of the backbone: write initialization: random",
    ),
    ("backbone.placement=streamd", "backbone.placement.name: 'streamd' is not valid. Did you mean 'streamed'?"),
    (
        "backbone.placement={name: streamed, folder: x}",
        "backbone.placement: folder has no effect on source host: remove it or write source: disk",
    ),
    ("backbone.placement={name: zero3, size: 2}", "backbone.placement.size: there is no such key. Valid: name."),
    ("backbone.placement={size: 2}", "backbone.placement: needs a name; write name: replicated or tensor_parallel or zero3 or streamed"),
    ("method.dropout=1.0", "method.dropout: 1.0 should be less than 1"),
    (
        "backbone.precision=fp16",
        "backbone.precision: fp16 is refused, since T5 overflows in it (past 65504): write bf16, which has the range of fp32",
    ),
    ("backbone.precision=int9", "backbone.precision: 'int9' is not valid. Did you mean 'int8'?"),
    (
        "backbone.max_quantization_error=0.1",
        "backbone: max_quantization_error has no effect on precision bf16: remove it or write int8 or nf4",
    ),
    ("optimizer.warmup=1.5", "optimizer.warmup: 1.5 must be whole steps, such as 500, or a share of all steps below 1, such as 0.06"),
    ("optimizer.learning_rate=abc", "optimizer.learning_rate: 'abc' should be number"),
    ("optimizer.learning_rate=-1", "optimizer.learning_rate: -1 should be greater than 0"),
    ("training.evaluate_every=epochs", "training.evaluate_every: 'epochs' is not valid. Did you mean 'epoch'?"),
    ("training.epochs=two", "training.epochs: 'two' should be integer"),
    ("training.micro_batch_size=500", "training: micro_batch_size 500 is larger than global_batch_size 100: lower it"),
    ("training.batch_size=8", "training.batch_size: there is no such key. Did you mean 'micro_batch_size'?"),
    ("seed=-1", "seed: -1 should be greater than or equal to 0"),
    ("foo", "'foo' is no override: write key=value, for instance training.epochs=3"),
    ("optimizer=5", "optimizer: 5 should be a mapping of keys to values"),
    ("data.max_source_length=1.5", "data.max_source_length: 1.5 should be integer"),
    ("name=a/b", "name: 'a/b' names a folder: letters, digits, '.', '_' and '-' only, starting with a letter or digit"),
    ("optimizer.betas=[0.9]", "optimizer.betas: needs more than 1 values"),
    ("logging.tensorboard=3", "logging.tensorboard: 3 should be boolean"),
    (
        "evaluation={method: likelihood, num_beams: 4}",
        "evaluation: num_beams and max_new_tokens have no effect on method likelihood: remove them or write generation",
    ),
    (
        "evaluation={method: expectation, max_new_tokens: 4}",
        "evaluation: num_beams and max_new_tokens have no effect on method expectation: remove them or write generation",
    ),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_a_mistake_in_a_recipe_is_one_line(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RECIPE, "t.yaml", [override])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "t.yaml: line 2: the key 'a' is written twice"),
        ("- 1", "t.yaml: a recipe is a mapping of keys to values, for instance task: rte"),
        ("a: [1", "t.yaml: line 1: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_broken_yaml_names_its_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "t.yaml")
    assert str(caught.value) == message


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RECIPE, "t.yaml", ["taks=rte", "seed=x", "training.epoch=3"])
    assert len(str(caught.value).splitlines()) == 3


def test_three_e_minus_three_is_a_number_and_a_resolved_recipe_loads_back_equal() -> None:
    for name in available_recipes():
        recipe = load_recipe(name)
        if recipe.method.name == "lst":
            assert recipe.optimizer.learning_rate in (0.002, 0.003)
        assert parse_recipe(to_yaml(recipe), name) == recipe


def test_a_wrong_recipe_is_told_in_under_a_second_and_before_torch_is_imported() -> None:
    script = (
        "import sys, lst_scale.train as t; code = t.main(['--recipe', 't5-3b', 'taks=1']); print('torch' in sys.modules); sys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (
        1,
        "False",
        "error: taks: there is no such key. Did you mean 'tasks'?",
    )
    assert seconds < 5  # about 0.3 s alone; the bound is for a busy machine, the import is what is tested


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train_batch_size": 8}', "sets what the recipe owns: train_batch_size (the recipe's training.global_batch_size)"),
        ('{"bf16": {"enabled": true}, "gradient_clipping": 1}', "gradient_clipping (the recipe's optimizer.max_grad_norm)"),
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_a_deepspeed_file_that_says_what_the_recipe_owns_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(RecipeError) as caught:
        load_ds_config(str(tmp_path / "ds.json"))
    assert message in str(caught.value)


def test_an_unknown_name_lists_what_ships() -> None:
    with pytest.raises(RecipeError, match=r"--recipe: 't5-3bb' is neither a file nor one of those that ship. Did you mean 't5-3b'\?"):
        load_recipe("t5-3bb")
    with pytest.raises(
        RecipeError, match=r"--recipe: 't5-small' is neither a file nor one of those that ship. Valid: clip-t5-adapters, clip-t5-bitfit, "
    ):
        load_recipe("t5-small")  # a model's name
    with pytest.raises(RecipeError, match=r"training.deepspeed: 'zero9' is neither a file"):
        load_ds_config("zero9")


DATA = [
    ("train.txt", "a", {}, "task.train: {path} must end in .csv, .jsonl, .parquet; convert it to one of them"),
    ("train.jsonl", None, {}, "task.train: {path} is not there; write the path of a file, relative to {cwd}"),
    ("train.jsonl", "", {}, "task.train: {path} has no rows"),
    (
        "train.jsonl",
        '{"x": "a", "y": "0"}\n{"x"',
        {},
        "{path}: line 2 is not valid JSON: Expecting ':' delimiter at character 5",
    ),
    ("train.jsonl", "[1]", {}, '{path}: line 1 is not an object; write {{"field": value, ...}}'),
    ("train.jsonl", '{"x": "a", "yy": "0"}', {}, "{path}: row 1 has no field 'y'. Did you mean 'yy'?"),
    ("train.jsonl", '{"x": null, "y": "0"}', {}, "{path}: row 1 has no x; fill it in or remove the row"),
    (
        "train.jsonl",
        '{"x": "a", "y": "high"}',
        {"kind": "regression"},
        "{path}: row 1: y is 'high', not a number; kind regression needs numbers",
    ),
    (
        "train.jsonl",
        '{"x": "a", "y": "2"}',
        {"labels": ["0", "1"]},
        "train: row 1 has the label '2'; known: 0, 1. Add it to task.labels, or fix the row",
    ),
    ("train.csv", "x,y\na,0,7\n", {}, "{path}: row 1 has more values than the header has names; quote values that hold commas"),
    ("train.parquet", "no parquet", {}, "{path} is not a whole parquet file"),
]


@pytest.mark.parametrize(("name", "content", "task", "message"), DATA, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(DATA)])
def test_a_mistake_in_a_data_file_is_one_line(name: str, content: str | None, task: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    fields = {"kind": "classification", "train": str(path), "validation": str(path), "source": ["x"], "target": "y"} | task
    recipe = parse_recipe(RECIPE, "t.yaml", [f"task={json.dumps(fields)}"])
    with pytest.raises(DataError) as caught:
        load_task(recipe)
    assert str(caught.value).startswith(message.format(path=path, cwd=Path.cwd())) and "\n" not in str(caught.value)


def test_glue_without_a_network_says_what_to_do() -> None:
    with pytest.raises(LstScaleError, match=r"data set nyu-mll/glue .rte. could not be loaded .*: download it where there is a network"):
        load_task(parse_recipe(RECIPE, "t.yaml"))

"""A mistake is told before torch is imported, all mistakes at once, and a start that fails leaves nothing that refuses the next one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from helpers.launchers import fresh
from helpers.paths import ROOT
from lst_scale import train
from lst_scale.backbone.model_config import find_config, read_config
from lst_scale.cli.slurm import app as slurm_app
from lst_scale.errors import ArgumentError, BackboneError, LadderError, NotReady, RecipeError, print_error
from lst_scale.recipe.schema import Recipe, load_recipe
from lst_scale.runs.folder import check_folder
from lst_scale.side.count import shape_of
from lst_scale.training.preflight import check_before_start

ROWS = [{"x": "a", "y": "no"}, {"x": "b", "y": "yes"}]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a folder with the same rows as good.csv, good.jsonl and good.parquet, and with columns x and z as other.*."""
    for name, rows in (("good", ROWS), ("other", [{"x": row["x"], "z": row["y"]} for row in ROWS])):
        names = list(rows[0])
        (tmp_path / f"{name}.csv").write_text("\n".join([",".join(names), *(",".join(row.values()) for row in rows)]))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    return tmp_path


def own_task(files: Path, train_file: str = "good.csv", validation: str = "good.csv", **changes: Any) -> dict[str, Any]:
    fields = {"name": "t", "kind": "classification", "source": ["x"], "target": "y"}
    return fields | {"train": str(files / train_file), "validation": str(files / validation)} | changes


def problems(recipe: Recipe, **options: Any) -> list[str]:
    with pytest.raises(NotReady) as caught:
        check_before_start([recipe], **({"resume": False} | options))
    return [line.strip() for line in str(caught.value).split("\n")]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_wrong_column_is_found_in_the_header(suffix: str, files: Path, write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(str(write_recipe("r", task=own_task(files, f"other.{suffix}", f"good.{suffix}"))))
    assert problems(recipe) == [f"{files}/other.{suffix}: row 1 has no field 'y'. Valid: x, z."]
    check_before_start([load_recipe(str(write_recipe("s", task=own_task(files, f"good.{suffix}"))))], resume=False)


def test_all_mistakes_are_told_at_once(files: Path, write_recipe: Callable[..., Path], tiny_t5_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_t5_dir, broken)
    (broken / "tokenizer.json").unlink()
    (tmp_path / "runs" / "r-t-seed0" / "checkpoints" / "step-00000004").mkdir(parents=True)
    path = write_recipe(
        "r",
        task=own_task(files, "nope.csv", "other.csv"),
        backbone={"checkpoint": str(broken), "precision": "fp32"},
        training__deepspeed="zero4",
        training__start_from=str(tmp_path / "nowhere"),
        method__reduction_factor=5,
    )
    found = problems(load_recipe(str(path)))
    beginnings = [
        f"{tmp_path}/runs/r-t-seed0 already holds a run: add --resume",
        f"training.start_from: {tmp_path}/nowhere is no folder",
        "training.deepspeed: 'zero4' is neither a file nor one of those that ship",
        f"task.train: {files}/nope.csv is not there",
        f"{files}/other.csv: row 1 has no field 'y'",
        f"{broken} holds no tokenizer",
        "reduction_factor 5 must divide d_model 32, d_ff 64 and d_kv 8: write one of 1, 2, 4, 8",
    ]
    assert len(found) == len(beginnings)
    for line, beginning in zip(found, beginnings, strict=True):
        assert line.startswith(beginning)


CASES: list[tuple[dict[str, Any], str]] = [
    ({"method__side_layers": [0, 3]}, "side_layers names block 3, but this backbone has blocks 0 to 2"),
    ({"method__reduction_factor": 3}, "reduction_factor 3 must divide d_model 32, d_ff 64 and d_kv 8: write one of 1, 2, 4, 8"),
    ({"backbone__checkpoint": "/nowhere/at/all"}, "backbone.checkpoint '/nowhere/at/all' is no folder"),
    ({"backbone__checkpoint": "a/b/c"}, "backbone.checkpoint 'a/b/c' is no folder"),
    ({"method": {"name": "full"}, "backbone__precision": "bf16"}, "method full trains the backbone's own weights"),
    ({"evaluation": {"method": "likelihood"}, "task__kind": "text", "task__labels": None}, "evaluation.method=likelihood needs labels"),
    ({"task__labels": ["act", "food"]}, "train: row "),
    (
        {"backbone__checkpoint": "google-t5/t5-3b", "method__reduction_factor": 7},
        "reduction_factor 7 must divide d_model 1024, d_ff 16384 and d_kv 128",
    ),
]


@pytest.mark.parametrize(("changes", "message"), CASES, ids=[str(number) for number in range(len(CASES))])
def test_what_a_checkpoint_and_a_task_do_not_admit_is_told_early(
    changes: dict[str, Any], message: str, write_recipe: Callable[..., Path]
) -> None:
    assert message in problems(load_recipe(str(write_recipe("r", **changes))))[0]


def test_labels_are_those_of_the_training_file_where_it_is_short(files: Path, write_recipe: Callable[..., Path]) -> None:
    (files / "more.csv").write_text("x,y\na,maybe\n")
    recipe = load_recipe(str(write_recipe("r", task=own_task(files, "good.csv", "more.csv"))))
    misfit = load_recipe(str(write_recipe("f", task=own_task(files, metrics=["f1"]))))
    assert problems(misfit)[0].startswith("task.metrics: f1 ")
    assert problems(recipe) == ["validation: row 1 has the label 'maybe'; known: no, yes. Add it to task.labels, or fix the row"]
    (files / "long.csv").write_text("x,y\n" + "a,no\n" * 3000 + "a,maybe\n")
    check_before_start([load_recipe(str(write_recipe("s", task=own_task(files, "long.csv", "more.csv"))))], resume=False)


def test_resume_beside_overwrite_and_a_run_that_is_there_are_told_early(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(str(write_recipe("r")))
    assert problems(recipe, resume=True, overwrite=True) == ["--resume and --overwrite exclude each other: write one of them"]
    (tmp_path / "runs" / recipe.run_name).mkdir(parents=True)
    (tmp_path / "runs" / recipe.run_name / "result.json").write_text("{}")
    assert "already holds a run" in problems(recipe)[0]
    check_before_start([recipe], resume=True)


def test_each_mistake_of_many_recipes_is_told_once(files: Path, write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(str(write_recipe("r", task=own_task(files, "nope.csv"))))
    many = [recipe.model_copy(update={"seed": seed}) for seed in range(50)]
    with pytest.raises(NotReady) as caught:
        check_before_start(many, resume=False, together=False)
    assert len(str(caught.value).split("\n")) == 1


EARLY = """
import sys
from lst_scale import train
from lst_scale.cli import slurm as cli
if sys.argv[1] == "slurm":
    try:
        cli.main()
    except SystemExit as left:
        code = left.code
else:
    code = train.main(sys.argv[1:])
print(code, [name for name in ("torch", "transformers", "deepspeed", "datasets") if name in sys.modules])
"""


@pytest.mark.parametrize("way", ["train", "submit"])
def test_mistakes_in_data_and_shapes_are_told_before_torch_is_imported(way: str, files: Path, write_recipe: Callable[..., Path]) -> None:
    path = write_recipe("r", task=own_task(files, "nope.csv", "other.parquet"), method__reduction_factor=5)
    script = EARLY.replace("cli.main()", f"cli.app(['submit', '--dry-run', '--local', '--recipe', {str(path)!r}], standalone_mode=False)")
    script = script.replace(
        "except SystemExit as left:\n        code = left.code", "except Exception as error:\n        train.print_error(error); code = 1"
    )
    arguments = ["slurm"] if way == "submit" else ["--recipe", str(path)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, env=fresh(), capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1 []", done.stderr
    lines = done.stderr.strip().split("\n")
    assert len(lines) == 3 and lines[0].startswith("error: task.train") and "reduction_factor 5" in lines[2]


def test_submit_and_sweep_refuse_what_train_refuses(files: Path, write_recipe: Callable[..., Path]) -> None:
    path = write_recipe("r", task=own_task(files, "nope.csv"))
    for command in (["submit"], ["sweep", "seed=0,1"]):
        done = CliRunner().invoke(slurm_app, [*command, "--recipe", str(path), "--dry-run"])
        assert isinstance(done.exception, NotReady) and "nope.csv is not there" in str(done.exception)


def test_one_process_of_each_machine_tells_what_may_be_wrong_there_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, local_rank, spoken in (("0", "0", True), ("1", "1", False), ("8", "0", True), ("9", "1", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        print_error(NotReady(["wrong"]))
        assert bool(capsys.readouterr().err) is spoken
        print_error(RecipeError("wrong"))
        assert bool(capsys.readouterr().err) is (rank == "0")


CONFIGS: list[tuple[str | dict[str, Any], str]] = [
    ("[1]", "it holds a list"),
    ('"x"', "it holds a text"),
    ("{", "can't be read as a model configuration: "),
    ("", "can't be read as a model configuration: "),
    ("[" * 100_000, "nested too deeply"),
    ({"d_model": "32"}, "d_model '32' should be a whole number from 1"),
    ({"d_model": -32}, "d_model -32 should be"),
    ({"d_ff": True}, "d_ff True should be"),
    ({"d_kv": 8.0}, "d_kv 8.0 should be"),
    ({"num_heads": 0}, "num_heads 0 should be"),
    ({"num_layers": 10_000_000}, "num_layers 10000000 should be a whole number from 1 to 1000"),
    ({"num_layers": None}, "num_layers None should be"),
    ({"num_decoder_layers": [1]}, "num_decoder_layers [1] should be"),
    ({"vocab_size": 10**12}, "vocab_size 1000000000000 should be"),
    ({"dropout_rate": float("nan")}, "dropout_rate nan should be a number of at least 0 and below 1"),
    ({"dropout_rate": "0.1"}, "dropout_rate '0.1' should be"),
    ({"dropout_rate": 1}, "dropout_rate 1 should be"),
    ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon inf should be"),
    ({"layer_norm_epsilon": 0}, "layer_norm_epsilon 0 should be"),
    ({"feed_forward_proj": "banana"}, "feed_forward_proj 'banana' should be relu, gated-gelu"),
    ({"feed_forward_proj": "gated-gated-relu"}, "feed_forward_proj 'gated-gated-relu' should be"),
    ({"feed_forward_proj": 3}, "feed_forward_proj 3 should be"),
    ({"feed_forward_proj": "x\n\x1b[31m"}, "feed_forward_proj 'x\\n\\x1b[31m' should be"),
    ({"decoder_start_token_id": 4096}, "decoder_start_token_id 4096 should be the number of a token, from 0 to 4095"),
    ({"decoder_start_token_id": -1}, "decoder_start_token_id -1 should be"),
    ({"pad_token_id": "0"}, "pad_token_id '0' should be"),
    ({"eos_token_id": [1, 9999]}, "eos_token_id [1, 9999] should be"),
    ({"eos_token_id": []}, "eos_token_id [] should be"),
]


@pytest.mark.parametrize(("damage", "message"), CONFIGS, ids=[str(number) for number in range(len(CONFIGS))])
def test_a_damaged_config_is_one_line(damage: str | dict[str, Any], message: str, tiny_t5_dir: Path, tmp_path: Path) -> None:
    whole = json.loads((tiny_t5_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(damage if isinstance(damage, str) else json.dumps(whole | damage))
    for look in (lambda: read_config(tmp_path / "config.json"), lambda: shape_of(str(tmp_path))):
        with pytest.raises(BackboneError) as caught:
            look()
        line = str(caught.value)
        assert message in line and str(tmp_path) in line and line.isprintable()


def test_configs_as_they_are_published_are_taken(tiny_t5_dir: Path, tiny_mt5_dir: Path, tiny_gated_t5_dir: Path, tmp_path: Path) -> None:
    for folder in (tiny_t5_dir, tiny_mt5_dir, tiny_gated_t5_dir):
        found = find_config(str(folder))
        assert found is not None and read_config(found)["d_model"] == 32
    for changes in (
        {"num_decoder_layers": None},
        {"eos_token_id": [1, 2]},
        {"decoder_start_token_id": None},
        {"feed_forward_proj": "gated-silu"},
    ):
        (tmp_path / "config.json").write_text(json.dumps(json.loads((tiny_t5_dir / "config.json").read_text()) | changes))
        assert read_config(tmp_path / "config.json")


def test_a_checkpoint_that_is_no_folder_or_lacks_its_config_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, message in (
        (str(tmp_path), "has no config.json: copy the whole checkpoint"),
        (str(tmp_path / "file"), "is a file: write the folder that holds it"),
        (str(tmp_path / "none"), "is no folder: write an existing path or a hub name"),
        ("x" * 300, "backbone.checkpoint 'xxx"),
    ):
        with pytest.raises(BackboneError) as caught:
            find_config(name)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert find_config("nobody/nothing") is None


def test_a_folder_is_free_until_something_was_trained_in_it(tmp_path: Path) -> None:
    for name in ("recipe.yaml", "log.txt", "metrics.jsonl", ".lock"):
        (tmp_path / name).write_text("")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "tensorboard").mkdir()
    check_folder(tmp_path, resume=False, overwrite=False)
    slurm = tmp_path / "slurm"
    slurm.mkdir()
    (slurm / "jobs.jsonl").write_text("{}\n")
    with pytest.raises(ArgumentError, match="already holds a run"):
        check_folder(tmp_path, resume=False, overwrite=False)
    (slurm / "failure-0.json").write_text("{}")
    check_folder(tmp_path, resume=False, overwrite=False)
    for kept in ("checkpoints/step-00000004", "best/step-00000004", "side_network/x", "trained/x"):
        (tmp_path / kept).mkdir(parents=True)
        with pytest.raises(ArgumentError, match="already holds a run"):
            check_folder(tmp_path, resume=False, overwrite=False)
        shutil.rmtree(tmp_path / kept)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ArgumentError, match="already holds a run"):
        check_folder(tmp_path, resume=False, overwrite=False)


def test_a_start_that_fails_leaves_no_folder_and_the_mended_one_goes_on(
    files: Path, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mistake is found early, in the data, at the tokenizer, or only when the backbone is loaded or the method is built."""
    reached: list[Path] = []

    class Reached(LadderError):
        pass

    def stop(recipe: Recipe, folder: Path, *_: Any, **__: Any) -> Any:
        reached.append(folder)
        raise Reached("the member would be built now")

    monkeypatch.setattr("lst_scale.training.run.Member", stop)
    monkeypatch.setattr("lst_scale.system.preemption.listen", lambda: None)
    folder = tmp_path / "runs" / "r-t-seed0"
    for changes, message in (
        ({"task": own_task(files, target="nope")}, "has no field 'nope'"),
        ({"task": own_task(files, labels=["no", "yes", "Ä"])}, "label 'Ä' comes back as"),
        ({"task": own_task(files), "data__max_target_length": 1}, "cuts the label"),
    ):
        assert train.main(["--recipe", str(write_recipe("r", **changes))]) == 1
        assert message in capsys.readouterr().err and not folder.exists()
    for _ in ("fails when the member is built", "is not refused afterwards"):
        assert train.main(["--recipe", str(write_recipe("r", task=own_task(files)))]) == 1
        assert "the member would be built now" in capsys.readouterr().err
    assert reached == [folder, folder]


def test_an_overwriting_start_that_fails_removes_nothing(files: Path, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "r-t-seed0"
    folder.mkdir(parents=True)
    for name in ("recipe.yaml", "result.json"):
        (folder / name).write_text("kept")
    for changes in ({"task": own_task(files, target="nope")}, {"task": own_task(files, labels=["no", "yes", "Ä"])}):
        assert train.main(["--recipe", str(write_recipe("r", **changes)), "--overwrite"]) == 1
        assert sorted(each.name for each in folder.iterdir()) == ["recipe.yaml", "result.json"]

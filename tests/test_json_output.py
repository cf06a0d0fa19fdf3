"""`--json` on every command that prints a table, `lst-scale runs`, and what a shell completes."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import io
import json
import logging.config
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from helpers.paths import ROOT
from helpers.training import train
from lst_scale.backbone.cache.key import CacheKey
from lst_scale.backbone.cache.store import TapCache
from lst_scale.cli.main import app
from lst_scale.errors import ArgumentError
from lst_scale.inputs.keys import source_digest
from lst_scale.recipe.schema import load_recipe, to_yaml

RESULT = {
    "name": "good",
    "method": "lst",
    "task": "kind",
    "scores": {"accuracy": 60.0, "score": 60.0},
    "steps": 8,
    "peak_memory_bytes": 1,
    "seconds_per_step": 1,
    "train_seconds": 1,
    "trainable_parameters": 1,
    "backbone_parameters": 1,
    "trainable_share_percent": 1,
    "world_size": 2,
    "device": "cpu",
}
RECIPE = "name: {name}\ntask: rte\nbackbone: {{checkpoint: t5-small}}\nmethod: {{name: lst}}\n"


def told(*arguments: str | Path, status: int = 0) -> Any:
    """Return what a command prints with --json, which must be that alone."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == status, done.output
    return json.loads(done.stdout)


def write(folder: Path, name: str, **files: Any) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE.format(name=name))
    for file, contents in files.items():
        path = run / {"log": "log.txt"}.get(file, f"{file}.json{'l' if file == 'metrics' else ''}")
        path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    return run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    numbers = [
        {"kind": "plan", "step": 0, "total_steps": 9},
        {"kind": "train", "step": 3, "loss": float("nan"), "seconds": 1.0},
        {"kind": "validation", "step": 4, "score": 41.5},
    ]
    metrics = "".join(json.dumps(line) + "\n" for line in numbers)
    write(tmp_path, "good", result=RESULT)
    write(tmp_path, "half", metrics=metrics)
    (tmp_path / "half" / "checkpoints" / "step-00000004").mkdir(parents=True)
    write(tmp_path / "deep", "lost", metrics=metrics, log="2026-01-01 00:00:00 failed: the loss is [bold]not finite\n")
    write(tmp_path, "odd", result="[1")
    write(tmp_path, "fresh")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "recipe.yaml").write_text("eggs: 3")
    return tmp_path


def test_runs_says_what_ran_where_how_far_and_how_well(runs: Path) -> None:
    found = {Path(one["run"]).name: one for one in told("runs", runs)}
    assert set(found) == {"good", "half", "lost", "odd", "fresh"}
    assert {name: one["state"] for name, one in found.items()} == {
        "good": "done",
        "half": "stopped",
        "lost": "failed",
        "odd": "damaged",
        "fresh": "new",
    }
    good, half = found["good"], found["half"]
    assert (good["score"], good["where"], good["method"], good["task"], good["backbone"]) == (60.0, "2 x cpu", "lst", "rte", "t5-small")
    assert (half["score"], half["validation_score"], half["step"], half["total_steps"]) == (None, 41.5, 4, 9)
    assert found["lost"]["why"] == "the loss is [bold]not finite" and "result.json" in found["odd"]["why"]


def test_runs_is_a_table_for_people(runs: Path) -> None:
    done = CliRunner().invoke(app, ["runs", str(runs)], catch_exceptions=False)
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "60.00" in lines["good"] and "41.50 so far" in lines["half"] and "[bold]not finite" in lines["deep/lost"]


def test_a_run_whose_folder_is_held_is_running(runs: Path) -> None:
    lock = os.open(runs / "half" / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert {one["state"] for one in told("runs", runs / "half")} == {"running"}
    os.close(lock)
    assert {one["state"] for one in told("runs", runs / "half")} == {"stopped"}


def test_a_folder_without_runs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"no run in .*: give the output_dir of your recipes"):
        told("runs", tmp_path)
    with pytest.raises(ArgumentError, match="there is no folder"):
        told("runs", tmp_path / "nowhere")


@pytest.mark.slow
def test_a_real_run_is_listed_with_all_that_its_files_say(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    train(write_recipe("real", training__max_steps=4))
    (one,) = told("runs", tmp_path / "runs")
    assert (one["state"], one["step"], one["total_steps"], one["where"]) == ("done", 4, 4, "1 x cpu")
    assert (one["recipe"], one["method"], one["task"]) == ("real", "lst", "kind") and one["finished"].startswith("20")
    assert one["score"] == json.loads((tmp_path / "runs" / "real-kind-seed0" / "result.json").read_text())["scores"]["score"]


def test_compare_and_collect_tell_numbers(runs: Path) -> None:
    for found in (told("compare", runs), told("slurm", "collect", "--output-dir", runs)):
        (row,) = found
        assert row["score"] == 60.0 and row["seeds"] == 1 and row["deviation"] is None and row["peak_gb"] == 1e-9


def test_status_and_its_logs(runs: Path) -> None:
    found = {Path(one["run"]).name: one for one in told("slurm", "status", "--output-dir", runs)}
    assert found["good"]["state"] == "DONE" and found["half"]["state"] == "NEW"
    assert found["half"]["loss"] is None, "JSON has no NaN"
    assert {Path(one["log"]).name for one in told("slurm", "status", "--logs", "--output-dir", runs)} == {"log.txt"}


def test_recipes() -> None:
    assert "quickstart" in told("recipes")["recipes"] and "zero2" in told("recipes")["ds_configs"]


@pytest.mark.slow
def test_a_plan_in_bytes(write_recipe: Callable[..., Path]) -> None:
    found = told("plan", "--recipe", write_recipe("planned"), "--gpu-memory", "16GB")
    first = found["methods"][0]
    assert first["method"] == "lst" and first["trainable"] > 0 and first["fits"] is True
    assert sum(first["parts"].values()) == first["peak_bytes"] < first["needed_bytes"] and first["largest_batch"] > 2
    assert found["memory_bytes"] == 16_000_000_000 and found["tap_cache"]["bytes"] > 0


def test_caches_and_tables_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TapCache(tmp_path, CacheKey(fingerprint="f", precision="fp32", layers=(0, 2), decoder_final=False, d_model=8, dtype="fp32"))
    cache.write(source_digest(torch.tensor([1])), [torch.ones(4, 8), torch.ones(4, 8)])
    cache.close()
    (found,) = told("cache", "list", "--folder", tmp_path)
    assert (found["name"], found["layers"], found["payloads"]) == (cache.folder.name, [0, 2], 1) and found["bytes"] > 0
    assert told("cache", "verify", "--folder", tmp_path) == {"damaged": []}
    taps = next(cache.folder.glob("*.taps"))
    taps.write_bytes(bytes(taps.stat().st_size))
    assert len(told("cache", "verify", "--folder", tmp_path, status=1)["damaged"]) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert told("cache", "list") == [] and told("cache", "rows") == []


def test_what_would_be_submitted(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    path = write_recipe("swept")
    write(tmp_path / "runs", "swept-kind-seed1", result=RESULT)
    (tmp_path / "runs" / "swept-kind-seed1" / "recipe.yaml").write_text(to_yaml(load_recipe(str(path), ["seed=1"])))
    found = told("slurm", "sweep", "--recipe", path, "seed=0,1", "--dry-run", "--gpus-per-node", "0", "--tasks-per-node", "1")
    assert {one["run"]: one["state"] for one in found} == {"swept-kind-seed0": "not submitted", "swept-kind-seed1": "skipped"}
    (one,) = told("slurm", "submit", "--recipe", path, "--dry-run", "--gpus-per-node", "0", "--tasks-per-node", "1")
    assert one["run"] == "swept-kind-seed0" and one["job"] is None
    assert told("slurm", "resubmit", "--output-dir", tmp_path / "runs") == []


def test_a_command_that_configures_logging_closes_no_stream_of_pytest() -> None:
    """Once, a whole worker was lost to it: every test after the first that imported submitit inside a CliRunner."""
    importlib.import_module("absl.logging")  # whichever test comes first to count n-grams does
    with contextlib.redirect_stderr(io.StringIO()):
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    assert not sys.stderr.closed


def test_every_command_that_prints_a_table_has_the_option() -> None:
    """A new command is in one of these lists, or here, where somebody has thought about it."""
    lines = {"train", "predict", "chat", "ensemble", "from-gguf", "serve", "slurm cancel", "cache remove", "cache build"}
    found: dict[str, bool] = {}

    def look(command: Any, path: str) -> None:
        for name, one in getattr(command, "commands", {}).items():
            look(one, f"{path} {name}".strip())
        if not getattr(command, "commands", None):
            found[path] = any("--json" in option.opts for option in command.params)

    look(typer.main.get_command(app), "")
    assert {name for name, there in found.items() if not there} == lines


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("lst-scale train t5-3", {"t5-3b", "t5-3b-8bit", "t5-3b-2gpu"}, "quickstart"),
        ("lst-scale train --recipe quick", {"quickstart"}, "t5-3b"),
        ("lst-scale plan --recipe flan", {"flan-t5-xl", "flan-t5-xxl"}, "t5-3b"),
        ("lst-scale slurm sweep --recipe smol", {"smollm2-135m"}, "t5-3b"),
        ("lst-scale ru", {"runs"}, "train"),
    ],
)
def test_a_shell_completes_commands_and_names_of_recipes(line: str, offered: set[str], not_offered: str) -> None:
    environment = os.environ | {"_LST_SCALE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    script = "import sys; sys.argv = ['lst-scale']; from lst_scale.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    words = set(done.stdout.split())
    assert offered <= words and not_offered not in words, done.stderr


def test_the_script_that_switches_completion_on_is_shown() -> None:
    help_text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    assert "--install-completion" in help_text and "--show-completion" in help_text

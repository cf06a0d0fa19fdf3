"""Jobs and sweeps on a real Slurm: submitted, watched, collected, submitted again; and what is refused before Slurm hears of it."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers import programs, ranks
from helpers.models import make_t5
from helpers.paths import EMBEDDED, ROOT
from helpers.recipes import recipe_writer
from helpers.runs import assert_same_weights, last_step
from helpers.slurm import ON_ONE_CORE, ON_TWO_NODES, PATIENCE, Cluster, processes_of, reference, starts, states
from helpers.training import train
from lst_scale.cli.main import app
from lst_scale.errors import LstScaleError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("an_empty_queue")]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5(tmp_path_factory.mktemp("slurm-t5"), dropout_rate=0.1)


@pytest.fixture
def recipe(tmp_path: Path, t5: Path) -> Callable[..., Path]:
    return recipe_writer(tmp_path, t5)


def test_a_sweep_of_four_with_two_at_once_and_its_table(cluster: Cluster, recipe: Callable[..., Path], tmp_path: Path) -> None:
    command = ("--recipe", str(recipe("sweep")), "seed=0,1", "method.reduction_factor=2,4", "--at-most", "2", *ON_ONE_CORE)
    assert cluster.script("sweep", *command).count(": job ") == 4
    most = 0
    while queue := cluster.queue():
        most = max(most, sum(state in ("RUNNING", "COMPLETING") for state in queue.values()))
        time.sleep(0.3)
    assert most == 2
    names = [f"sweep-reduction_factor-{r}-kind-seed{seed}" for seed in (0, 1) for r in (2, 4)]
    assert states(cluster, tmp_path / "runs") == dict.fromkeys(names, "DONE")
    table = cluster.script("collect", "--output-dir", str(tmp_path / "runs"), "--format", "csv").splitlines()
    assert {tuple(line.split(",")[:4]) for line in table[1:]} == {(f"sweep-reduction_factor-{r}", "lst", "kind", "2") for r in (2, 4)}
    assert cluster.script("sweep", *command).count("finished") == 4


def test_members_share_a_job_and_one_that_fails_fails_alone(cluster: Cluster, recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe(
        "shared",
        optimizer__weight_decay=0.1,
        training__epochs=20,
        training__evaluate_every=40,
        training__save_every_steps=10,
        data__shuffle_seed=0,
    )
    sweep = ("optimizer.learning_rate=1e-2,1000", "method.reduction_factor=2,4", "--together", "4")
    said = cluster.script("sweep", "--recipe", str(path), *sweep, "--at-most", "1", *ON_ONE_CORE)
    jobs = re.findall(r": job (\S+)", said)
    assert len(jobs) == 4 and len(set(jobs)) == 1
    root = tmp_path / "runs"
    run = root / "shared-learning_rate-1e-2-reduction_factor-4-kind-seed0"
    assert "too: name them as well" in cluster.script("cancel", "learning_rate-1e-2", "--output-dir", str(root), check=False)
    cluster.wait(lambda: last_step(run) > 20, PATIENCE, "step 20")
    assert "in the queue as" in cluster.script("sweep", "--recipe", str(path), *sweep, *ON_ONE_CORE)
    cluster("scontrol", "requeue", jobs[0])
    cluster.wait_until_idle()
    assert starts(run)[1] >= 10
    text = cluster.script("status", "--output-dir", str(root))
    assert len(re.findall(r"learning_rate-1e-2-\S+ +DONE", text)) == 2, text
    assert len(re.findall(r"learning_rate-1000-\S+ +FAILED .*the gradient of step \d+ is not finite", text)) == 2, text
    alone = ["method.reduction_factor=4", "optimizer.learning_rate=1e-2"]
    assert_same_weights(run, reference(path, tmp_path, *alone))
    again = re.findall(r": job (\S+)", cluster.script("resubmit", "--output-dir", str(root)))
    assert len(again) == 2 and len(set(again)) == 1


def test_failures_are_told_in_one_line_then_resubmitted_then_cancelled(
    cluster: Cluster, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    broken = make_t5(tmp_path / "broken", dropout_rate=0.0)
    tokenizer = (broken / "tokenizer.json").read_text()
    missing = recipe("missing", task__train=str(data), backbone__checkpoint=str(broken))
    traceback = recipe("traceback", backbone__checkpoint=str(broken))
    (broken / "tokenizer.json").write_text(tokenizer.replace('"model"', '"modell"', 1))
    data.write_text((ROOT / "lst_scale/embedded/wordnet/train.jsonl").read_text())  # or submit would refuse it
    for path in (missing, traceback):
        cluster.script("submit", "--recipe", str(path), *ON_ONE_CORE)
        data.unlink(missing_ok=True)  # before the job has imported what reads it
    cluster.wait_until_idle()
    text = cluster.script("status", "--output-dir", str(tmp_path / "runs"))
    assert re.search(r"missing-kind-seed0 +FAILED.*data\.jsonl is not there", text), text
    assert re.search(r"traceback-kind-seed0 +FAILED .*(tokenizer|Exception|Error)", text), text

    data.write_text((ROOT / "lst_scale/embedded/wordnet/train.jsonl").read_text())
    (broken / "tokenizer.json").write_text(tokenizer)
    assert cluster.script("resubmit", "--output-dir", str(tmp_path / "runs")).count(": job ") == 2
    cluster.wait_until_idle()
    assert set(states(cluster, tmp_path / "runs").values()) == {"DONE"}
    assert "nothing to resubmit" in cluster.script("resubmit", "--output-dir", str(tmp_path / "runs"))

    endless = recipe("endless", training__epochs=100000)
    cluster.script("submit", "--recipe", str(endless), *ON_ONE_CORE)
    cluster.wait(lambda: "RUNNING" in cluster.queue().values(), PATIENCE, "a running job")
    assert "cancelled 1 job" in cluster.script("cancel", "endless", "--output-dir", str(tmp_path / "runs"))
    cluster.wait_until_idle()
    assert states(cluster, tmp_path / "runs")["endless-kind-seed0"] == "CANCELLED"
    assert "nothing to resubmit" in cluster.script("resubmit", "--output-dir", str(tmp_path / "runs")), "what was cancelled was meant to be"


def test_a_sweep_of_six_with_three_killed_ends_with_six_results(cluster: Cluster, recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe("six", backbone__checkpoint="embedded:tiny-t5", training__epochs=12, training__save_every_steps=5)
    sweep = ("seed=0,1,2", "method.reduction_factor=4,8", "method.side_layers=[1,3]")
    jobs = re.findall(r"job (\S+)", cluster.script("sweep", "--recipe", str(path), *sweep, "--at-most", "3", *ON_ONE_CORE))
    assert len(jobs) == 6
    root = tmp_path / "runs"
    runs = {json.loads((run / "slurm/jobs.jsonl").read_text())["job"]: run for run in root.glob("six-*")}
    first, second, third = jobs[:3]
    for job in (first, second, third):
        cluster.wait(lambda j=job: last_step(runs[j]) >= 6, PATIENCE, f"step 6 of {job}")
        # A rank, as the kernel does when memory runs out; the job's srun; its batch script.
        wanted = {first: "-m submitit.core._submit", second: "srun --unbuffered", third: "slurm_script"}[job]
        found = [(number, command) for number, command in processes_of(cluster, job) if wanted in command]
        os.kill(min(number for number, command in found if job == second or "srun" not in command), signal.SIGKILL)
    cluster.wait(
        lambda: all(state == "PENDING" or job not in jobs[:3] for job, state in cluster.queue().items()), PATIENCE, "the three to end"
    )
    cluster.wait_until_idle()
    found = states(cluster, root)
    assert sum(state == "DONE" for state in found.values()) == 3, found
    assert cluster.script("resubmit", "--output-dir", str(root), "--time", "60").count(": job ") == 3
    cluster.wait_until_idle()
    assert list(states(cluster, root).values()) == ["DONE"] * 6
    table = cluster.script("collect", "--output-dir", str(root), "--format", "markdown").splitlines()
    assert len(table) == 2 + 2 and all("| 3 |" in line for line in table[2:]), table


def test_dry_run_prints_the_script_and_writes_nothing(cluster: Cluster, recipe: Callable[..., Path], tmp_path: Path) -> None:
    options = ("--partition", "main", "--account", "lab", "--sbatch=--exclusive", "--sbatch=--mail-type=END", "--setup", "module load x")
    text = cluster.script("submit", "--recipe", str(recipe("dry")), *ON_TWO_NODES, *options, "--dry-run")
    lines = ["--nodes=2", "--ntasks-per-node=2", "--time=60", "--partition=main", "--account=lab", "--exclusive", "--mail-type=END"]
    lines += ["--signal=USR2@120", "--requeue"]
    assert all(f"#SBATCH {line}\n" in text for line in lines), text
    assert "module load x\n" in text and "srun --unbuffered" in text and "--kill-on-bad-exit=1" in text
    assert not (tmp_path / "runs").exists() and not cluster.queue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "--recipe", "t5-bas"], "Did you mean 't5-base'?"),
        (["submit", "--recipe", "t5-base", "--node", "2"], "No such option: --node"),
        (["submit", "--recipe", "t5-base", "--time", "soon"], "time: 'soon' is no duration: write minutes (90), HH:MM:SS or D-HH:MM:SS"),
        (["submit", "--recipe", "t5-base", "--nodes", "0"], "nodes: 0 should be greater than or equal to 1"),
        (["submit", "--recipe", "t5-base", "--sbatch=-N2"], "'-N2' is no long sbatch option: write --name=value or --name"),
        (["submit", "--recipe", "t5-base", "--gpus-per-node", "0"], "gpus_per_node 0 needs tasks_per_node"),
        (["submit", "--recipe", "t5-base", "--cluster", "nowhere.yaml"], "--cluster nowhere.yaml: there is no such file"),
        (["submit", "--recipe", "t5-base", "--partition", "nowhere"], "sbatch refused: "),
        (["submit", "--recipe", "t5-base", "--nodes", "3", "--local", "--gpus-per-node", "1"], "--local has one machine"),
        (["sweep", "--recipe", "t5-base", "task=rte,mrpd"], "task: 'mrpd' is not valid. Did you mean 'mrpc'?"),
        (["sweep", "--recipe", "t5-base", "sed=1,2"], "sed: there is no such key. Did you mean 'seed'?"),
        (["sweep", "--recipe", "t5-base", "seed=0,1", "--together", "2"], "seeds differ, so batches would: write data.shuffle_seed=0"),
        (["sweep", "--recipe", "t5-base", "--list", "nowhere.txt"], "--list nowhere.txt: there is no such file"),
        (["status", "--output-dir", "/usr/lib"], "/usr/lib holds no runs: give the output_dir of the recipe"),
    ],
)
def test_wrong_options_are_named_with_what_to_write(
    cluster: Cluster, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *rest = arguments
    extra = [f"output_dir={tmp_path}"] if name != "status" else []
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    text = in_process("slurm", name, *rest, *extra)
    assert message in " ".join(text.replace("│", " ").split()), text
    assert "Traceback" not in text and not cluster.queue()
    assert not list(tmp_path.glob("*/recipe.yaml")) or "sbatch" in message


def in_process(*arguments: str) -> str:
    """Return what the command says, from this process: starting Python takes longer than finding a mistake."""
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    if isinstance(done.exception, LstScaleError):
        return f"error: {done.exception}"
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


@pytest.mark.parametrize("start", [["slurm/submit.py"], ["-m", "lst_scale.cli", "slurm", "submit"]], ids=["file", "command"])
def test_a_wrong_option_is_one_line_of_the_real_command_too(cluster: Cluster, start: list[str]) -> None:
    text = cluster(sys.executable, *start, "--recipe", "t5-bas", check=False)
    assert "Did you mean 't5-base'?" in text and text.count("\n") == 1


def test_local_runs_a_sweep_without_slurm(cluster: Cluster, recipe: Callable[..., Path], tmp_path: Path) -> None:
    options = ("--local", "--gpus-per-node", "0", "--tasks-per-node", "2", "--at-most", "1")
    cluster.script("sweep", "--recipe", str(recipe("here")), "seed=0,1", *options)
    for seed in (0, 1):
        assert json.loads((tmp_path / "runs" / f"here-kind-seed{seed}" / "result.json").read_text())["world_size"] == 2


def test_the_members_of_a_submitted_recipe_are_runs_like_any_other(cluster: Cluster, recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe("many", members=["method.reduction_factor=2", "method.reduction_factor=4"])
    arguments = ("--recipe", str(path), "--local", "--gpus-per-node", "0", "--tasks-per-node", "1")
    assert "# many-reduction_factor-2-kind-seed0, many-reduction_factor-4-kind-seed0" in cluster.script("submit", *arguments, "--dry-run")
    cluster.script("submit", *arguments)
    names = [f"many-reduction_factor-{r}-kind-seed0" for r in (2, 4)]
    assert states(cluster, tmp_path / "runs") == dict.fromkeys(names, "DONE")
    text = cluster.script("sweep", *arguments, "optimizer.learning_rate=1e-2,1e-3", "--together", "2", check=False)
    assert "--together 2: the recipe has members of its own" in text
    listed = cluster.script("sweep", *arguments, "optimizer.learning_rate=1e-2,1e-3", "--dry-run")
    job = "# many-learning_rate-{0}-reduction_factor-2-kind-seed0, many-learning_rate-{0}-reduction_factor-4-kind-seed0"
    assert all(job.format(rate) in listed for rate in ("1e-2", "1e-3")), listed  # each combination trains its members in one job


def test_a_finished_run_answers_a_file_as_a_job_on_two_nodes(cluster: Cluster, recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe("answers", training__max_steps=2)
    train(path)
    run, inputs, output = tmp_path / "runs" / "answers-kind-seed0", EMBEDDED / "wordnet" / "validation.jsonl", tmp_path / "answers.jsonl"
    asked = ("--predict", str(run), "--inputs", str(inputs), "--output", str(output), *ON_TWO_NODES)
    assert "PredictJob" not in cluster.script("submit", *asked, "--dry-run") and not output.exists()
    said = cluster.script("submit", *asked)
    log = Path(re.fullmatch(r".*: job \d+, which says how it goes in (.*)\n", said)[1])  # type: ignore[index]
    cluster.wait_until_idle()
    assert "480 predictions in" in log.read_text()
    alone = tmp_path / "alone.jsonl"
    done = ranks.run(programs.command, "predict", run, inputs, "--output", alone)
    assert done.returncode == 0, done.stderr
    assert output.read_text() == alone.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predict", "RUN"], "--predict RUN stands beside --inputs FILE"),
        (["--predict", "RUN", "--inputs", "x.csv", "--recipe", "t5-base"], "--predict RUN stands beside --inputs FILE"),
        (["--predict", "nowhere", "--inputs", "x.csv"], "nowhere"),
        ([], "what is to be submitted?"),
    ],
)
def test_a_prediction_that_can_not_be_submitted_is_one_line(arguments: list[str], message: str) -> None:
    assert message in in_process("slurm", "submit", *arguments, *ON_ONE_CORE)

"""Interrupted jobs on a real Slurm end with the weights of an uninterrupted run: limits, signals, requeues, dead nodes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import programs, ranks
from helpers.models import make_t5
from helpers.recipes import recipe_writer
from helpers.runs import assert_same_weights, final_weights, last_step, losses
from helpers.slurm import ON_TWO_NODES, PATIENCE, Cluster, kill_second_node, processes_of, reference, restarts, starts, states

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("an_empty_queue")]
ON_TWO_NODES_WITH_ONE_RANK_EACH = ("--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "1", "--time", "60")
LONG = {"training__epochs": 100, "training__evaluate_every": 200}  # 400 steps, whose weights no evaluation changes


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5(tmp_path_factory.mktemp("slurm-t5"), dropout_rate=0.1)


@pytest.fixture
def recipe(tmp_path: Path, t5: Path) -> Callable[..., Path]:
    return recipe_writer(tmp_path, t5)


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory: pytest.TempPathFactory, t5: Path) -> Path:
    """The folder of LONG on four ranks, without Slurm and without interruption."""
    folder = tmp_path_factory.mktemp("one-go")
    done = ranks.run(programs.train, "--recipe", recipe_writer(folder, t5)("one-go", **LONG), processes=4)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs" / "one-go-kind-seed0"


def test_a_recipe_on_two_nodes_with_two_ranks_each(cluster: Cluster, recipe: Callable[..., Path], in_one_go: Path, tmp_path: Path) -> None:
    path = recipe("two", **LONG)
    assert "two-kind-seed0: job " in cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES)
    assert "in the queue as" in cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES)
    cluster.wait_until_idle()
    run = tmp_path / "runs" / "two-kind-seed0"
    result = json.loads((run / "result.json").read_text())
    assert result["world_size"] == 4 and states(cluster, tmp_path / "runs") == {"two-kind-seed0": "DONE"}
    assert_same_weights(run, final_weights(in_one_go))
    log = cluster.script("status", "two", "--logs", "--output-dir", str(tmp_path / "runs")).split("\t")[1].strip()
    assert "step 400" in Path(log).read_text()
    assert "finished\nnothing to submit" in cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES)


def test_the_time_limit_requeues_and_the_weights_are_those_of_one_go(
    cluster: Cluster, recipe: Callable[..., Path], in_one_go: Path, tmp_path: Path
) -> None:
    """Slurm looks at limits twice a minute. It warns so early that it does so at its next look, till when the ranks stand still."""
    path = recipe("limit", **LONG)
    job = cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES, "--signal-delay", "600").split()[-1]
    run = tmp_path / "runs" / "limit-kind-seed0"
    cluster.wait(lambda: last_step(run) > 20, PATIENCE, "step 20")
    stopped = [number for number, command in processes_of(cluster, job) if "-m submitit.core._submit" in command and "srun" not in command]
    for number in stopped:
        os.kill(number, signal.SIGSTOP)
    cluster("scontrol", "update", f"jobid={job}", "timelimit=10")
    cluster.wait(lambda: all(is_warned(number) for number in stopped), PATIENCE, "the warning")
    for number in stopped:
        with contextlib.suppress(ProcessLookupError):  # some versions of Slurm wake whom they warn
            os.kill(number, signal.SIGCONT)
    cluster.wait(lambda: len(starts(run)) > 1, PATIENCE, "a second start")
    assert 20 < starts(run)[1] < 400
    cluster("scontrol", "update", f"jobid={job}", "timelimit=60")
    cluster.wait_until_idle()
    assert_same_weights(run, final_weights(in_one_go))


def is_warned(process: int) -> bool:
    """Whether USR2 waits for a process that is stopped, or the process has already left."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return True
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(mask >> (signal.SIGUSR2 - 1) & 1 for mask in masks)


def test_a_requeue_in_the_middle_of_evaluation(cluster: Cluster, recipe: Callable[..., Path], in_one_go: Path, tmp_path: Path) -> None:
    path = recipe(
        "requeued", **LONG, data__max_eval_rows=240, evaluation__batch_size=2, evaluation__max_new_tokens=16, evaluation__num_beams=4
    )
    job = cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES).split()[-1]
    run = tmp_path / "runs" / "requeued-kind-seed0"
    cluster.wait(lambda: last_step(run) == 200, PATIENCE, "step 200, after which comes an evaluation")
    assert '"validation"' not in (run / "metrics.jsonl").read_text(), "too late: the evaluation is over"
    cluster("scontrol", "requeue", job)
    cluster.wait(lambda: len(starts(run)) > 1, PATIENCE, "a second start")
    cluster.wait_until_idle()
    assert starts(run) == [0, 200], "the step before the evaluation was saved"
    assert_same_weights(run, final_weights(in_one_go))
    assert losses(run) == losses(in_one_go), "no step is there twice"


def test_a_dead_node_requeues(cluster: Cluster, recipe: Callable[..., Path], in_one_go: Path, tmp_path: Path) -> None:
    path = recipe("node", **LONG, training__save_every_steps=20)
    cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES)
    run = tmp_path / "runs" / "node-kind-seed0"
    cluster.wait(lambda: last_step(run) > 40, PATIENCE, "step 40")
    kill_second_node(cluster)
    cluster.wait(lambda: len(starts(run)) > 1, PATIENCE, "a second start")
    cluster.wait_until_idle()
    assert starts(run)[1] >= 40
    assert_same_weights(run, final_weights(in_one_go))


def test_a_signal_of_every_kind_ends_bit_identical(cluster: Cluster, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Each kind once while it trains, and some while it starts; fifty more, at random, meet ranks without Slurm in test_interrupted.py."""
    path = recipe("signals", training__epochs=40, training__evaluate_every=200, training__save_every_steps=50)
    patient = tmp_path / "cluster.yaml"  # signals may come faster than ranks start
    patient.write_text("max_starts_without_progress: 30\n")
    job = cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES_WITH_ONE_RANK_EACH, "--cluster", str(patient)).split()[-1]
    run = tmp_path / "runs" / "signals-kind-seed0"
    kinds = [("USR1", 1), ("requeue", 1), ("USR2", 2), ("node", 1), ("TERM", 1), ("USR2", 0), ("requeue", 0), ("USR1", 1)]
    random.Random(0).shuffle(kinds)
    noted = 0
    for kind, times in kinds:
        cluster.wait_until_running(job)
        if times:  # while it trains; 0: while it starts and loads, when Python may not have come far enough to heed it
            cluster.wait(lambda n=noted: len(starts(run)) > n and last_step(run) > starts(run)[-1], PATIENCE, "a step of a new start")
        noted, restarted = len(starts(run)), restarts(cluster, job)
        assert not (run / "result.json").exists(), "the run ended before the last signal: make it longer"
        if kind == "requeue":
            cluster("scontrol", "requeue", job, check=False)
        elif kind == "node":
            kill_second_node(cluster)
        elif kind == "TERM":  # as before a requeue: Slurm then kills, here an administrator requeues
            cluster("scancel", "--signal=TERM", job, check=False)
            cluster("scontrol", "requeue", job, check=False)
        else:
            for _ in range(max(times, 1)):  # twice: once more, during the save
                cluster("scancel", f"--signal={kind}", job, check=False)
        if times:
            cluster.wait(lambda n=restarted: restarts(cluster, job) > n, PATIENCE, f"a new start after {kind}")
    cluster.wait_until_idle()
    assert (run / "result.json").exists(), cluster.script("status", "--output-dir", str(tmp_path / "runs"))
    assert len(starts(run)) > 5 and len(set(starts(run))) > 3
    assert_same_weights(run, reference(path, tmp_path, processes=2))


def test_a_job_that_gets_nowhere_stops_and_says_so(cluster: Cluster, recipe: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "circle-kind-seed0"
    path = recipe("circle")
    options = tmp_path / "cluster.yaml"
    options.write_text("gpus_per_node: 0\ntasks_per_node: 1\ncpus_per_task: 1\nmax_starts_without_progress: 1\n")
    job = cluster.script("submit", "--recipe", str(path), "--cluster", str(options)).split()[-1]
    cluster.wait(lambda: (run / "slurm/starts.jsonl").exists(), PATIENCE, "a start")
    cluster("scontrol", "requeue", job)
    cluster.wait_until_idle()
    text = cluster.script("status", "--output-dir", str(tmp_path / "runs"))
    assert "started 2 times without getting past step 0" in text, text


def test_the_plain_sbatch_script_runs_and_requeues(cluster: Cluster, recipe: Callable[..., Path], in_one_go: Path, tmp_path: Path) -> None:
    path = recipe("plain", **LONG)
    options = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=1000M", f"--output={tmp_path}/%j.log")
    command = ("sbatch", "--parsable", *options, "slurm/train.sbatch", "--recipe", str(path))
    job = cluster("env", f"PYTHON={sys.executable}", "DS_ACCELERATOR=cpu", *command).strip()
    run = tmp_path / "runs" / "plain-kind-seed0"
    cluster.wait(lambda: last_step(run) > 20, PATIENCE, "step 20")
    cluster("scancel", "--signal=USR2", job)
    cluster.wait(lambda: cluster.queue().get(job) == "PENDING", PATIENCE, "the requeue")
    cluster.wait_until_idle()
    assert_same_weights(run, final_weights(in_one_go))

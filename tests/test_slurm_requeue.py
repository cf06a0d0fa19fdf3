"""Interrupted jobs on a real Slurm end with the weights of an uninterrupted run: limits, requeues, a dead node."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import programs, ranks
from helpers.models import make_t5
from helpers.recipes import recipe_writer
from helpers.runs import assert_same_weights, final_weights, last_step, losses
from helpers.slurm import ON_TWO_NODES, ON_TWO_NODES_WITH_ONE_RANK_EACH, PATIENCE, Cluster, kill_second_node, processes_of, starts, states

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("an_empty_queue")]
# 200 steps, whose weights no evaluation changes; that blocks which run again make the same numbers is for other tests to show.
LONG = {"training__epochs": 50, "training__evaluate_every": 100, "method__recompute": False}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5(tmp_path_factory.mktemp("slurm-t5"), dropout_rate=0.1)


@pytest.fixture
def recipe(tmp_path: Path, t5: Path) -> Callable[..., Path]:
    return recipe_writer(tmp_path, t5)


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory: pytest.TempPathFactory, t5: Path) -> Path:
    """The folder of LONG on two ranks, without Slurm and without interruption."""
    return without_slurm(tmp_path_factory.mktemp("one-go"), t5, processes=2)


def without_slurm(folder: Path, t5: Path, *, processes: int) -> Path:
    """Carry out LONG and return its folder."""
    folder.mkdir(exist_ok=True)
    done = ranks.run(programs.train, "--recipe", recipe_writer(folder, t5)("one-go", **LONG), processes=processes)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs" / "one-go-kind-seed0"


def test_a_recipe_on_two_nodes_with_two_ranks_each(cluster: Cluster, recipe: Callable[..., Path], t5: Path, tmp_path: Path) -> None:
    path = recipe("two", **LONG)
    assert "two-kind-seed0: job " in cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES)
    assert "in the queue as" in cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES)
    cluster.wait_until_idle()
    run = tmp_path / "runs" / "two-kind-seed0"
    result = json.loads((run / "result.json").read_text())
    assert result["world_size"] == 4 and states(cluster, tmp_path / "runs") == {"two-kind-seed0": "DONE"}
    assert_same_weights(run, final_weights(without_slurm(tmp_path / "one-go", t5, processes=4)))
    log = cluster.script("status", "two", "--logs", "--output-dir", str(tmp_path / "runs")).split("\t")[1].strip()
    assert "step 200" in Path(log).read_text()
    assert "finished\nnothing to submit" in cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES)


def test_the_time_limit_requeues_and_the_weights_are_those_of_one_go(
    cluster: Cluster, recipe: Callable[..., Path], in_one_go: Path, tmp_path: Path
) -> None:
    """Slurm looks at limits twice a minute. It warns so early that it does so at its next look, till when the ranks stand still."""
    path = recipe("limit", **LONG)
    job = cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES_WITH_ONE_RANK_EACH, "--signal-delay", "600").split()[-1]
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
    assert 20 < starts(run)[1] < 200
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
    job = cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES_WITH_ONE_RANK_EACH).split()[-1]
    run = tmp_path / "runs" / "requeued-kind-seed0"
    cluster.wait(lambda: last_step(run) == 100, PATIENCE, "step 100, after which comes an evaluation")
    assert '"validation"' not in (run / "metrics.jsonl").read_text(), "too late: the evaluation is over"
    cluster("scontrol", "requeue", job)
    cluster.wait(lambda: len(starts(run)) > 1, PATIENCE, "a second start")
    cluster.wait_until_idle()
    assert starts(run) == [0, 100], "the step before the evaluation was saved"
    assert_same_weights(run, final_weights(in_one_go))
    assert losses(run) == losses(in_one_go), "no step is there twice"


def test_a_dead_node_requeues(cluster: Cluster, recipe: Callable[..., Path], in_one_go: Path, tmp_path: Path) -> None:
    path = recipe("node", **LONG, training__save_every_steps=20)
    cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES_WITH_ONE_RANK_EACH)
    run = tmp_path / "runs" / "node-kind-seed0"
    cluster.wait(lambda: last_step(run) > 40, PATIENCE, "step 40")
    kill_second_node(cluster)
    cluster.wait(lambda: len(starts(run)) > 1, PATIENCE, "a second start")
    cluster.wait_until_idle()
    assert starts(run)[1] >= 40
    assert_same_weights(run, final_weights(in_one_go))


def test_the_plain_sbatch_script_runs_and_requeues(cluster: Cluster, recipe: Callable[..., Path], in_one_go: Path, tmp_path: Path) -> None:
    path = recipe("plain", **LONG)
    options = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=1000M", f"--output={tmp_path}/%j.log")
    command = ("sbatch", "--parsable", *options, "slurm/train.sbatch", "--recipe", str(path))
    job = cluster("env", f"PYTHON={sys.executable}", "DS_ACCELERATOR=cpu", *command).strip()
    run = tmp_path / "runs" / "plain-kind-seed0"
    cluster.wait(lambda: last_step(run) > 20, PATIENCE, "step 20")
    cluster("scancel", "--signal=USR2", job)
    cluster.wait(lambda: cluster.queue().get(job) == "PENDING", PATIENCE, "the requeue")
    cluster.wait_until_idle()
    assert_same_weights(run, final_weights(in_one_go))

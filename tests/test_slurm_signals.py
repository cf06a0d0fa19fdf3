"""Signals of every kind on a real Slurm, while a job trains and while it starts; and a job that gets nowhere."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.models import make_t5
from helpers.recipes import recipe_writer
from helpers.runs import assert_same_weights, last_step
from helpers.slurm import ON_TWO_NODES_WITH_ONE_RANK_EACH, PATIENCE, Cluster, kill_second_node, reference, restarts, starts

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("an_empty_queue")]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    return recipe_writer(tmp_path, make_t5(tmp_path / "t5", dropout_rate=0.1))


def test_a_signal_of_every_kind_ends_bit_identical(cluster: Cluster, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Each kind once while it trains, and some while it starts; 36 more, at random, meet ranks without Slurm in test_interrupted.py."""
    path = recipe("signals", training__epochs=40, training__evaluate_every=200, training__save_every_steps=50)
    patient = tmp_path / "cluster.yaml"  # signals may come faster than ranks start
    patient.write_text("max_starts_without_progress: 30\n")
    job = cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES_WITH_ONE_RANK_EACH, "--cluster", str(patient)).split()[-1]
    run = tmp_path / "runs" / "signals-kind-seed0"
    kinds = [("USR1", 1), ("requeue", 1), ("USR2", 2), ("node", 1), ("TERM", 1), ("USR2", 0), ("requeue", 0)]
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
    """Its first step takes longer than Slurm waits before it kills, on the fastest machine."""
    run = tmp_path / "runs" / "circle-kind-seed0"
    path = recipe("circle", data__max_train_rows=2400, training__global_batch_size=2400)
    options = tmp_path / "cluster.yaml"
    options.write_text("gpus_per_node: 0\ntasks_per_node: 1\ncpus_per_task: 1\nmax_starts_without_progress: 1\n")
    job = cluster.script("submit", "--recipe", str(path), "--cluster", str(options)).split()[-1]
    cluster.wait(lambda: (run / "slurm/starts.jsonl").exists(), PATIENCE, "a start")
    cluster("scontrol", "requeue", job)
    cluster.wait_until_idle()
    text = cluster.script("status", "--output-dir", str(tmp_path / "runs"))
    assert "started 2 times without getting past step 0" in text, text

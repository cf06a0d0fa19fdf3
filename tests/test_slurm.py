"""On a real Slurm: slurmctld, two slurmd, slurmdbd and MariaDB from Debian, in a private directory, on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from helpers import programs, ranks
from helpers.models import make_t5
from helpers.paths import ROOT
from helpers.recipes import recipe_writer
from helpers.runs import final_weights, last_step, losses
from lst_scale.cli.main import app
from lst_scale.errors import LstScaleError

pytestmark = pytest.mark.slow
PATIENCE = 600  # seconds after which something hangs, on a machine however busy
ON_TWO_NODES = ("--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "2", "--cpus-per-task", "1", "--time", "60")
ON_TWO_NODES_WITH_ONE_RANK_EACH = ("--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "1", "--time", "60")
ON_ONE_CORE = ("--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "1", "--time", "60", "--memory", "1000M")
LONG = {"training__epochs": 100, "training__evaluate_every": 200}  # 400 steps, whose weights no evaluation changes
MINI_SLURM = ROOT / "tests" / "mini_slurm.sh"


class Cluster:
    """A running Slurm and the commands that tests give it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "etc" / "slurm.conf"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
        for name in ("OMP_NUM_THREADS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
            self.environment.pop(name, None)
        self.environment["MASTER_PORT"] = "22"  # left over in somebody's shell: jobs must not heed it

    def __call__(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 or not check, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def script(self, name: str, *arguments: str, check: bool = True) -> str:
        return self(sys.executable, f"slurm/{name}.py", *arguments, check=check)

    def queue(self) -> dict[str, str]:
        """Return the state of every job in squeue."""
        lines = self("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def wait(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.3)
        raise AssertionError(f"waited {seconds} s for {what}\n{self('squeue')}\n{self('sinfo', '-N')}")

    def wait_until_running(self, job: str) -> None:
        def running() -> bool:
            queue = self.queue()
            assert job in queue, f"job {job} has left the queue"
            return queue[job] == "RUNNING"

        self.wait(running, PATIENCE, f"job {job} to run")

    def wait_until_idle(self, seconds: float = PATIENCE) -> None:
        self.wait(lambda: not self.queue(), seconds, "an empty queue")


def install_and_start(folder: Path, command: str) -> None:
    environment = os.environ | {"MINI_SLURM_DIR": str(folder)}
    done = subprocess.run(["bash", str(MINI_SLURM), command], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"Slurm's Debian packages: bash tests/mini_slurm.sh install\n{done.stderr[-2000:]}"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = Path(f"/tmp/lst-slurm-{os.getpid()}")  # short: unix sockets have 108 bytes for their path
    install_and_start(folder, "start")
    try:
        yield Cluster(folder)
    finally:
        install_and_start(folder, "clean")


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


@pytest.fixture(autouse=True)
def leave_nothing_running(cluster: Cluster) -> Iterator[None]:
    yield
    cluster("scancel", "--me")
    cluster.wait_until_idle()


def states(cluster: Cluster, runs: Path) -> dict[str, str]:
    """Return what status.py says of every run."""
    lines = cluster.script("status", "--output-dir", str(runs)).splitlines()[1:]
    return {line.split()[0]: line.split()[1] for line in lines if line.strip()}


def reference(recipe: Path, folder: Path, *overrides: str, processes: int = 1) -> dict[str, torch.Tensor]:
    """Run the recipe without Slurm and without interruption, in another folder, and return its final weights."""
    changed = ["--recipe", str(recipe), f"output_dir={folder / 'reference'}", *overrides]
    done = ranks.run(programs.train, *changed, processes=processes)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = (path for path in (folder / "reference").iterdir() if path.is_dir())
    return final_weights(run)


def assert_identical(run: Path, expected: dict[str, torch.Tensor]) -> None:
    found = final_weights(run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_recipe_on_two_nodes_with_two_ranks_each(cluster: Cluster, recipe: Callable[..., Path], in_one_go: Path, tmp_path: Path) -> None:
    path = recipe("two", **LONG)
    assert "two-kind-seed0: job " in cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES)
    assert "in the queue as" in cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES)
    cluster.wait_until_idle()
    run = tmp_path / "runs" / "two-kind-seed0"
    result = json.loads((run / "result.json").read_text())
    assert result["world_size"] == 4 and states(cluster, tmp_path / "runs") == {"two-kind-seed0": "DONE"}
    assert_identical(run, final_weights(in_one_go))
    log = cluster.script("status", "two", "--logs", "--output-dir", str(tmp_path / "runs")).split("\t")[1].strip()
    assert "step 400" in Path(log).read_text()
    assert "finished\nnothing to submit" in cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES)


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
    sweep = ("seed=0,1", "optimizer.learning_rate=1e-2,1000", "method.reduction_factor=2,4", "--together", "4")
    said = cluster.script("sweep", "--recipe", str(path), *sweep, "--at-most", "1", *ON_ONE_CORE)
    jobs = re.findall(r": job (\S+)", said)
    assert len(jobs) == 8 and len(set(jobs)) == 2
    root = tmp_path / "runs"
    runs = {
        (seed, rate): root / f"shared-learning_rate-{rate}-reduction_factor-4-kind-seed{seed}"
        for seed in (0, 1)
        for rate in ("1e-2", "1000")
    }
    assert "too: name them as well" in cluster.script("cancel", "seed0", "learning_rate-1e-2", "--output-dir", str(root), check=False)
    cluster.wait(lambda: last_step(runs[0, "1e-2"]) > 20, PATIENCE, "step 20")
    assert "in the queue as" in cluster.script("sweep", "--recipe", str(path), *sweep, *ON_ONE_CORE)
    cluster("scontrol", "requeue", jobs[0])
    cluster.wait_until_idle()
    assert starts(runs[0, "1e-2"])[1] >= 10
    text = cluster.script("status", "--output-dir", str(root))
    assert len(re.findall(r"learning_rate-1e-2-\S+ +DONE", text)) == 4, text
    assert len(re.findall(r"learning_rate-1000-\S+ +FAILED .*the gradient of step \d+ is not finite", text)) == 4, text
    alone = ["method.reduction_factor=4", "optimizer.learning_rate=1e-2", "seed=1"]
    assert_identical(runs[1, "1e-2"], reference(path, tmp_path, *alone))
    again = re.findall(r": job (\S+)", cluster.script("resubmit", "--output-dir", str(root)))
    assert len(again) == 4 and len(set(again)) == 2


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
    assert_identical(run, final_weights(in_one_go))


def is_warned(process: int) -> bool:
    """Whether USR2 waits for a process that is stopped, or the process has already left."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return True
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(mask >> (signal.SIGUSR2 - 1) & 1 for mask in masks)


def starts(run: Path) -> list[int]:
    """Return the step of every start so far."""
    path = run / "slurm" / "starts.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


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
    assert_identical(run, final_weights(in_one_go))
    assert losses(run) == losses(in_one_go), "no step is there twice"


def test_a_dead_node_requeues(cluster: Cluster, recipe: Callable[..., Path], in_one_go: Path, tmp_path: Path) -> None:
    path = recipe("node", **LONG, training__save_every_steps=20)
    cluster.script("submit", "--recipe", str(path), *ON_TWO_NODES)
    run = tmp_path / "runs" / "node-kind-seed0"
    cluster.wait(lambda: last_step(run) > 40, PATIENCE, "step 40")
    kill_node(cluster, "127.0.0.3")
    cluster.wait(lambda: len(starts(run)) > 1, PATIENCE, "a second start")
    cluster.wait_until_idle()
    assert starts(run)[1] >= 40
    assert_identical(run, final_weights(in_one_go))


def kill_node(cluster: Cluster, node: str) -> None:
    """Kill a slurmd and its steps, tell slurmctld at once instead of after SlurmdTimeout, and bring the node back."""
    daemon = int((cluster.folder / "run" / f"slurmd.{node}.pid").read_text())
    for line in subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout.splitlines():
        number, _, command = line.strip().partition(" ")
        if int(number) == daemon:
            os.kill(int(number), signal.SIGKILL)
        elif command.startswith("slurmstepd:"):
            environment = Path(f"/proc/{number}/environ")
            if environment.exists() and node in environment.read_text(errors="replace"):
                os.kill(int(number), signal.SIGKILL)
    cluster("scontrol", "update", f"nodename={node}", "state=down", "reason=killed")
    cluster.wait(lambda: "down" in cluster("sinfo", "--noheader", f"--nodes={node}", "--format=%t"), PATIENCE, "the node to be down")
    cluster(f"/usr/sbin/{'slurmd'}", "-N", node)
    cluster("scontrol", "update", f"nodename={node}", "state=resume", check=False)


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


def processes_of(cluster: Cluster, job: str) -> list[tuple[int, str]]:
    """Return (pid, command line) of a job's processes."""
    array, _, element = job.partition("_")
    wanted = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={element}"} if element else {f"SLURM_JOB_ID={job}"}
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = set((entry / "environ").read_text(errors="replace").split("\0"))
                if wanted <= environment:
                    found.append((int(entry.name), (entry / "cmdline").read_text().replace("\0", " ")))
            except OSError:
                continue
    return found


def restarts(cluster: Cluster, job: str) -> int:
    """Return how often Slurm has started the job again."""
    (found,) = re.findall(r"Restarts=(\d+)", cluster("scontrol", "show", "job", job))
    return int(found)


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
            kill_node(cluster, "127.0.0.3")
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
    assert_identical(run, reference(path, tmp_path, processes=2))


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
        (["status", "--output-dir", "/tmp"], "/tmp holds no runs: give the output_dir of the recipe"),
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
    assert_identical(run, final_weights(in_one_go))

"""A real Slurm: slurmctld, two slurmd, slurmdbd and MariaDB from Debian, in a private directory, on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from helpers import programs, ranks
from helpers.paths import ROOT
from helpers.runs import final_weights

PATIENCE = 600  # seconds after which something hangs, on a machine however busy
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# What makes clusters of two workers of pytest-xdist strangers to each other: names of nodes, ports, numbers of jobs.
FIRST_NODE, PORT, FIRST_JOB = 2 + 10 * WORKER, 21000 + 1000 * WORKER, 1 + 1000 * WORKER
ON_TWO_NODES = ("--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "2", "--cpus-per-task", "1", "--time", "60")
ON_TWO_NODES_WITH_ONE_RANK_EACH = ("--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "1", "--time", "60")
ON_ONE_CORE = ("--gpus-per-node", "0", "--tasks-per-node", "1", "--cpus-per-task", "1", "--time", "60", "--memory", "1000M")
MINI_SLURM = ROOT / "tests" / "mini_slurm.sh"


class Cluster:
    """A running Slurm and the commands that tests give it."""

    second_node = f"127.0.0.{FIRST_NODE + 1}"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "etc" / "slurm.conf"), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
        for name in ("OMP_NUM_THREADS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
            self.environment.pop(name, None)
        self.environment["MASTER_PORT"] = "22"  # left over in somebody's shell: jobs must not heed it

    def __call__(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
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


def running() -> Iterator[Cluster]:
    """Yield a cluster of this worker's own, and take it down afterwards."""
    folder = Path(f"/tmp/lst-slurm-{os.getpid()}")  # short: unix sockets have 108 bytes for their path
    mini_slurm(folder, "start")
    try:
        yield Cluster(folder)
    finally:
        mini_slurm(folder, "clean")


def mini_slurm(folder: Path, command: str) -> None:
    own = {"MINI_SLURM_NODE_FIRST": FIRST_NODE, "MINI_SLURM_PORT": PORT, "MINI_SLURM_FIRST_JOB": FIRST_JOB}
    environment = os.environ | {"MINI_SLURM_DIR": str(folder)} | {name: str(value) for name, value in own.items()}
    done = subprocess.run(["bash", str(MINI_SLURM), command], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"Slurm's Debian packages: bash tests/mini_slurm.sh install\n{done.stderr[-2000:]}"


def states(cluster: Cluster, runs: Path) -> dict[str, str]:
    """Return what status.py says of every run."""
    lines = cluster.script("status", "--output-dir", str(runs)).splitlines()[1:]
    return {line.split()[0]: line.split()[1] for line in lines if line.strip()}


def reference(recipe: Path, folder: Path, *overrides: str, processes: int = 1) -> dict[str, Tensor]:
    """Run the recipe without Slurm and without interruption, in another folder, and return its final weights."""
    changed = ["--recipe", str(recipe), f"output_dir={folder / 'reference'}", *overrides]
    done = ranks.run(programs.train, *changed, processes=processes)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = (path for path in (folder / "reference").iterdir() if path.is_dir())
    return final_weights(run)


def starts(run: Path) -> list[int]:
    """Return the step of every start so far."""
    path = run / "slurm" / "starts.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def kill_second_node(cluster: Cluster) -> None:
    """Kill a slurmd and its steps, tell slurmctld at once instead of after SlurmdTimeout, and bring the node back."""
    node = cluster.second_node
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

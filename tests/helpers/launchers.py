"""Processes as users start them: `deepspeed`, `torchrun`, plain `python`. Each imports everything anew, so few tests need them."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

from helpers.paths import ROOT

DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# A hundred ports for each worker of pytest-xdist, below those that the system gives out; runs of pytest side by side begin elsewhere.
_FIRST = 29600 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.cycle(_FIRST + (os.getpid() + number) % 100 for number in range(100))


def free_port() -> int:
    """Return a port of this worker that nobody listens on."""
    for port in itertools.islice(_PORTS, 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no free port from {_FIRST} to {_FIRST + 99}")


def fresh() -> dict[str, str]:
    """Return the environment of a shell in which nothing distributed has run; tests in this process may have left theirs."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return {name: value for name, value in environment.items() if name not in DISTRIBUTED}


def launch(
    arguments: list[str], *, processes: int = 1, timeout: float = 600, launcher: str = "deepspeed"
) -> subprocess.CompletedProcess[str]:
    """Run a script of ours under a launcher, or plainly for `launcher="python"`, and return what it printed."""
    port = str(free_port())
    prefix = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port],
        "deepspeed": [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(processes), "--master_port", port],
    }[launcher]
    return subprocess.run([*prefix, *arguments], cwd=ROOT, env=fresh(), capture_output=True, text=True, timeout=timeout, check=False)

"""What a job asks of a cluster: options on the command line, over a site's defaults in a cluster file. Imports no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from lst_scale.errors import ArgumentError, fence
from lst_scale.recipe import decode
from lst_scale.recipe.decode import Count, Section
from lst_scale.system.names import Line

DEFAULT_FILE = "~/.config/lst_scale/slurm.yaml"
CODE = ("setup", "python", "sbatch")  # what runs, or changes what runs: never taken from a run's folder, which others may write to


class ClusterOptions(Section):
    """One job's needs. The names are sbatch's own."""

    nodes: Count = 1
    gpus_per_node: Annotated[int, Field(ge=0)] = 1
    tasks_per_node: Count | None = None  # None: one a GPU
    cpus_per_task: Count = 4
    memory: Line | None = None  # of a node, such as 64G
    time: Line = "1-00:00:00"  # minutes, HH:MM:SS or D-HH:MM:SS
    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    constraint: Line | None = None
    sbatch: tuple[Line, ...] = ()  # further options, such as --exclusive or --mail-type=END
    setup: tuple[Line, ...] = ()  # shell commands before the job: modules, conda, a virtual environment
    python: Line | None = None  # how to start Python in the job, such as: apptainer exec --nv image.sif python
    signal_delay: Count = 120  # seconds between the warning and the time limit: more than a step and a checkpoint take
    max_starts_without_progress: Count = 4

    @field_validator("sbatch")
    @classmethod
    def _long_options(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        for line in lines:
            if not re.fullmatch(r"--[a-z][a-z-]*(=.+)?", line):
                raise ValueError(f"{line!r} is no long sbatch option: write --name=value or --name")
        return lines

    @field_validator("time")
    @classmethod
    def _a_duration(cls, text: str) -> str:
        minutes_of(text)
        return text

    @model_validator(mode="after")
    def _some_task(self) -> ClusterOptions:
        if self.gpus_per_node == 0 and self.tasks_per_node is None:
            raise ValueError("gpus_per_node 0 needs tasks_per_node: say how many processes a node shall run")
        return self

    @property
    def tasks(self) -> int:
        """Processes on each node."""
        return self.tasks_per_node or self.gpus_per_node

    @property
    def minutes(self) -> int:
        return minutes_of(self.time)

    @property
    def further(self) -> dict[str, Any]:
        """`sbatch` as names and values."""
        pairs = (line.removeprefix("--").partition("=") for line in self.sbatch)
        return {name: value if equals else True for name, equals, value in pairs}


def minutes_of(text: str) -> int:
    """Return a Slurm duration in whole minutes, rounded up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"{text!r} is no duration: write minutes (90), HH:MM:SS or D-HH:MM:SS")
    days, first, second, third = (int(part) if part else 0 for part in match.groups())
    if match[1] is not None:  # D-HH[:MM[:SS]]
        seconds = ((days * 24 + first) * 60 + second) * 60 + third
    elif match[4] is not None:  # HH:MM:SS
        seconds = (first * 60 + second) * 60 + third
    else:  # MM[:SS]
        seconds = first * 60 + second
    return max(1, -(-seconds // 60))


def load_options(given: dict[str, Any], file: Path | None) -> ClusterOptions:
    """Return `given` (None where the command line is silent) over the cluster file's values.

    Raises:
        LstScaleError: the file is missing or wrong, or an option is; all mistakes at once.
    """
    tree: dict[str, Any] = {}
    path = file or Path(os.path.expanduser(DEFAULT_FILE))
    if path.is_file():
        with fence(ArgumentError, f"--cluster {path}"):
            tree, _ = decode.read_yaml(path.read_text(encoding="utf-8"), str(path))
    elif file is not None:
        raise ArgumentError(f"--cluster {file}: there is no such file")
    return decode.build(ClusterOptions, tree | {key: value for key, value in given.items() if value is not None}, [])

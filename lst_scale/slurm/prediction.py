"""`lst-scale predict` as a Slurm job: one task a GPU, all of one file, going on after a requeue where it was."""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lst_scale.slurm import snapshot
from lst_scale.slurm.job import export_ranks
from lst_scale.slurm.options import ClusterOptions
from lst_scale.slurm.submission import make_executor, outside_any_job, sbatch_errors


class PredictJob:
    """Answer a file with a finished run. Like `TrainJob` it holds paths alone: where to go on is looked up beside the output, each time."""

    def __init__(self, run: str, inputs: str, output: str, overrides: Sequence[str], *, cpu: bool, threads: int) -> None:
        self.run, self.inputs, self.output, self.overrides = run, inputs, output, list(overrides)
        self.cpu, self.threads = cpu, threads

    def __call__(self) -> None:
        export_ranks(cpu=self.cpu, threads=self.threads)
        from lst_scale.inference.predict import predict_file
        from lst_scale.system import distributed

        main = distributed.connect().is_main
        say = print if main else (lambda sentence: None)
        count = predict_file([Path(self.run)], Path(self.inputs), Path(self.output), self.overrides, resume=True, say=say)
        say(f"{count} predictions in {self.output}")
        distributed.disconnect()

    def checkpoint(self) -> Any:
        """Called by submitit on rank 0 when the job is to leave: what is answered is on the disk, and the same job is queued again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(job: PredictJob, options: ClusterOptions, *, use_snapshot: bool) -> tuple[str, Path]:
    """Queue one prediction and return its job's id and log."""
    root = Path(job.output).resolve().parent
    setup = list(options.setup)
    if use_snapshot:
        setup.append(f"export PYTHONPATH={shlex.quote(str(snapshot.take(root / '.snapshots')))}:$PYTHONPATH")
    executor = make_executor(root, options, setup, at_most=1, name=f"predict-{Path(job.run).name}")
    with sbatch_errors(), outside_any_job():
        submitted = executor.submit(job)
    return str(submitted.job_id), Path(submitted.paths.stdout)


def script(job: PredictJob, options: ClusterOptions) -> str:
    """Return the sbatch script that `submit` would hand in, but for the copy of the code, without writing anything."""
    executor = make_executor(
        Path(job.output).resolve().parent, options, list(options.setup), at_most=1, name=f"predict-{Path(job.run).name}"
    )
    text: str = executor._make_submission_file_text(executor._submitit_command_str, uuid.uuid4().hex)
    return text

"""The trackers of `logging.report_to`, a class each. Names of numbers: train/loss, validation/score, gates/...

Where a tool sends its numbers is its own affair, by its own environment variables: WANDB_MODE=offline, WANDB_ENTITY, MLFLOW_TRACKING_URI,
TRACKIO_DIR. The project is `logging.project`, else what the tool's variable says, else "lst_scale".
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from lst_scale.runs.callback import About
from lst_scale.system.preemption import Interrupted

PROJECT = "lst_scale"
LONGEST_VALUE, PARAMS_AT_ONCE = 500, 100  # what MLflow takes


def _project(about: About, variable: str) -> str:
    return about.project or os.environ.get(variable) or PROJECT


def _named(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    return {name if "/" in name else f"{kind}/{name}": value for name, value in values.items()}


def _final(result: Mapping[str, Any] | None) -> dict[str, float]:
    return {} if result is None else {f"result/{name}": value for name, value in result["scores"].items()}


class TensorBoard:
    """Event files in the run's folder. After a resume what was written of later steps counts no more."""

    def __init__(self, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._make: Any = SummaryWriter
        self._folder, self._resumed = str(about.folder / "tensorboard"), about.resumed
        self._board: Any = None

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, _named("train", values), lost_from=step)

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, _named("validation", values), lost_from=step + 1)  # the step itself was kept

    def on_end(self, result: Mapping[str, Any] | None, error: BaseException | None) -> None:
        if self._board is not None:
            self._board.close()

    def _write(self, step: int, values: Mapping[str, float], *, lost_from: int) -> None:
        if self._board is None:
            self._board = self._make(self._folder, purge_step=lost_from if self._resumed else None)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()


class Wandb:
    """Weights & Biases. A resumed run goes on under its id; steps are an axis of their own, so that some may come twice."""

    def __init__(self, about: About) -> None:
        import wandb

        self._run = wandb.init(
            project=_project(about, "WANDB_PROJECT"),
            name=about.name,
            id=about.id,
            resume="allow",
            config=dict(about.recipe),
            dir=os.environ.get("WANDB_DIR", str(about.folder)),
            reinit="create_new",  # members of a run are runs of their own
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step} | _named("train", values))

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step} | _named("validation", values))

    def on_end(self, result: Mapping[str, Any] | None, error: BaseException | None) -> None:
        self._run.summary.update(_final(result))
        self._run.finish(exit_code=0 if error is None else 1)


class Trackio:
    """trackio, in a local database. A resumed run goes on under its name, which ends in its id."""

    def __init__(self, about: About) -> None:
        import trackio

        self._run = trackio.init(
            project=_project(about, "TRACKIO_PROJECT"),
            name=f"{about.name}-{about.id}",
            resume="allow" if about.resumed else "never",
            config=dict(about.recipe),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(_named("train", values), step=step)

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(_named("validation", values), step=step)

    def on_end(self, result: Mapping[str, Any] | None, error: BaseException | None) -> None:
        if result is not None:
            self._run.log(_final(result), step=result["steps"])
        self._run.finish()


class Mlflow:
    """MLflow, through a client of its own: its notion of a current run would be one for all members. A resumed run goes on."""

    def __init__(self, about: About) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if about.resumed:
            self._id = about.id
            self._client.update_run(self._id, status="RUNNING")
            return
        name = _project(about, "MLFLOW_EXPERIMENT_NAME")
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._id = self._client.create_run(number, run_name=about.name).info.run_id
        about.keep_id(self._id)
        self._log_recipe(about.recipe)

    def _log_recipe(self, recipe: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        every = [Param(name, str(value)[:LONGEST_VALUE]) for name, value in _flat(recipe)]
        for first in range(0, len(every), PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=every[first : first + PARAMS_AT_ONCE])

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, _named("train", values))

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, _named("validation", values))

    def on_end(self, result: Mapping[str, Any] | None, error: BaseException | None) -> None:
        if result is not None:
            self._log(result["steps"], _final(result))
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        self._client.set_terminated(self._id, "FINISHED" if error is None else "KILLED" if stopped else "FAILED")

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, float(value), now, step) for name, value in values.items()])


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}

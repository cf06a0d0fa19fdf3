"""What a job asks a cluster for, as options of every command that submits: the fields of `ClusterOptions`, said once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

Given = dict[str, Any]  # what the command line says, by the names of ClusterOptions
HELP = {
    "nodes": "machines",
    "gpus_per_node": "GPUs of a machine; one process each",
    "tasks_per_node": "processes of a machine, where it is not one a GPU",
    "cpus_per_task": "CPU cores of a process",
    "memory": "memory of a machine, such as 64G",
    "time": "limit: minutes, HH:MM:SS or D-HH:MM:SS",
    "partition": "",
    "account": "",
    "qos": "",
    "constraint": "",
    "sbatch": "a further sbatch option, such as --sbatch=--exclusive; may be repeated",
    "setup": "a shell command before the job, such as 'module load cuda'; may be repeated",
    "signal_delay": "seconds between the warning and the time limit",
}
NUMBERS = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "signal_delay")
LISTS = ("sbatch", "setup")
AGAIN = ("time", "memory", "partition", "sbatch", "setup")  # what a job that is submitted again may ask otherwise


def asks_for_a_job(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options `names` (none: all), which it receives as one argument, `given`: those that were said."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        options = [_parameter(name) for name in names or HELP]
        signature = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def call(**values: Any) -> None:
            said = {option.name: values.pop(option.name) for option in options}
            command(given=as_written({name: value for name, value in said.items() if value is not None}), **values)

        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, parameter in signature.parameters.items() if name != "given"
        ]
        call.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return call

    return decorate


def _parameter(name: str) -> inspect.Parameter:
    kind: Any = int if name in NUMBERS else list[str] if name in LISTS else str
    option = typer.Option(f"--{name.replace('_', '-')}", help=HELP[name], rich_help_panel="What a job asks for")
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def as_written(values: dict[str, Any]) -> Given:
    """Return lists as the tuples that `ClusterOptions` has."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

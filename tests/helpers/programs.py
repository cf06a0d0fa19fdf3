"""What ranks run: our commands, and recipes one after another."""

from __future__ import annotations

import fcntl
import os
import runpy
import sys
import termios

from lst_scale import train as entry
from lst_scale.cli import main as cli
from lst_scale.recipe.schema import load_recipe
from lst_scale.system import distributed
from lst_scale.training.run import run


def train(arguments: list[str]) -> int:
    """The command `lst_scale/train.py`."""
    return entry.main(arguments)


def command(arguments: list[str]) -> None:
    """The command `lst-scale`."""
    sys.argv = ["lst-scale", *arguments]
    cli.main()


def at_terminal(arguments: list[str]) -> None:
    """The command `lst-scale` at a terminal; arguments: the terminal's path, and its own."""
    descriptor = os.open(arguments[0], os.O_RDWR)
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)  # its Ctrl-C is a signal to this process
    for number in range(3):
        os.dup2(descriptor, number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    command(arguments[1:])


def script(arguments: list[str]) -> None:
    """A file, as Python runs it; arguments: its path, and its own."""
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def recipes(arguments: list[str]) -> None:
    """Carry out several recipes one after another in one world; arguments: [--resume] PATH..."""
    resume = "--resume" in arguments
    for path in arguments:
        if path != "--resume":
            run(load_recipe(path), resume=resume, overwrite=not resume)
    distributed.disconnect()

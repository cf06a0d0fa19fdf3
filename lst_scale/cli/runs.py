"""`lst-scale runs`: the runs in a folder, finished or not."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lst_scale.cli.as_json import AsJson, print_json
from lst_scale.errors import printable


def runs_command(
    folder: Annotated[Path, typer.Argument(help="where the runs are, at any depth")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List runs: what each is, where it ran, how far it came, its score and its state."""
    from lst_scale.runs.listing import list_runs

    found = list_runs(folder)
    if as_json:
        print_json([dataclasses.asdict(one) for one in found])
        return
    from rich.console import Console

    # Piped into a file or another program, lines must not be cut at 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=250)
    console.print(_table(found, folder))


def _table(found: list[Any], folder: Path) -> Any:
    """Return the runs as a table for a terminal. What is in their files is shown as it is, never as markup."""
    from rich.table import Table
    from rich.text import Text

    view = Table(box=None, pad_edge=False)
    for column in ("run", "state", "recipe", "method", "task", "backbone", "steps", "score", "where", "finished", "why"):
        view.add_column(column, overflow="fold", no_wrap=column in ("run", "state"))
    for one in found:
        steps = "" if one.step is None else f"{one.step}/{one.total_steps}" if one.total_steps else str(one.step)
        score = f"{one.score:.2f}" if one.score is not None else ""
        if not score and one.validation_score is not None:
            score = f"{one.validation_score:.2f} so far"
        run = one.run.relative_to(folder) if one.run != folder else one.run
        cells = (run, one.state, one.recipe, one.method, one.task, one.backbone, steps, score, one.where, one.finished, one.why)
        view.add_row(*(Text(printable("" if cell is None else str(cell))) for cell in cells))
    return view

"""`lst-scale cache rows`: tables of encoded rows that this machine keeps (lst_scale/data/tables.py), and their removal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lst_scale.errors import ArgumentError, fence
from lst_scale.system.assets import cache_folder


def rows_command(
    remove: Annotated[str | None, typer.Option("--remove", help="a table's name or its beginning, or all; runs that read it go on")] = None,
) -> None:
    """List the tables of rows, or remove some: name, size, when it was written. They are made again when they are needed."""
    from lst_scale.data.tables import remove_table, tables

    root = cache_folder("rows")
    found = tables(root)
    if not found:
        typer.echo(f"no tables of rows in {root}: XDG_CACHE_HOME names another place", err=True)
    chosen = [path for path in found if remove == "all" or (remove and path.name.startswith(remove))]
    if remove is not None and not chosen and found:
        raise ArgumentError(f"{remove!r} is the beginning of no table: {', '.join(path.name for path in found)}, or write all")
    for path in found if remove is None else chosen:
        line = _described(path)
        if remove is not None:
            with fence(ArgumentError, f"{path} could not be removed"):
                remove_table(path)
        typer.echo(line if remove is None else f"removed {line}")


def _described(path: Path) -> str:
    import datetime

    files = [file.stat() for file in path.iterdir() if file.is_file()]
    written = datetime.datetime.fromtimestamp(max(state.st_mtime for state in files))
    return f"{path.name}  {sum(state.st_size for state in files) / 1e9:.3f} GB  {written:%Y-%m-%d %H:%M}"

"""`lst-scale cache rows`: tables of encoded rows that this machine keeps (lst_scale/data/tables.py), and their removal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lst_scale.cli.as_json import AsJson, print_json
from lst_scale.errors import ArgumentError, fence
from lst_scale.system.assets import cache_folder


def rows_command(
    remove: Annotated[str | None, typer.Option("--remove", help="a table's name or its beginning, or all; runs that read it go on")] = None,
    as_json: AsJson = False,
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
    shown = []
    for path in found if remove is None else chosen:
        shown.append(_described(path))
        if remove is not None:
            with fence(ArgumentError, f"{path} could not be removed"):
                remove_table(path)
        if not as_json:
            typer.echo(_line(shown[-1]) if remove is None else f"removed {_line(shown[-1])}")
    if as_json:
        print_json(shown)


def _described(path: Path) -> dict[str, Any]:
    import datetime

    files = [file.stat() for file in path.iterdir() if file.is_file()]
    written = datetime.datetime.fromtimestamp(max(state.st_mtime for state in files))
    return {"name": path.name, "bytes": sum(state.st_size for state in files), "written": written.isoformat(timespec="seconds")}


def _line(found: dict[str, Any]) -> str:
    return f"{found['name']}  {found['bytes'] / 1e9:.3f} GB  {found['written'][:16].replace('T', ' ')}"

"""`lst-scale cache`: look at remembered taps, check them, remove them, or make them ahead of time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lst_scale.cli.as_json import AsJson, print_json
from lst_scale.cli.cache_rows import rows_command
from lst_scale.cli.complete import recipe_names
from lst_scale.errors import ArgumentError, BackboneError, LstScaleError, fence
from lst_scale.system import preemption
from lst_scale.system.assets import cache_folder

app = typer.Typer(help="Taps and rows remembered on disk.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

app.command("rows")(rows_command)

Folder = Annotated[Path | None, typer.Option("--folder", help="where the caches are; ~/.cache/lst_scale/taps by default")]


@app.command("list")
def list_command(folder: Folder = None, as_json: AsJson = False) -> None:
    """List the caches: backbone, precision, layers, storage, payloads, size. What can't be read is named and skipped."""
    found = []
    for path in _caches(folder):
        with _or_skipped(path):
            found.append(_described(path))
            if not as_json:
                typer.echo(_line(found[-1]))
    if as_json:
        print_json(found)


@app.command("verify")
def verify_command(folder: Folder = None, as_json: AsJson = False) -> None:
    """Read every payload and compare its checksum; exit with 1 when one is damaged. Damaged ones are never used."""
    from lst_scale.backbone.cache.store import damaged_payloads

    damaged = []
    for path in _caches(folder):
        with _or_skipped(path):
            for line in damaged_payloads(path):
                damaged.append(line)
                if not as_json:
                    typer.echo(f"damaged: {line}")
    if as_json:
        print_json({"damaged": damaged})
    else:
        typer.echo(f"{len(damaged)} damaged payloads")
    raise typer.Exit(1 if damaged else 0)


@app.command("remove")
def remove_command(
    name: Annotated[str, typer.Argument(help="a cache's name as list shows it, or its beginning")], folder: Folder = None
) -> None:
    """Remove one cache, file by file; not while a run writes to it. What is not ours stays."""
    from lst_scale.backbone.cache.claim import is_claimed

    path = _the_one(name, list(_caches(folder)), _root(folder))
    if is_claimed(path):
        raise ArgumentError(f"{path.name} is being written: wait for the run that does, or stop it")
    with fence(ArgumentError, f"{path} could not be removed"):
        count, size = _remove_files(path)
        kept = sorted(file.name for file in path.iterdir())
        if not kept:
            path.rmdir()
    typer.echo(f"removed {path}: {count} file{'' if count == 1 else 's'}, {size / 1e9:.3f} GB")
    if kept:
        typer.echo(f"kept {path}, which holds what no cache does: {', '.join(map(repr, kept[:6]))}{', ...' if len(kept) > 6 else ''}")


@app.command("build")
def build_command(
    recipe: Annotated[str, typer.Option("--recipe", help="a shipped recipe's name or a YAML file", autocompletion=recipe_names)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
) -> None:
    """Run a recipe's training rows through its backbone, ahead of the first epoch; with several processes by torchrun -m lst_scale.cli."""
    preemption.listen("start it again, rows that are written stay")
    from lst_scale.recipe.schema import load_recipe
    from lst_scale.training.shared import build_cache

    rows, folder = build_cache(load_recipe(recipe, [*(overrides or ()), "cache.enabled=true"]))
    typer.echo(f"{rows:,} rows are in {folder}")


def _root(folder: Path | None) -> Path:
    return folder or cache_folder("taps")


def _caches(folder: Path | None) -> Iterator[Path]:
    """Yield the folders that are caches of ours; say where none was found, and which ones are somebody else's."""
    from lst_scale.backbone.cache.key import KEY, read_key

    found = 0
    for mark in sorted(_root(folder).glob(f"*/{KEY}")):
        try:
            read_key(mark.parent)
        except LstScaleError as error:
            _skip(error)
            continue
        found += 1
        yield mark.parent
    if not found:
        typer.echo(f"no tap caches in {_root(folder)}: --folder names another place (a recipe's cache.folder)", err=True)


@contextlib.contextmanager
def _or_skipped(path: Path) -> Iterator[None]:
    """Name a cache that can't be read on stderr, and go on without it."""
    try:
        with fence(BackboneError, str(path)):
            yield
    except LstScaleError as error:
        _skip(error)


def _skip(error: LstScaleError) -> None:
    typer.echo(f"skipped {error}", err=True)


def _described(path: Path) -> dict[str, Any]:
    from lst_scale.backbone.cache.key import files_of, read_key
    from lst_scale.backbone.cache.store import RECORD

    key = read_key(path)
    sizes = {file: file.lstat().st_size for file in files_of(path)}
    return {
        "name": path.name,
        "backbone": key.fingerprint,
        "precision": key.precision,
        "layers": key.layers,
        "dtype": key.dtype,
        "payloads": sum(size // RECORD.size for file, size in sizes.items() if file.suffix == ".index"),
        "bytes": sum(sizes.values()),
    }


def _line(found: dict[str, Any]) -> str:
    return (
        f"{found['name']}  backbone {found['backbone'][:12]} {found['precision']}  layers {','.join(map(str, found['layers']))}  "
        f"{found['dtype']}  {found['payloads']:,} payloads  {found['bytes'] / 1e9:.3f} GB"
    )


def _the_one(name: str, caches: list[Path], root: Path) -> Path:
    """Return the cache that `name` is the beginning of.

    Raises:
        ArgumentError: it is none or several, or a link to one.
    """
    matching = [path for path in caches if name and path.name.startswith(name)]
    if len(matching) != 1:
        names = ", ".join(path.name for path in caches) or f"there are none in {root}"
        raise ArgumentError(f"{name!r} is the beginning of {len(matching)} caches: {names}")
    if matching[0].is_symlink():
        raise ArgumentError(
            f"{matching[0]} is a link to {matching[0].resolve()}: remove the link with rm, or the cache there with --folder"
        )
    return matching[0]


def _remove_files(path: Path) -> tuple[int, int]:
    """Remove a cache's own files one by one, and return how many there were and their bytes."""
    from lst_scale.backbone.cache.key import files_of

    count = size = 0
    for file in list(files_of(path)):
        size += file.lstat().st_size
        file.unlink()
        count += 1
    return count, size

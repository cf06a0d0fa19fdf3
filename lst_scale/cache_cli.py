"""`lst-scale cache`: look at remembered taps, check them, remove them, or make them ahead of time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from lst_scale.assets import cache_folder
from lst_scale.errors import ArgumentError

app = typer.Typer(help="Taps remembered on disk.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Folder = Annotated[Path | None, typer.Option("--folder", help="where the caches are; ~/.cache/lst_scale/taps by default")]


@app.command("list")
def list_command(folder: Folder = None) -> None:
    """List the caches: backbone, precision, layers, storage, payloads, size."""
    for path in _caches(folder):
        key = json.loads((path / "key.json").read_text())
        size = sum(file.stat().st_size for file in path.iterdir())
        typer.echo(
            f"{path.name}  backbone {key['fingerprint'][:12]} {key['precision']}  layers {','.join(map(str, key['layers']))}  "
            f"{key['dtype']}  {_count(path):,} payloads  {size / 1e9:.3f} GB"
        )


@app.command("verify")
def verify_command(folder: Folder = None) -> None:
    """Read every payload and compare its checksum; exit with 1 when one is damaged. Damaged ones are never used."""
    from lst_scale.backbone.tap_cache import damaged_payloads

    found = [line for path in _caches(folder) for line in damaged_payloads(path)]
    for line in found:
        typer.echo(f"damaged: {line}")
    typer.echo(f"{len(found)} damaged payloads")
    raise typer.Exit(1 if found else 0)


@app.command("remove")
def remove_command(
    name: Annotated[str, typer.Argument(help="a cache's name as list shows it, or its beginning")], folder: Folder = None
) -> None:
    """Remove one cache; not while a run writes to it."""
    from lst_scale.backbone.claim import is_claimed

    matching = [path for path in _caches(folder) if path.name.startswith(name)]
    if len(matching) != 1:
        names = ", ".join(path.name for path in _caches(folder)) or "there are none"
        raise ArgumentError(f"{name!r} is the beginning of {len(matching)} caches: {names}")
    if is_claimed(matching[0]):
        raise ArgumentError(f"{matching[0].name} is being written: wait for the run that does, or stop it")
    shutil.rmtree(matching[0])
    typer.echo(f"removed {matching[0]}")


@app.command("build")
def build_command(
    recipe: Annotated[str, typer.Option("--recipe", help="a shipped recipe's name or a YAML file")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
) -> None:
    """Run a recipe's training rows through its backbone, ahead of the first epoch; with several processes by torchrun -m lst_scale.cli."""
    from lst_scale.recipe import load_recipe
    from lst_scale.shared import build_cache

    rows, folder = build_cache(load_recipe(recipe, [*(overrides or ()), "cache.enabled=true"]))
    typer.echo(f"{rows:,} rows are in {folder}")


def _caches(folder: Path | None) -> list[Path]:
    return sorted(path.parent for path in (folder or cache_folder("taps")).glob("*/key.json"))


def _count(path: Path) -> int:
    from lst_scale.backbone.tap_cache import RECORD

    return sum(index.stat().st_size // RECORD.size for index in path.glob("*.index"))

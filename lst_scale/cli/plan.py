"""`lst-scale plan`: what a recipe needs, before anything is loaded."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lst_scale.cli.as_json import AsJson, print_json
from lst_scale.cli.complete import recipe_names
from lst_scale.errors import ArgumentError


def plan_command(
    recipe: Annotated[str, typer.Option("--recipe", help="a shipped recipe's name or a YAML file", autocompletion=recipe_names)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="such as 16GB or 80GiB: does it fit, and what is the largest micro-batch?")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="ranks")] = 1,
    target: Annotated[int | None, typer.Option(min=1, help="target tokens; data.max_target_length or 8 by default")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="with the CPU's kernels, which keep dropout masks of attention")] = False,
    plot: Annotated[Path | None, typer.Option(help="also draw stacked bars into this .png or .svg")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a training step needs on each rank, next to LoRA and full fine-tuning: from shapes alone, without weights or a GPU.

    Evaluation by generation with many beams can need more than a step does; it is not counted.
    """
    from lst_scale.recipe.schema import load_recipe
    from lst_scale.runs.pictures import check_picture
    from lst_scale.side.count import shape_of

    loaded = load_recipe(recipe, overrides or ())
    if plot is not None:
        check_picture(plot)
    with _quiet(), _without_collector():
        from lst_scale.methods import check_method
        from lst_scale.plan import report
    memory = None if gpu_memory is None else report.parse_memory(gpu_memory)
    if loaded.members is None:
        check_method(loaded)
    shape = shape_of(loaded.backbone.checkpoint)
    if shape is None:
        raise ArgumentError(
            f"the shape of {loaded.backbone.checkpoint} is unknown here: give a folder with its config.json as backbone.checkpoint"
        )
    gpu = None if cpu else report.Gpu()
    setting = report.setting_of(loaded, world_size=gpus, on_gpu=not cpu, target=target)
    with _quiet(), _without_collector(), _progress() as begin:
        found = list(report.lines(loaded, shape, setting, memory=memory, gpu=gpu, begin=begin))
    if as_json:
        print_json(_tree(report, loaded, shape, setting, found, memory, gpu))
    else:
        _print(report, loaded, shape, setting, found, memory, gpu)
    if plot is not None:
        from lst_scale.plan.picture import draw

        title = f"{loaded.name} on {loaded.backbone.checkpoint}, {setting.rows} rows of {setting.source} and {setting.target} tokens"
        draw(found, plot, title=title, memory=memory, option=gpu_memory)


def _tree(report: Any, recipe: Any, shape: Any, setting: Any, found: Sequence[Any], memory: int | None, gpu: Any) -> dict[str, Any]:
    """Return what a plan says, in bytes and counts."""
    from lst_scale.recipe.method import LstRecipe

    cache = None
    if isinstance(recipe.method, LstRecipe):
        rows, size, known = report.cache_bytes(recipe, shape, setting)
        cache = {"rows": rows, "rows_are_known": known, "bytes": size, "dtype": recipe.cache.dtype}
    return {
        "recipe": recipe.name,
        "checkpoint": recipe.backbone.checkpoint,
        "rows": setting.rows,
        "source_tokens": setting.source,
        "target_tokens": setting.target,
        "ranks": setting.world_size,
        "memory_bytes": memory,
        "methods": report.as_values(found, memory, gpu),
        "tap_cache": cache,
    }


def _print(report: Any, loaded: Any, shape: Any, setting: Any, found: Sequence[Any], memory: int | None, gpu: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from lst_scale.recipe.method import LstRecipe, ProbeRecipe

    if isinstance(loaded.method, ProbeRecipe):
        typer.echo("a probe takes no step: its line is one batch of the pass that it is fitted after, on the CPU")
    typer.echo(
        f"{loaded.name} on {loaded.backbone.checkpoint}: one step of {setting.rows} rows, {setting.source} source and {setting.target} "
        f"target tokens each, on each of {setting.world_size} rank{'s' if setting.world_size > 1 else ''}; GB of tensors at the peak "
        "(working: what is neither kept nor stored)"
    )
    header, *cells = report.as_table(found, memory, gpu)
    table = Table(*header)
    for row in cells:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 200).print(table)
    if gpu is not None and memory is not None:
        typer.echo(
            f"fits: with {gpu.context / 1e9:.1f} GB for the CUDA context and workspaces and {gpu.fragmentation:.0%} for the allocator "
            "(the first is typical, the second was 13 to 20 % in steps of T5-3B on an H200)"
        )
    if isinstance(loaded.method, LstRecipe):
        rows, size, known = report.cache_bytes(loaded, shape, setting)
        typer.echo(
            f"tap cache: at most {size / 1e9:.2f} GB on disk for {rows:,}{' training' if known else ''} rows in {loaded.cache.dtype}; "
            + report.where_a_cache_pays(loaded, shape, setting)
        )
    if loaded.backbone.context is not None:
        typer.echo("backbone.context is not counted: with data.max_source_length raised by its tokens a plan says what it takes at most")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let no library warn: what they warn of is of no concern where nothing is computed."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Let nobody look for garbage: modules stay, models on fake tensors are small. Looking takes a sixth of the time."""
    is_first = "torch" not in sys.modules
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.freeze()
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Say on stderr what is being planned: on a terminal in one line that goes away, else a line each."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda name: typer.echo(f"planning {name}", err=True)
        return
    with console.status("planning") as status:
        yield lambda name: status.update(f"planning {name}")

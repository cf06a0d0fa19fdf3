"""`lst-scale eval`: a run on the tasks of lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lst_scale.cli.as_json import AsJson, print_json
from lst_scale.errors import ArgumentError, printable


def eval_command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN] [key=value]...",
            help="the folder of a finished run, of any method, or of a saved side network; and changes to its recipe, such as "
            "backbone.precision=nf4",
        ),
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(metavar="NAME,NAME", help="tasks or groups of lm_eval, or of --include")] = None,
    include: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="YAML files of tasks; a file may name Python functions (!function), and these run: take it from people you trust",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="in place of RUN: a backbone as it was published, for the line without training"),
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="labelled examples before each question (default: the task's)")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="rows of each task, the first")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="prompts at once (default: as the run was scored)")] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="tokens of prompt and answer together; longer prompts lose their beginning (default: the model's)"),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="write prompts by the tokenizer's chat template, examples as turns")] = False,
    with_end: Annotated[
        bool,
        typer.Option(
            "--with-end", help="also count the token that ends an answer, as training and lst-scale predict do, and lm_eval doesn't"
        ),
    ] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="where to write the numbers, as JSON")] = None,
    samples: Annotated[
        Path | None, typer.Option(metavar="FILE", help="where to write what was answered to each row, as JSON lines")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a finished run on tasks of lm-evaluation-harness: its prompts and metrics, our model. Needs the extra eval."""
    from lst_scale.system.extras import require

    require("lm_eval", "eval", asked_by="lst-scale eval")
    names = [name.strip() for several in tasks or () for name in several.split(",") if name.strip()]
    if not names:
        raise ArgumentError("nothing to evaluate on: write --tasks NAME,NAME, and --include FOLDER for tasks of your own")
    folder, overrides = _divided(words or [], backbone)
    for option, path in (("--output", output), ("--samples", samples)):
        _refuse_no_file(option, path)
    from lst_scale.inference.lmeval.run import Asked, evaluate, lines_of

    asked = Asked(
        folder=folder,
        checkpoint=backbone,
        tasks=names,
        overrides=overrides,
        include=include or (),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        most_tokens=max_length,
        with_end=with_end,
        chat=chat,
        samples=samples,
    )
    with contextlib.redirect_stdout(sys.stderr):  # what functions of tasks print
        record = evaluate(asked, lambda sentence: typer.echo(sentence, err=True))
    if output is not None:
        _write(output, record)
    if as_json:
        print_json(record)
        return
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=250)
    console.print(_table(list(lines_of(record))))


def _divided(words: list[str], backbone: str | None) -> tuple[Path | None, list[str]]:
    """Return the run and the overrides among some words."""
    runs = [word for word in words if "=" not in word or Path(word).is_dir()]
    if len(runs) > 1:
        raise ArgumentError(f"one run is evaluated at a time: leave {runs[1]} out")
    if runs and backbone is not None:
        raise ArgumentError(f"--backbone is evaluated in place of a run: leave it or {runs[0]} out")
    if not runs and backbone is None:
        raise ArgumentError("nothing to evaluate: give the folder of a finished run, or --backbone CHECKPOINT")
    return Path(runs[0]) if runs else None, [word for word in words if word not in runs]


def _refuse_no_file(option: str, path: Path | None) -> None:
    """Refuse a place where no file can be written, before any work."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ArgumentError(f"{option} {path} is no place for a file: write its name, in a folder that is there")


def _write(path: Path, record: dict[str, Any]) -> None:
    from lst_scale.inference.json_lines import as_json as plain
    from lst_scale.system.durable import write_file

    write_file(path, json.dumps(plain(record, str(path)), indent=2, ensure_ascii=False) + "\n", "--output")


def _table(lines: list[Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    view = Table(box=None, pad_edge=False)
    for column in ("task", "metric", "value", "+-", "filter", "shots", "rows"):
        view.add_column(
            column, justify="right" if column in ("value", "+-", "shots", "rows") else "left", no_wrap=column in ("task", "metric")
        )
    for line in lines:
        value, error = (f"{each:.4f}" if isinstance(each, float) else each for each in (line.value, line.error))
        cells = (line.task, line.metric, value, error, line.filter, line.num_fewshot, line.num_rows)
        view.add_row(*(Text(printable("" if cell is None else str(cell))) for cell in cells))
    return view

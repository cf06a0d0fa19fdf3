"""`lst-scale chat RUN`: type, and read the answer as it comes; or lines from a pipe, an answer each."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lst_scale.errors import LstScaleError
from lst_scale.system import preemption

LEAVE, ANEW = "/exit", "/new"


def chat_command(
    run: Annotated[Path, typer.Argument(help="the folder of a finished run, of any method, or of a saved side network")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="changes to the run's recipe, such as backbone.precision=nf4")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="of an answer (default: the longest training target's; 256 in a conversation)")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0: always the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.000001, max=1, help="draw from the likeliest tokens that hold this share")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, help="draws the same answers again")] = None,
    system: Annotated[str | None, typer.Option(help="a message that begins a conversation")] = None,
    conversation: Annotated[
        bool | None,
        typer.Option("--conversation/--single", help="lines are one conversation, or questions of their own (default: as in training)"),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="of a conversation; beyond, its oldest turns are forgotten")] = 4096,
) -> None:
    """Talk to a finished run. Ends with /exit, Ctrl-D or Ctrl-C; /new begins anew.

    What was trained on conversations holds one; otherwise each line is a question of its own, written into the run's template (a text, or
    a row's fields as JSON). Where stdin is no terminal each of its lines gets an answer, and only answers are printed.
    """
    from lst_scale.serving.chat import Style, talking

    style = Style(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        system=system,
        conversation=conversation,
        prompt_tokens=prompt_tokens,
    )
    with talking(run, overrides or (), style) as talk:
        if not sys.stdin.isatty():
            for line in _lines():
                _answer(talk, line)
            return
        kind = "a conversation" if talk.is_conversation else "each line is a question of its own"
        typer.echo(f"{run.name}: {kind}; {LEAVE}, Ctrl-D or Ctrl-C ends it, {ANEW} begins anew", err=True)
        with _ends_on_ctrl_c():
            for line in _typed():
                _answer(talk, line)


def _answer(talk: Any, line: str) -> None:
    """Print the answer to one line; a line that has none is told, and the next one may have."""
    if line.strip() == ANEW:
        talk.forget()
        return
    try:
        talk.answer(line, lambda piece: typer.echo(piece, nl=False))
        typer.echo()
    except LstScaleError as error:
        if not sys.stdin.isatty():
            raise
        typer.echo(f"error: {error}", err=True)


def _lines() -> Iterator[str]:
    """Yield what is to be answered, up to /exit."""
    for line in sys.stdin:
        if line.strip() == LEAVE:
            return
        if line.strip():
            yield line.strip("\r\n")


def _typed() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # arrows, and lines from before
    while True:
        try:
            line = input("> ")
        except EOFError:
            typer.echo()
            return
        if line.strip() == LEAVE:
            return
        if line.strip():
            yield line


@contextlib.contextmanager
def _ends_on_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end a talk as Ctrl-D does, also in the middle of an answer: nothing is lost by it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo()
    finally:
        preemption.leave_on_ctrl_c()

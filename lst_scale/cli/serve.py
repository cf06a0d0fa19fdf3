"""`lst-scale serve`: one backbone, any number of side networks, over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lst_scale.errors import ArgumentError, fence
from lst_scale.system.extras import require

PRECISIONS, PLACEMENTS = ("fp32", "bf16", "int8", "nf4"), ("replicated", "streamed", "tensor_parallel", "zero3")


def serve_command(
    backbone: Annotated[str, typer.Option(help="the checkpoint: a folder, a name of the hub, or embedded:tiny-t5")],
    side: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="a finished run or a saved side network, and its name")
    ] = None,
    side_folder: Annotated[
        Path | None, typer.Option(help="a folder of them, watched: what comes is served under its folder's name, what goes is not")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16, int8 or nf4")] = "bf16",
    placement: Annotated[str, typer.Option(help="replicated, streamed; tensor_parallel or zero3 under torchrun")] = "replicated",
    host: Annotated[str, typer.Option(help="on which address it listens; the default is this machine alone")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    rows: Annotated[int, typer.Option(min=1, help="requests that run together")] = 64,
    waiting: Annotated[int, typer.Option(min=1, help="requests that may wait; more get 429")] = 256,
    seconds: Annotated[float, typer.Option(min=1, help="until a request is given up")] = 120,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="of a prompt, at most")] = 4096,
    side_memory: Annotated[
        str | None, typer.Option(help="for side networks' weights, such as 2GB; those asked for longest ago leave")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="a file with a key a line; requests need one of them")] = None,
) -> None:
    """Answer for any number of side networks beside one copy of the backbone; a batch for different ones runs the backbone once."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve", asked_by="lst-scale serve")
    _refuse_unless("--precision", precision, PRECISIONS)
    _refuse_unless("--placement", placement, PLACEMENTS)
    named = _named(side or [])
    if side_folder is not None and not side_folder.is_dir():
        raise ArgumentError(f"--side-folder {side_folder} is no folder: make it, or leave the option out")
    keys = _keys(api_key_file)
    from lst_scale.serving.start import Options, serve

    options = Options(
        checkpoint=backbone,
        sides=named,
        folder=side_folder,
        precision=precision,
        placement=placement,
        most_rows=rows,
        most_waiting=waiting,
        seconds=seconds,
        prompt_tokens=prompt_tokens,
        side_bytes=_bytes(side_memory),
        keys=keys,
    )
    serve(options, host, port, say=lambda line: typer.echo(line, err=True))


def _refuse_unless(option: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ArgumentError(f"{option} {given!r} is not one that serve has: write {', '.join(known[:-1])} or {known[-1]}")


def _named(sides: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for each in sides:
        name, equals, folder = each.partition("=")
        if not (name and equals and folder):
            raise ArgumentError(f"--side {each!r} must be a name and a folder: write --side reviews=runs/t5-base-reviews-seed0")
        if name in found:
            raise ArgumentError(f"--side names {name} twice: write another name for one of them")
        found[name] = Path(folder)
    return found


def _keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    with fence(ArgumentError, f"--api-key-file {path} can't be read"):
        found = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not found:
        raise ArgumentError(f"--api-key-file {path} holds no key: write one a line")
    return found


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    from lst_scale.plan.report import parse_memory

    found: Any = parse_memory(text)
    return int(found)

"""Load a backbone, read the side networks, and listen until a signal says stop."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn

from lst_scale.backbone.placement.load import load_alone, load_placed
from lst_scale.backbone.taps import Backbone
from lst_scale.errors import ArgumentError, fence
from lst_scale.recipe.backbone import BackboneRecipe
from lst_scale.serving.engine import Engine
from lst_scale.serving.guard import App, Guard
from lst_scale.serving.http import Limits, Server, make_app
from lst_scale.serving.networks import Networks, refuse_unserved
from lst_scale.serving.passes import Passes
from lst_scale.serving.ranks import LeadingPasses, follow
from lst_scale.serving.watch import Watcher
from lst_scale.side.count import shape_of
from lst_scale.system import distributed
from lst_scale.system.distributed import Channel, World
from lst_scale.training.shared import load_tokenizer_of

MOST_BYTES = 8 << 20  # of a request's body
UPLOAD_SECONDS = 30.0  # until a request's body has come
LOOK_EVERY = 2.0  # seconds
OPEN_TO_ALL = "whoever reaches this address may ask: give keys by --api-key-file, or listen on 127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is served, and how much at once."""

    checkpoint: str
    sides: dict[str, Path]
    folder: Path | None = None
    precision: str = "bf16"
    placement: str = "replicated"
    most_rows: int = 64
    most_waiting: int = 256
    seconds: float = 120.0
    prompt_tokens: int = 4096
    side_bytes: int | None = None
    keys: Sequence[str] = ()


def serve(options: Options, host: str, port: int, say: Callable[[str], None]) -> None:
    """Listen until SIGTERM or SIGINT; requests that were taken by then are answered first.

    Raises:
        LstScaleError: the address is taken or not this machine's; the backbone or a side network can't be used.
    """
    recipe = _recipe(options)
    if not recipe.placement.each_rank_alone:
        _serve_together(recipe, options, host, port, say)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ArgumentError(
            f"--placement {options.placement} is served by one process: start several on ports of their own, without a launcher"
        )
    with _bound(host, port) as listening:  # before the backbone is loaded, which takes minutes
        _listen(listening, options, lambda: build(options, say), say)


def _serve_together(recipe: BackboneRecipe, options: Options, host: str, port: int, say: Callable[[str], None]) -> None:
    """Let rank 0 answer, and the others run each pass of the backbone with it."""
    world = distributed.connect()
    if world.size == 1:
        raise ArgumentError(
            f"--placement {options.placement} divides the backbone over several processes: start them by "
            "torchrun --nproc-per-node 2 -m lst_scale.cli serve ..."
        )
    bound: list[socket.socket] = []
    distributed.on_main_rank(world, lambda: bound.append(_bound(host, port)))
    channel = Channel()
    backbone = load_placed(recipe, world)
    if not world.is_main:
        follow(backbone, channel)
        return
    passes = LeadingPasses(backbone, channel)
    try:
        with bound[0] as listening:
            _listen(listening, options, lambda: _application(passes, options, say), say)
    finally:
        passes.end()


def _listen(listening: socket.socket, options: Options, make: Callable[[], tuple[App, Watcher | None]], say: Callable[[str], None]) -> None:
    if not options.keys and not _is_this_machine(listening):
        say(OPEN_TO_ALL)
    app, watcher = make()
    try:
        _run(app, options, listening, say)
    finally:
        if watcher is not None:
            watcher.stop()


def _bound(host: str, port: int) -> socket.socket:
    with fence(ArgumentError, f"{host} port {port} can't be listened on"):
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)


def _is_this_machine(listening: socket.socket) -> bool:
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback


def _run(app: App, options: Options, listening: socket.socket, say: Callable[[str], None]) -> None:
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        log_level="warning",
        timeout_graceful_shutdown=int(options.seconds) + 1,
        h11_max_incomplete_event_size=1 << 16,
    )
    host, port = listening.getsockname()[:2]
    say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")
    # uvicorn raises a signal again once it has ended in peace; here it is done with then.
    before = {number: signal.signal(number, _noted) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _noted(number: int, frame: object) -> None:
    """Do nothing more."""


def build(options: Options, say: Callable[[str], None]) -> tuple[App, Watcher | None]:
    """Return the application behind its guard, and who watches the folder of side networks, if there is one; for one process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone: Backbone = load_alone(_recipe(options), World(rank=0, size=1, local_rank=0, device=device))
    return _application(Passes(backbone), options, say)


def _recipe(options: Options) -> BackboneRecipe:
    with fence(ArgumentError, "the backbone can't be served so"):
        recipe = BackboneRecipe.model_validate(
            {"checkpoint": options.checkpoint, "precision": options.precision, "placement": {"name": options.placement}}
        )
    found = shape_of(recipe.checkpoint)
    if found is not None:
        refuse_unserved(found.spec)  # before its weights are read
    return recipe


def _application(passes: Passes, options: Options, say: Callable[[str], None]) -> tuple[App, Watcher | None]:
    tokenizer: Any = load_tokenizer_of(options.checkpoint, None)
    networks = Networks(passes.backbone, tokenizer, options.side_bytes)
    for name, folder in options.sides.items():
        networks.add(name, folder)
    watcher = None
    if options.folder is not None:
        watcher = Watcher(options.folder, networks, say)
        watcher.look()
        watcher.start(LOOK_EVERY)
    say(f"{len(networks.names) - 1} side networks beside {options.checkpoint}")
    engine = Engine(passes, networks, most_rows=options.most_rows, most_waiting=options.most_waiting)
    limits = Limits(seconds=options.seconds, prompt_tokens=options.prompt_tokens)
    app = make_app(Server(engine, networks, tokenizer, limits, options.folder))
    return Guard(app, most_bytes=MOST_BYTES, keys=options.keys, seconds=min(UPLOAD_SECONDS, options.seconds)), watcher  # type: ignore[arg-type]

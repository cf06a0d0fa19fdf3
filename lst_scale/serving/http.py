"""The server: OpenAI's completions and chat, labels with their probabilities, side networks that come and go, health and measures.

No path that a request names is ever opened, no traceback leaves the process, and it listens on this machine alone unless told otherwise.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from lst_scale.errors import ArgumentError, LstScaleError
from lst_scale.serving import answers
from lst_scale.serving.answers import Failed, Piece, Reply
from lst_scale.serving.engine import Engine
from lst_scale.serving.forms import Form, error_form
from lst_scale.serving.guard import Counted
from lst_scale.serving.jobs import TooManyWait
from lst_scale.serving.measures import Measures
from lst_scale.serving.networks import Network, Networks
from lst_scale.serving.sampling import Sampling
from lst_scale.serving.schemas import Chat, Classification, Completion, NewNetwork

PAGE = Path(__file__).with_name("page.html")
DEFAULT_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may take."""

    seconds: float = 120.0  # until it is answered
    prompt_tokens: int = 4096


class Server:
    """What the routes need.

    Args:
        folder: of side networks that may be added by name; None: none may.
    """

    def __init__(self, engine: Engine, networks: Networks, tokenizer: Any, limits: Limits, folder: Path | None) -> None:
        self.engine, self.networks, self.tokenizer, self.limits, self.folder = engine, networks, tokenizer, limits, folder
        self.measures = Measures(engine, networks)
        self.began = int(time.time())

    async def network(self, name: str) -> Network:
        try:
            return await asyncio.to_thread(self.networks.get, name)
        except LstScaleError as error:
            raise HTTPException(404, str(error)) from None

    def prompt(self, network: Network, text: str) -> tuple[int, ...]:
        return self.allowed(network.prompt(text))

    def allowed(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return a prompt's ids, which must be some and not too many."""
        if not ids:
            raise HTTPException(400, "the prompt is empty")
        if len(ids) > self.limits.prompt_tokens:
            raise HTTPException(400, f"the prompt has {len(ids):,} tokens; {self.limits.prompt_tokens:,} at most")
        return ids

    def ask(self, network: Network, prompt: tuple[int, ...], asked: Completion | Chat, logprobs: int | None, most: int | None) -> Reply:
        sampling = Sampling(
            temperature=asked.temperature, top_p=asked.top_p, seed=asked.seed, past_the_end=asked.ignore_eos, logprobs=logprobs
        )
        tokens = most or DEFAULT_TOKENS
        return answers.ask(self.engine, network, prompt, sampling, tokens, asked.stops, self.tokenizer)

    async def whole(self, request: Request, replies: Sequence[Reply]) -> list[tuple[str, str]]:
        """Return the text of each row and why it ended; all leave when the client does, or when the time is over."""
        watching = asyncio.create_task(_gone(request))
        working = asyncio.create_task(_all(replies))
        try:
            async with asyncio.timeout(self.limits.seconds):
                await asyncio.wait({watching, working}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise HTTPException(499, "the client has gone")
            return await working
        except TimeoutError:
            raise HTTPException(504, f"not answered within {self.limits.seconds:g} s") from None
        finally:
            for reply in replies:
                reply.close()
            watching.cancel()
            working.cancel()
            self.note(replies)

    def note(self, replies: Sequence[Reply]) -> None:
        for reply in replies:
            if reply.first_after is not None:
                self.measures.first.observe(reply.first_after)


def make_app(server: Server) -> FastAPI:
    """Return the application."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        server.engine.start()
        yield
        await asyncio.to_thread(server.engine.stop)  # requests that were taken are answered first

    app = FastAPI(title="lst_scale", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_models(app, server)
    _add_generation(app, server)
    _add_labels(app, server)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not server.engine.is_alive:
            raise HTTPException(503, "the engine has ended: start the server again")
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(server.measures.text())

    @app.get("/")
    async def page() -> HTMLResponse:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"
        return HTMLResponse(PAGE.read_text(), headers={"content-security-policy": policy, "x-content-type-options": "nosniff"})

    app.add_middleware(Counted, note=lambda path, status: server.measures.requests.labels(path, status).inc())  # type: ignore[arg-type]
    return app


def _add_models(app: FastAPI, server: Server) -> None:
    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": server.began, "owned_by": "lst_scale"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in server.networks.names]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        found = await server.network(name)
        return described(name) | {"labels": found.labels}

    @app.post("/v1/side-networks", status_code=201)
    async def add(asked: NewNetwork) -> dict[str, Any]:
        if server.folder is None:
            raise HTTPException(403, "this server was started without --side-folder: side networks can't be added to it")
        folder = server.folder / asked.name  # one name below it: the pattern has no separator and begins with a letter or a digit
        if not folder.is_dir():
            raise HTTPException(404, f"there is no {asked.name!r} in the server's folder of side networks")
        await asyncio.to_thread(server.networks.add, asked.name, folder)
        return described(asked.name)

    @app.delete("/v1/side-networks/{name}")
    async def remove(name: str) -> dict[str, Any]:
        try:
            server.networks.remove(name)
        except LstScaleError as error:
            raise HTTPException(404, str(error)) from None
        return {"id": name, "deleted": True}


def _add_generation(app: FastAPI, server: Server) -> None:
    @app.post("/v1/completions")
    async def completions(asked: Completion, request: Request) -> Response:
        network = await server.network(asked.model)
        prompts = [server.prompt(network, text) for text in asked.prompts]
        form = Form("cmpl", "text_completion", asked.model, chat=False, logprobs=asked.logprobs is not None)
        return await _answered(server, request, asked, form, network, prompts, asked.logprobs, asked.max_tokens)

    @app.post("/v1/chat/completions")
    async def chat(asked: Chat, request: Request) -> Response:
        network = await server.network(asked.model)
        prompt = server.allowed(network.conversation([message.model_dump() for message in asked.messages]))
        form = Form("chatcmpl", "chat.completion", asked.model, chat=True, logprobs=asked.logprobs)
        most = asked.max_completion_tokens or asked.max_tokens
        logprobs = asked.top_logprobs if asked.logprobs else None
        return await _answered(server, request, asked, form, network, [prompt], logprobs, most)


async def _answered(
    server: Server,
    request: Request,
    asked: Completion | Chat,
    form: Form,
    network: Network,
    prompts: Sequence[tuple[int, ...]],
    logprobs: int | None,
    most: int | None,
) -> Response:
    if asked.stream and logprobs is not None:
        raise HTTPException(400, "log-probabilities are not streamed: leave stream or logprobs out")
    replies: list[Reply] = []
    try:
        for prompt in prompts:
            replies.append(server.ask(network, prompt, asked, logprobs, most))
    except TooManyWait:
        for reply in replies:
            reply.close()
        raise
    if asked.stream:
        return StreamingResponse(_stream(server, form, replies), media_type="text/event-stream")
    ended = await server.whole(request, replies)
    return JSONResponse(form.whole(server.tokenizer, prompts, replies, ended))


async def _stream(server: Server, form: Form, replies: Sequence[Reply]) -> AsyncIterator[str]:
    try:
        async with asyncio.timeout(server.limits.seconds):
            async for index, piece in _mixed(replies):
                if piece.text or piece.finish_reason is not None:
                    yield f"data: {json.dumps(form.piece(index, piece))}\n\n"
        yield "data: [DONE]\n\n"
    except (Failed, TimeoutError) as error:
        what = "the answer could not be made" if isinstance(error, Failed) else f"not answered within {server.limits.seconds:g} s"
        yield f"data: {json.dumps(error_form(500, what))}\n\n"
    finally:
        for reply in replies:
            reply.close()
        server.note(replies)


async def _mixed(replies: Sequence[Reply]) -> AsyncIterator[tuple[int, Piece]]:
    """Yield the pieces of several rows as they come."""
    queue: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue()

    async def follow(index: int, reply: Reply) -> None:
        try:
            async for piece in reply.pieces():
                queue.put_nowait((index, piece))
        except Failed as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(follow(index, reply)) for index, reply in enumerate(replies)]
    try:
        left = len(replies)
        while left:
            index, piece = await queue.get()
            if isinstance(piece, BaseException):
                raise piece
            left -= piece.finish_reason is not None
            yield index, piece
    finally:
        for task in tasks:
            task.cancel()


def _add_labels(app: FastAPI, server: Server) -> None:
    @app.post("/v1/classify")
    async def classify(asked: Classification) -> dict[str, Any]:
        networks = [await server.network(name) for name in asked.names]
        each = [_labels_of(network, asked) for network in networks]
        try:
            async with asyncio.timeout(server.limits.seconds):
                tasks = [
                    asyncio.create_task(answers.label(server.engine, network, server.prompt(network, _text(network, given)), targets))
                    for network, (_, targets) in zip(networks, each, strict=True)
                    for given in asked.inputs
                ]
                shares = iter(await _all_or_none(tasks))
        except TimeoutError:
            raise HTTPException(504, f"not answered within {server.limits.seconds:g} s") from None
        results = []
        for network, (labels, _) in zip(networks, each, strict=True):
            rows = []
            for _ in asked.inputs:
                rows.append(_labelled(labels, next(shares)))
            results.append({"model": network.name, "rows": rows})
        return {"object": "classification", "results": results}


async def _all_or_none(tasks: Sequence[asyncio.Task[list[float]]]) -> list[list[float]]:
    """Return what all give; when one fails, or nobody waits any more, the others leave the queue."""
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def _labelled(labels: Sequence[str], shares: Sequence[float]) -> dict[str, Any]:
    return {"label": labels[max(range(len(labels)), key=shares.__getitem__)], "probabilities": dict(zip(labels, shares, strict=True))}


def _labels_of(network: Network, asked: Classification) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    if asked.labels is not None:
        return tuple(asked.labels), network.label_ids(asked.labels)
    if network.labels is None:
        raise HTTPException(400, f"{network.name} was not trained on labels: write labels")
    return tuple(map(str.strip, network.labels)), network.targets


def _text(network: Network, given: str | dict[str, Any]) -> str:
    if isinstance(given, str) and network.chat is None:
        return given
    try:
        if isinstance(given, str):
            raise ArgumentError(f"{network.name} reads conversations: give a row whose field is a list of messages, and no text")
        return network.text_of(given)
    except LstScaleError as error:
        raise HTTPException(400, str(error)) from None


async def _all(replies: Sequence[Reply]) -> list[tuple[str, str]]:
    return list(await asyncio.gather(*map(_collect, replies)))


async def _collect(reply: Reply) -> tuple[str, str]:
    text, reason = "", ""
    async for piece in reply.pieces():
        text, reason = text + piece.text, piece.finish_reason or reason
    return text, reason


async def _gone(request: Request) -> None:
    """End when the client has."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)


def _add_errors(app: FastAPI) -> None:
    """Let every error be one of OpenAI's form, and none tell more than its line."""

    @app.exception_handler(AnyHTTPException)
    async def known(request: Request, error: AnyHTTPException) -> JSONResponse:
        return JSONResponse(error_form(error.status_code, str(error.detail)), error.status_code)

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse(error_form(400, f"{where or 'body'}: {first['msg']}"), 400)

    @app.exception_handler(LstScaleError)
    async def ours(request: Request, error: LstScaleError) -> JSONResponse:
        return JSONResponse(error_form(400, str(error)), 400)

    @app.exception_handler(TooManyWait)
    async def full(request: Request, error: TooManyWait) -> JSONResponse:
        return JSONResponse(error_form(429, "too many requests wait: try again later"), 429, {"retry-after": "1"})

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_form(500, "the answer could not be made"), 500)

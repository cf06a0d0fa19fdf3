"""What stands before every request: its size, its key, and the time it takes to come. Plain ASGI: nothing is read that need not be."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from starlette.exceptions import HTTPException

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
OPEN = ("/health", "/")  # need no key: they tell nothing


class TooLarge(HTTPException):
    """A request's body is larger than may be."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__(413, f"the body may have {most_bytes:,} bytes at most")


class TooSlow(HTTPException):
    """A request's body has not come in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(408, f"the body has not come within {seconds:g} s")


class Guard:
    """Refuses bodies over `most_bytes` (413) or over `seconds` on their way (408) and, where there are keys, requests without (401)."""

    def __init__(self, app: App, *, most_bytes: int, keys: Sequence[str] = (), seconds: float = 30.0) -> None:
        self._app, self._most_bytes, self._keys, self._seconds = app, most_bytes, [key.encode() for key in keys], seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._keys and scope["path"] not in OPEN and not self._knows(headers.get(b"authorization", b"")):
            await _refuse(send, 401, "an API key is needed: send Authorization: Bearer KEY", "invalid_api_key")
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._most_bytes:
            await self._pass_over(receive)
            await _refuse(send, 413, f"the body may have {self._most_bytes:,} bytes at most", "request_too_large")
            return
        await self._counted(scope, receive, send)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and end it when more comes than may, for its length need not be told, or when it comes too slowly."""
        received, is_whole, deadline = 0, False, asyncio.get_running_loop().time() + self._seconds

        async def counted() -> Message:
            nonlocal received, is_whole
            if is_whole:  # what comes next is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise TooSlow(self._seconds) from None
            received, is_whole = received + len(message.get("body", b"")), not message.get("more_body", False)
            if received > self._most_bytes:
                raise TooLarge(self._most_bytes)
            return message

        await self._app(scope, counted, send)

    async def _pass_over(self, receive: Receive) -> None:
        """Let a client send what it has begun, within reason: one that is cut off does not read the answer."""
        passed, more = 0, True
        with suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                while more and passed < 8 * self._most_bytes:
                    message = await receive()
                    passed, more = passed + len(message.get("body", b"")), message.get("more_body", False)

    def _knows(self, given: bytes) -> bool:
        """Compare with every key, each in a time that tells nothing of it."""
        key = given.removeprefix(b"Bearer ")
        return any([hmac.compare_digest(key, known) for known in self._keys])


class Counted:
    """Tells `note` of every answer: the route that it took and its status."""

    def __init__(self, app: App, note: Callable[[str, str], None]) -> None:
        self._app, self._note = app, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")  # a path that nobody serves may be anything, and is not told
                self._note("other" if route is None else str(route.path), str(message["status"]))
            await send(message)

        await self._app(scope, receive, noted)


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

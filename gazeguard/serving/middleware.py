"""ASGI middleware: requests that are read whole within limits of size and time, and their durations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gazeguard.serving.limits import Limits, RefusedError
from gazeguard.serving.responses import error_response


class BoundedBody:
    """Reads a request's body before the application sees it.

    One that is too large is answered with 413 once the rest has been read and dropped (a client that is still sending would not
    read the answer), one that takes too long with 408.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.limits.seconds):
                body = await self._body(receive)
        except TimeoutError:
            body = RefusedError(408, f"The request was not complete within {self.limits.seconds:g} seconds. Send it again.")
        if isinstance(body, RefusedError):
            await error_response(body.status, str(body))(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    async def _body(self, receive: Receive) -> bytes | RefusedError:
        body, most, size, more = bytearray(), self.limits.body_bytes, 0, True
        while more:
            message = await receive()
            piece, more = message.get("body", b""), message.get("more_body", False)
            size += len(piece)
            if size <= most:
                body += piece
        return (
            bytes(body) if size <= most else RefusedError(413, f"The request is larger than {most} bytes. Send less at once.")
        )


class Measured:
    """Tells how long each request took, and its status."""

    def __init__(self, app: ASGIApp, observe: Callable[[str, int, float], None]) -> None:
        self.app, self.observe = app, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            route = getattr(scope.get("route"), "path", "other")  # not the path: there is no end of those
            self.observe(route, status, time.perf_counter() - start)

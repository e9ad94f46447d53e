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
    read the answer), one that takes too long with 408, and one too many with 503.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        self._under_way += 1
        try:
            await self._serve(scope, receive, send)
        finally:
            self._under_way -= 1

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._body(receive, crowded=self._under_way > self.limits.requests)
        except RefusedError as error:
            await error_response(error.status, str(error), headers=error.headers)(scope, receive, send)
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    async def _body(self, receive: Receive, crowded: bool) -> bytes:
        limits, body, size, more = self.limits, bytearray(), 0, True
        most = 0 if crowded else limits.body_bytes
        try:
            async with asyncio.timeout(limits.seconds):
                while more:
                    message = await receive()
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    size += len(piece)
                    if size <= most:
                        body += piece
        except TimeoutError as error:
            raise RefusedError(
                408, f"The request was not complete within {limits.seconds:g} seconds. Send it again."
            ) from error
        if crowded:
            raise RefusedError(503, f"{limits.requests} requests are under way, and no more may. Try again later.", 1)
        if size > most:
            raise RefusedError(413, f"The request is larger than {most} bytes. Send less at once.")
        return bytes(body)


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

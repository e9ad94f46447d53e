"""Limits of the server, and the error of a request that they refuse."""

from __future__ import annotations

from dataclasses import dataclass

from gazeguard.errors import GazeGuardError

MAX_CONVERSATIONS = 64  # of one request
CALLERS = 8  # requests under way for each caption that may wait: most of them are answered with 429
LANES = 2  # batches that a worker has at a time: one that it works on, one that it prepares
DEFAULT_NEW_TOKENS = 256  # of a caption, where the request does not say


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        body_bytes: Largest request.
        pixels: Largest image, in pixels.
        seconds: Longest time to read a request, and then to answer it.
        queue: Captions that wait at most; more are refused with 429.
        batch: Captions that the model processes at once.
        new_tokens: Longest caption that a request may ask for.
    """

    body_bytes: int = 32 * 2**20
    pixels: int = 32_000_000
    seconds: float = 60.0
    queue: int = 256
    batch: int = 8
    new_tokens: int = 1024

    @property
    def requests(self) -> int:
        """Requests under way at most, those included that are still being read."""
        return CALLERS * self.queue


class RefusedError(GazeGuardError):
    """A request that the server does not serve now, or at all.

    Attributes:
        status: HTTP status of the answer.
        retry_after: Seconds after which the caller should try again; None where that would not help.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return headers if self.retry_after is None else headers | {"Retry-After": str(self.retry_after)}

"""Chat completions: generated captions in OpenAI's form, whole or as server-sent events."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from gazeguard.errors import GazeGuardError
from gazeguard.serving.contracts import ChatRequest
from gazeguard.serving.limits import RefusedError
from gazeguard.serving.responses import error_body, json_text
from gazeguard.serving.tasks import Written

logger = logging.getLogger(__name__)


def completion(name: str, written: Written) -> dict[str, Any]:
    """A chat completion: what the policy lets through of a caption, with its report under ``gazeguard``."""
    message = {"role": "assistant", "content": written.report.filtered_caption, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": _finish_reason(written), "logprobs": None}
    return _head("chat.completion", name) | {
        "choices": [choice],
        "usage": _usage(written),
        "gazeguard": written.report.to_dict(),
    }


async def events(name: str, request: ChatRequest, pieces: AsyncIterator[str | Written]) -> AsyncIterator[str]:
    """The server-sent events of a stream: the pieces, then a chunk with the report, the usage if wanted, and the end."""
    head = _head("chat.completion.chunk", name)
    usage = request.stream_options is not None and request.stream_options.include_usage

    def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _event(head | {"choices": [choice]} | ({"usage": None} if usage else {}) | more)

    yield chunk({"role": "assistant", "content": ""})
    try:
        async for piece in pieces:
            if isinstance(piece, str):
                yield chunk({"content": piece})
                continue
            yield chunk({}, _finish_reason(piece), gazeguard=piece.report.to_dict())
            if usage:
                yield _event(head | {"choices": [], "usage": _usage(piece)})
    except GazeGuardError as error:  # the status has been sent
        yield _event(error_body(error.status if isinstance(error, RefusedError) else 400, str(error)))
    except Exception:
        logger.exception("a stream ended with an error")
        yield _event(error_body(500, "The server failed at this request. Its log says why."))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json_text(content)}\n\n"


def _head(kind: str, name: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}


def _finish_reason(written: Written) -> str:
    """Why the text ends: withheld by the policy, at the length limit, or by itself."""
    report = written.report
    if report.caption and not report.filtered_caption:
        return "content_filter"
    return "stop" if written.finished else "length"


def _usage(written: Written) -> dict[str, int]:
    total = written.prompt_tokens + written.tokens
    return {"prompt_tokens": written.prompt_tokens, "completion_tokens": written.tokens, "total_tokens": total}

"""Responses of the server: strict JSON in ASCII, errors in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import Response


def json_text(content: Any) -> str:
    """Strict JSON, in ASCII: a caption may hold halves of characters, which no UTF-8 can."""
    return json.dumps(content, allow_nan=False)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with JSON in it."""
    return Response(json_text(content), status, headers, "application/json")


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": str(status)}}


def error_response(status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None) -> Response:
    """A response that says what is wrong and what to do."""
    return json_response(error_body(status, message, param), status, headers)

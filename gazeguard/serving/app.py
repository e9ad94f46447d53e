"""FastAPI application: the routes, their key, and their errors."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from gazeguard import __version__
from gazeguard.errors import GazeGuardError
from gazeguard.serving.chat import completion, events
from gazeguard.serving.contracts import ChatRequest, CheckRequest, Conversation, GuardrailRequest
from gazeguard.serving.conversation import read_exchange
from gazeguard.serving.guardrail import Guardrail
from gazeguard.serving.limits import Limits, RefusedError
from gazeguard.serving.middleware import BoundedBody, Measured
from gazeguard.serving.responses import error_response, json_response
from gazeguard.serving.service import Service
from gazeguard.serving.tasks import Worker

logger = logging.getLogger(__name__)
T = TypeVar("T")
DESCRIPTION = """Says which phrases of a caption its image does not support. Images come as `data:` URIs; nothing is fetched.
What cannot be checked is an answer, too: `"verdict": "unchecked"`, and why."""


def create_app(worker: Worker, name: str = "gazeguard", limits: Limits | None = None, api_key: str | None = None) -> FastAPI:
    """The application around one model.

    Args:
        worker: Has the model: `Model` around a guard in this process, or `ModelProcess`. The application closes it.
        name: What the model is called in answers.
        limits: What is taken on.
        api_key: What requests have to bring along, as ``Authorization: Bearer KEY`` or ``X-Api-Key: KEY``; None for no key.
    """
    limits = limits or Limits()
    service = Service(worker, name, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(title="GazeGuard", version=__version__, description=DESCRIPTION, lifespan=lifespan)
    app.state.service, app.state.guardrail, app.state.api_key = service, Guardrail(service), api_key
    app.include_router(open_routes)
    app.include_router(routes)
    app.add_exception_handler(GazeGuardError, _refusal)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failure)
    app.add_middleware(BoundedBody, limits=limits)
    app.add_middleware(Measured, observe=service.metrics.observe_request)
    return app


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _require_key(request: Request) -> None:
    """Raise `RefusedError` for a request without the key, if there is one."""
    key = request.app.state.api_key
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    given = (bearer if scheme.lower() == "bearer" else "", request.headers.get("x-api-key", ""))
    if key is not None and not any(hmac.compare_digest(each.encode(), key.encode()) for each in given):
        raise RefusedError(401, "The API key is missing or wrong. Send it as Authorization: Bearer KEY, or as X-Api-Key: KEY.")


Served = Annotated[Service, Depends(_service)]
open_routes = APIRouter()
routes = APIRouter(dependencies=[Depends(_require_key)])


@open_routes.get("/healthz", summary="Whether the server is ready")
async def healthz(service: Served) -> Response:
    """200 while it answers requests; 503 while it stops, or loads a model that it has lost."""
    content = {
        "status": service.status,
        "model": service.name,
        "policy": service.worker.facts.policy.name,
        "version": __version__,
        "queue": len(service.queue),
        "restarts": service.worker.restarts,
    }
    return json_response(content, 200 if service.status == "ok" else 503)


@open_routes.get("/metrics", summary="Metrics for Prometheus")
async def metrics(service: Served) -> Response:
    """Verdicts by reason, seconds per request, captions per batch and in the queue."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


@routes.get("/v1/models", summary="The model")
async def models(service: Served) -> Response:
    """The one model, as OpenAI's clients list them."""
    return json_response({"object": "list", "data": [{"id": service.name, "object": "model", "owned_by": "gazeguard"}]})


@routes.post("/v1/check", summary="Check captions that anything wrote")
async def check(body: CheckRequest, request: Request, service: Served) -> Response:
    """The report on the last message of a conversation, or `{"reports": [...]}` on those of several."""
    conversations = [body] if isinstance(body, Conversation) else body.conversations
    reports = await _unless_gone(request, service.check([read_exchange(each.messages) for each in conversations]))
    if isinstance(body, Conversation):
        return json_response(reports[0].to_dict())
    return json_response({"reports": [report.to_dict() for report in reports]})


@routes.post("/v1/chat/completions", summary="Generate a guarded caption")
async def chat(body: ChatRequest, request: Request, service: Served) -> Response:
    """A chat completion with its report under `gazeguard`; with `stream`, server-sent events, all of which stand."""
    if body.stream:
        pieces = await service.stream(body)
        return StreamingResponse(events(service.name, body, pieces), media_type="text/event-stream")
    return json_response(completion(service.name, await _unless_gone(request, service.caption(body))))


@routes.post("/beta/litellm_basic_guardrail_api", summary="LiteLLM's Generic Guardrail")
async def guardrail(body: GuardrailRequest, request: Request) -> Response:
    """Modes `pre_call`, which shows the image, and `post_call`, which has the answer; one without the other checks nothing."""
    return json_response(await request.app.state.guardrail.answer(body))


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """An answer, cancelled when the caller leaves."""

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise RefusedError(499, "The caller has left.")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


# ------------------------------------------------------------------------------------------------------------ errors


async def _refusal(request: Request, error: Any) -> Response:
    """What GazeGuard refuses on purpose."""
    if isinstance(error, RefusedError):
        return error_response(error.status, str(error), headers=error.headers)
    return error_response(400, str(error))


async def _invalid(request: Request, error: Any) -> Response:
    """A body that is not of the form: where, and what is expected; what was given may be a whole image."""
    first, kind = error.errors()[0], request.headers.get("content-type", "")
    if kind and "json" not in kind:  # as curl -d says of what it sends
        return error_response(422, f"The body is sent as {kind:.60}; expected Content-Type: application/json (curl --json).")
    if first["type"] == "json_invalid":
        what = f"The body is not JSON at character {first['loc'][-1]}: {first['ctx']['error']}. /docs has the form."
        return error_response(422, what, None)
    param = ".".join(str(part) for part in first["loc"] if part not in ("body", "one", "several"))
    return error_response(422, f"{param or 'the body'}: {first['msg']}. /docs has the form.", param or None)


async def _http_error(request: Request, error: Any) -> Response:
    return error_response(error.status_code, f"{error.detail}. /docs has the routes.", headers=error.headers)


async def _failure(request: Request, error: Exception) -> Response:
    """Whatever else goes wrong; the log has it, the caller does not."""
    return error_response(500, "The server failed at this request. Its log says why.")

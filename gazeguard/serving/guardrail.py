"""LiteLLM's Generic Guardrail interface: the image of a call's request is kept until its response comes to be checked.

LiteLLM sends images and messages before the model is called (``pre_call``), and only the answer's texts after it
(``post_call``); both have the same ``litellm_call_id``.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from gazeguard.errors import InputError
from gazeguard.report import Report
from gazeguard.serving.contracts import GuardrailRequest, Messages
from gazeguard.serving.conversation import Exchange, Question, decode_data_uri, read_question
from gazeguard.serving.service import Service

MAX_CALLS, MAX_BYTES, MAX_AGE = 4096, 256 * 2**20, 600.0  # calls, bytes of images, seconds
_MESSAGES: TypeAdapter[Any] = TypeAdapter(Messages)


class _Call(NamedTuple):
    """A call as its request showed it: its question, None without an image, or why its answer cannot be checked."""

    question: Question | str | None
    time: float

    @property
    def size(self) -> int:
        """Bytes of the image."""
        return len(self.question.image) if isinstance(self.question, Question) else 0


class Guardrail:
    """The guardrail of one server, with the questions of the calls that are under way."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._calls: OrderedDict[str, _Call] = OrderedDict()
        self._bytes = 0

    async def answer(self, request: GuardrailRequest) -> dict[str, Any]:
        """LiteLLM's answer: a request is kept in mind and passes; a response becomes what the policy lets through."""
        if request.input_type == "request":
            if request.litellm_call_id:
                self._remember(request.litellm_call_id, _question(request))
            return {"action": "NONE"}
        texts = request.texts or []
        question = self._recall(request.litellm_call_id)
        if question is None or not any(text.strip() for text in texts):
            return {"action": "NONE"}
        return _action(texts, await self._reports(question, texts))

    async def _reports(self, question: Question | str, texts: list[str]) -> list[Report]:
        if isinstance(question, Question):
            return await self.service.check([Exchange(question, text) for text in texts])
        reports = [self.service.unchecked(text, question) for text in texts]
        for report in reports:
            self.service.metrics.count(report)
        return reports

    def _remember(self, call: str, question: Question | str | None) -> None:
        self._forget(call)
        entry = _Call(question, time.monotonic())
        self._calls[call] = entry
        self._bytes += entry.size
        while self._calls:
            oldest, first = next(iter(self._calls.items()))
            if len(self._calls) <= MAX_CALLS and self._bytes <= MAX_BYTES and entry.time - first.time <= MAX_AGE:
                break
            self._forget(oldest)

    def _forget(self, call: str) -> None:
        entry = self._calls.pop(call, None)
        self._bytes -= 0 if entry is None else entry.size

    def _recall(self, call: str | None) -> Question | str | None:
        """The question of a call, which stays: of a stream LiteLLM sends several states."""
        if call is None or call not in self._calls:
            return (
                "the request of this call is not known, so there is no image of it: run the guardrail in the modes pre_call "
                "and post_call, both with this server"
            )
        return self._calls[call].question


def _question(request: GuardrailRequest) -> Question | str | None:
    """The question of a request, None for one without an image, or why its answer cannot be checked."""
    if not request.images:
        return None
    try:
        if request.structured_messages is not None:
            return read_question(_MESSAGES.validate_python(request.structured_messages))
        if len(request.images) != 1:
            return f"the call has {len(request.images)} images; expected one"
        return Question(decode_data_uri(request.images[0]), "\n".join(request.texts or ()))
    except ValidationError as error:
        return f"the messages of the call are not of a form that can be checked: {error.errors()[0]['msg']}"
    except InputError as error:
        return str(error)


def _action(texts: list[str], reports: list[Report]) -> dict[str, Any]:
    """What LiteLLM is to do: nothing, replace the texts, or block the answer where nothing is let through of a text."""
    blocked = [report for text, report in zip(texts, reports, strict=True) if text.strip() and not report.filtered_caption]
    if blocked:
        return {"action": "BLOCKED", "blocked_reason": blocked[0].reason}
    filtered = [report.filtered_caption for report in reports]
    return {"action": "NONE"} if filtered == texts else {"action": "GUARDRAIL_INTERVENED", "texts": filtered}

"""guardrails-ai validator and LiteLLM's guardrail client, with the real libraries: ``make test-guardrails``.

guardrails-ai holds typer and rich back and brings LiteLLM along, so it has an environment of its own; elsewhere all of this is
skipped.
"""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import threading
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from gazeguard import lab
from gazeguard.guard import GazeGuard

pytest.importorskip("guardrails", reason="guardrails-ai is not installed: make test-guardrails has an environment with it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries that these libraries use
    import litellm
    from guardrails import Guard
    from guardrails.errors import ValidationError
    from guardrails.settings import settings
    from litellm.llms.openai.chat.guardrail_translation.handler import OpenAIChatCompletionsHandler
    from litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api.generic_guardrail_api import GenericGuardrailAPI

    from gazeguard.errors import InputError
    from gazeguard.integrations.guardrails import SupportedByImage
    from gazeguard.serving.app import create_app
    from gazeguard.serving.model import Model

settings.rc.enable_metrics = False  # it would report its use to its makers
pytestmark = pytest.mark.filterwarnings("default")
SAMPLE = lab.samples("test", 2, seed=7)[1]
IMAGE, CAPTION = SAMPLE.image, SAMPLE.turns[0].answer
MIXED = f"{CAPTION} There is a red skull."


@pytest.fixture(scope="module")
def dropping(lab_vlm) -> GazeGuard:
    return GazeGuard(*lab_vlm, policy="drop")


def test_verdicts_are_passes_and_failures(dropping):
    """With the filtered caption as the fix, and the flagged phrases as spans."""
    validator = SupportedByImage(dropping, on_fail="fix")
    assert validator.validate(CAPTION, {"image": IMAGE}).outcome == "pass"
    result, report = validator.validate(MIXED, {"image": IMAGE}), dropping.check(IMAGE, MIXED)
    assert (result.outcome, result.fix_value) == ("fail", report.filtered_caption)
    assert result.error_message == report.reason
    assert [MIXED[span.start : span.end] for span in result.error_spans] == [f.claim.text for f in report.flagged]
    assert result.metadata["gazeguard"] == report.to_dict()
    unchecked = validator.validate(CAPTION, {"image": b"nothing"})
    assert (unchecked.outcome, unchecked.fix_value) == ("fail", CAPTION)
    assert unchecked.error_message.startswith("unchecked: ")


def test_a_guard_of_guardrails_fixes_and_raises(dropping, lab_folder):
    fixing = Guard().use(SupportedByImage(dropping, on_fail="fix"))
    filtered = dropping.check(IMAGE, MIXED).filtered_caption
    assert filtered not in ("", MIXED)
    assert fixing.validate(MIXED, metadata={"image": IMAGE}).validated_output == filtered
    assert fixing.validate(CAPTION, metadata={"image": IMAGE}).validation_passed
    raising = Guard().use(SupportedByImage(pretrained=str(lab_folder), on_fail="exception"))
    with pytest.raises(ValidationError, match="not supported by the image: a red skull"):
        raising.validate(MIXED, metadata={"image": IMAGE})


def test_what_is_missing_is_said(dropping):
    with pytest.raises(InputError, match="either a guard or the name of a model"):
        SupportedByImage()
    with pytest.raises(InputError, match="The metadata have no image"):
        SupportedByImage(dropping).validate(CAPTION, {})


# ------------------------------------------------------------------------------------------------------------ LiteLLM


class Server(uvicorn.Server):
    """uvicorn, which says when it has started."""

    ready = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@pytest.fixture
def address(dropping):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        server = Server(uvicorn.Config(create_app(Model(dropping), api_key="sesame"), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        assert server.ready.wait(600)
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_litellms_own_client_filters_the_answer_to_an_image(address):
    """Its handler shows the image before the call, sends the answer's text after it, and puts the filtered caption in."""
    buffer = io.BytesIO()
    IMAGE.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Describe the picture."}]
    data = {"model": "any", "messages": [{"role": "user", "content": parts}]}
    answer = litellm.ModelResponse(choices=[{"message": {"role": "assistant", "content": MIXED}}])
    call = SimpleNamespace(litellm_call_id="call-1", litellm_trace_id="trace-1", model_call_details={})

    async def guarded() -> Any:
        client = GenericGuardrailAPI(api_base=address, api_key="sesame", guardrail_name="gazeguard", event_hook="post_call")
        handler = OpenAIChatCompletionsHandler()
        await handler.process_input_messages(data, client, call)
        return await handler.process_output_response(answer, client, call, request_data=data)

    filtered = asyncio.run(guarded()).choices[0].message.content
    assert filtered not in ("", MIXED)
    assert filtered.startswith(CAPTION.rstrip("."))

"""Server behind a real uvicorn on this machine's loopback, asked by OpenAI's client, curl and plain sockets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import openai
import pytest
import uvicorn
from PIL import Image
from servingkit import Hanging, die_loading, load_held, load_nothing
from typer.testing import CliRunner

from gazeguard import lab
from gazeguard.cli import app
from gazeguard.errors import GazeGuardError
from gazeguard.guard import GazeGuard
from gazeguard.serving.app import create_app
from gazeguard.serving.batching import BatchQueue, Job
from gazeguard.serving.contracts import ChatRequest, Conversation, Conversations
from gazeguard.serving.limits import Limits, RefusedError
from gazeguard.serving.metrics import reason_of
from gazeguard.serving.model import Model
from gazeguard.serving.process import DIED, ModelProcess
from gazeguard.serving.service import Service
from gazeguard.serving.tasks import Deltas, Row, Stopped, Task, Worker
from gazeguard.tracing import Prepared

PATIENCE = 600  # seconds until an answer counts as lost, however busy the machine is
PATIENT = Limits(seconds=PATIENCE)
SAMPLES = lab.samples("test", 6, seed=7)
IMAGE, CAPTION = SAMPLES[1].image, SAMPLES[1].turns[0].answer
FLAGGED = lab.samples("test", 7, seed=900)  # number 2 has a flag within 40 tokens, number 6 a rollback
FALSE = CAPTION.replace(SAMPLES[1].drawing.objects[0].noun, "skull", 1)
KEY = "sesame"


def packed(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def question(image: Image.Image | str = IMAGE, prompt: str = "Describe the picture.") -> dict[str, Any]:
    url = image if isinstance(image, str) else uri(packed(image))
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]}


def conversation(caption: Any = CAPTION, **shown: Any) -> dict[str, Any]:
    """A conversation in OpenAI's form."""
    return {"messages": [question(**shown), {"role": "assistant", "content": caption}]}


class Server(uvicorn.Server):
    """uvicorn, which says when it has started."""

    def __init__(self, app: Any) -> None:
        super().__init__(uvicorn.Config(app, log_level="critical"))
        self.ready = threading.Event()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@contextmanager
def serving(guard: GazeGuard | Worker, limits: Limits = PATIENT, key: str | None = None) -> Iterator[str]:
    """The address of a server around a guard, which stops as it does after SIGTERM."""
    worker = Model(guard) if isinstance(guard, GazeGuard) else guard
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        server = Server(create_app(worker, "lab", limits, key))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        assert server.ready.wait(PATIENCE)
        try:
            yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def send(address: str, path: str, body: Any = None, headers: Any = ()) -> tuple[int, Any, Any]:
    """Status, body and headers of an answer."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json", **dict(headers)})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, _content(answer), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _content(error), error.headers


def _content(answer: Any) -> Any:
    text = answer.read().decode()
    return json.loads(text) if answer.headers["Content-Type"] == "application/json" else text


def check(address: str, body: Any) -> tuple[int, Any]:
    return send(address, "/v1/check", body)[:2]


def refused(answer: tuple[int, Any]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["message"]


def client(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=PATIENCE)


@pytest.fixture(scope="module")
def marking(lab_vlm) -> GazeGuard:
    return GazeGuard(*lab_vlm)


@pytest.fixture(scope="module")
def address(marking) -> Iterator[str]:
    with serving(marking) as address:
        yield address


# -------------------------------------------------------------------------------------------------------------- check


@pytest.mark.parametrize(("caption", "verdict"), [(CAPTION, "pass"), (FALSE, "flag"), ("", "unchecked")])
def test_an_answer_is_the_guards_report(marking, address, caption, verdict):
    """Field by field what `check` says of the image."""
    status, report = check(address, conversation(caption))
    assert (status, report["verdict"]) == (200, verdict)
    assert report == marking.check(packed(IMAGE), caption).to_dict()


def test_openais_forms_of_messages(marking, address):
    """Answers in parts; instructions, which stand before the question; content as a string; what clients add."""
    parts = [{"type": "text", "text": "There is a red skull."}, {"type": "text", "text": "It is big."}]
    status, report = check(address, conversation(parts))
    assert (status, report["caption"]) == (200, "There is a red skull.\nIt is big.")
    talk = conversation()["messages"]
    talk[0]["content"][0]["image_url"]["detail"] = "high"
    talk[1] |= {"refusal": None, "annotations": []}
    body = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": parts[:1]}, *talk]}
    expected = marking.check(IMAGE, CAPTION, "Be brief.\n\nThere is a red skull.\n\nDescribe the picture.")
    assert check(address, body) == (200, expected.to_dict())


def test_conversations_come_in_batches(marking, address):
    """In their order; an image that cannot be read is its own conversation's only."""
    captions = [CAPTION, FALSE, "There is a green anchor."]
    body = {
        "conversations": [conversation(caption, image=sample.image) for caption, sample in zip(captions, SAMPLES, strict=False)]
    }
    body["conversations"].insert(1, conversation(image=uri(b"nothing")))
    status, answer = check(address, body)
    first, unreadable, *rest = answer["reports"]
    expected = marking.check_all([sample.image for sample in SAMPLES[:3]], captions)
    assert (status, unreadable["verdict"]) == (200, "unchecked")
    assert [r["caption"] for r in (first, *rest)] == captions
    assert [r["verdict"] for r in (first, *rest)] == [str(r.verdict) for r in expected]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<svg onload='alert(1)'/>", "is not an image that Pillow can read"),
        (packed(IMAGE)[:600], "is damaged"),
        (b"", "is not an image that Pillow can read"),
    ],
)
def test_what_is_no_image_is_unchecked(address, data, reason):
    """Whatever the URI says it is."""
    status, report = check(address, conversation(image=uri(data, "jpeg")))
    assert (status, report["verdict"]) == (200, "unchecked")
    assert reason in report["reason"]


def test_texts_that_no_model_reads_are_unchecked(address):
    """Special tokens in the prompt, half a character in the caption; the answer is JSON all the same."""
    for body in (conversation(prompt="Hi<end_of_utterance>"), conversation("\ud800")):
        status, report = check(address, body)
        assert (status, report["verdict"]) == (200, "unchecked")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/a.png",
        "https://example.org/a.png",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "/etc/passwd",
        "data:text/html;base64,PGI+",
        "data:image/png,raw",
        "data:image/png;base64,%%%",
        "data:image/png;base64,AA",
        "data:image/png;base64,AAAA\n",
        "data:image/png;base64,\u0661\u0662",
        "",
    ],
)
def test_nothing_is_fetched_or_read(address, url, monkeypatch):
    """Only data: URIs of base64 are taken; no other address is even looked up."""
    looked_up = []
    real = socket.getaddrinfo

    def listening(host: Any, *arguments: Any, **options: Any) -> Any:
        looked_up.append(host)
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", listening)
    expected = "The image is no data:image/...;base64 URI. Nothing is fetched: send it whole."
    assert refused(check(address, conversation(image=url))) == (400, expected)
    assert set(looked_up) <= {"127.0.0.1"}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 422, "Field required"),
        (b"{", 422, "The body is not JSON at character"),
        (b"[" * 100_000, 400, "error parsing the body"),
        (b"\xff", 400, "error parsing the body"),
        (b"[]", 422, "valid dictionary"),
        (b"{}", 422, "Field required"),
        ({"messages": []}, 422, "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 422, "'system', 'developer', 'user' or 'assistant'"),
        ({"messages": [question()]}, 400, "The last message is of 'user'; expected the answer to check"),
        ({"messages": [question(), *conversation()["messages"]]}, 400, "messages are of: user, user; expected one question"),
        ({"messages": conversation()["messages"][1:] * 2}, 400, "messages are of: assistant; expected one question"),
        ({"conversations": []}, 422, "at least 1 item"),
        ({"conversations": [conversation()] * 65}, 422, "at most 64 items"),
    ],
    ids=range(13),
)
def test_what_is_no_conversation_is_refused(address, body, status, message):
    """With the reason, and without what was sent."""
    answer = check(address, body)
    assert answer[0] == status, answer
    assert message in json.dumps(answer[1])
    assert len(json.dumps(answer[1])) < 600


def test_a_body_that_is_sent_as_a_form_is_refused_by_that_name(address):
    """As curl -d sends it."""
    status, answer, _ = send(address, "/v1/check", conversation(), {"Content-Type": "application/x-www-form-urlencoded"})
    expected = "The body is sent as application/x-www-form-urlencoded; expected Content-Type: application/json (curl --json)."
    assert refused((status, answer)) == (422, expected)


@pytest.mark.parametrize("images", [0, 2])
def test_one_image_is_asked_for(address, images):
    talk = conversation()
    parts = talk["messages"][0]["content"]
    talk["messages"][0]["content"] = [*parts[:1] * images, *parts[1:]]
    assert refused(check(address, talk))[1].startswith(f"The conversation has {images} images; expected one")


# ---------------------------------------------------------------------------------------------------------- captions


def test_openais_client_captions_whole_and_in_a_stream(marking, address):
    """The same caption, with the report beside it; the pieces of the stream are the caption, and no more."""
    asked = {"model": "any", "messages": [question()], "temperature": 0, "max_tokens": 60}
    expected = marking.caption(IMAGE, do_sample=False, max_new_tokens=60)
    with client(address) as api:
        answer = api.chat.completions.create(**asked)
        assert answer.choices[0].message.content == expected.filtered_caption
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == len(expected.trace)
        assert answer.model_extra["gazeguard"] == expected.to_dict()
        *chunks, last, usage = api.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected.caption
        assert len(chunks) > 5
        assert last.choices[0].finish_reason == "stop"
        assert last.model_extra["gazeguard"]["phrases"] == expected.to_dict()["phrases"]
        assert usage.usage == answer.usage
        assert api.models.list().data[0].id == "lab"
        neutral = {"stop": None, "seed": None, "frequency_penalty": 0.0, "logprobs": False, "n": 1}
        short = api.chat.completions.create(**asked | {"max_tokens": 3} | neutral)
        assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 3)
        sampled = api.chat.completions.create(**asked | {"temperature": 1.5, "top_p": 0.9, "max_tokens": 8})
        assert sampled.choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="5000 tokens are asked for, and the limit is 1024"):
            api.chat.completions.create(**asked | {"max_tokens": 5000})
        with pytest.raises(openai.UnprocessableEntityError, match="frequency_penalty: Extra inputs are not permitted"):
            api.chat.completions.create(**asked, frequency_penalty=0.5)
        with pytest.raises(openai.UnprocessableEntityError, match="tools: Extra inputs are not permitted"):
            api.chat.completions.create(**asked, tools=[{"type": "function", "function": {"name": "f"}}])
        with pytest.raises(openai.BadRequestError, match="is not an image that Pillow can read"):
            api.chat.completions.create(**asked | {"messages": [question(uri(b"nothing"))], "stream": True})


def test_a_stream_never_takes_a_piece_back_under_rewind(lab_vlm):
    """A doubtful phrase is rolled back before it is shown: the pieces together are the caption that is left in the end."""
    guard = GazeGuard(*lab_vlm, policy="rewind")
    plain, sample = GazeGuard(*lab_vlm), FLAGGED[6]
    with serving(guard) as address, client(address) as api:
        asked = {"model": "lab", "messages": [question(sample.image, sample.prompt)], "temperature": 0, "max_tokens": 40}
        *chunks, last = api.chat.completions.create(**asked, stream=True)
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == last.model_extra["gazeguard"]["caption"]
    assert len(chunks) > 5
    assert text != plain.caption(sample.image, sample.prompt, do_sample=False, max_new_tokens=40).caption  # it was rolled back


@pytest.mark.parametrize("policy", ["drop", "abstain"])
def test_what_the_policy_withholds_is_in_no_piece(lab_vlm, policy):
    """Not even in a stream, which then has one piece, or none."""
    guard, sample = GazeGuard(*lab_vlm, policy=policy), FLAGGED[2]
    report = guard.caption(sample.image, sample.prompt, do_sample=False, max_new_tokens=40)
    assert report.flagged
    with serving(guard) as address, client(address) as api:
        asked = {"model": "lab", "messages": [question(sample.image, sample.prompt)], "temperature": 0, "max_tokens": 40}
        *chunks, last = api.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == report.filtered_caption != report.caption
        assert last.choices[0].finish_reason == ("length" if report.filtered_caption else "content_filter")


# ----------------------------------------------------------------------------------------------- curl, docs, metrics


def test_curl_and_the_documented_requests(address, tmp_path):
    """The examples of /docs can be sent as they are, by curl as by anything."""
    schemas = send(address, "/openapi.json")[1]["components"]["schemas"]
    assert send(address, "/docs")[0] == 200
    routes = {"Conversation": "/v1/check", "Conversations": "/v1/check", "ChatRequest": "/v1/chat/completions"}
    for name, route in routes.items():
        path = tmp_path / "body.json"
        path.write_text(json.dumps(schemas[name]["examples"][0]))
        command = ["curl", "-sS", "-w", "%{http_code}", f"{address}{route}", "--json", f"@{path}"]
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert shown.endswith("200"), shown
        assert '"verdict": ' in shown
    for schema in (Conversation, Conversations, ChatRequest):
        schema.model_validate(schemas[schema.__name__]["examples"][0])


def test_health_and_metrics(address):
    check(address, conversation(FALSE))
    check(address, conversation(""))
    status, health, _ = send(address, "/healthz")
    assert (status, health["status"], health["model"], health["policy"]) == (200, "ok", "lab", "mark")
    shown = send(address, "/metrics")[1]
    assert 'gazeguard_verdicts_total{reason="caption",verdict="unchecked"}' in shown
    assert 'gazeguard_verdicts_total{reason="' in shown.replace('reason="caption"', "").replace('reason=""', "")
    assert 'gazeguard_request_seconds_count{route="/v1/check",status="200"}' in shown
    assert "gazeguard_queue_rows 0.0" in shown
    assert "gazeguard_batch_rows_count" in shown
    assert send(address, "/nothing/here")[0] == 404
    assert 'route="other",status="404"' in send(address, "/metrics")[1]


def test_reasons_are_counted_under_few_labels(marking):
    reports = [
        marking.unchecked("", "the caption is empty"),
        marking.unchecked("x", "prompt and caption have 900 tokens, more than the model's context of 512"),
        marking.unchecked("x", "the given image is not an image that Pillow can read. Give a PNG, JPEG or WebP file."),
        marking.unchecked("x", "something nobody has thought of"),
        marking.check(IMAGE, "I cannot help with that."),
        marking.check(Image.new("RGB", (64, 64), "red"), CAPTION),
        marking.unchecked("x", "the detector is not usable for this model: no lift over the text"),
        marking.check(IMAGE, CAPTION),
    ]
    labels = ["caption", "context", "image", "other", "no caption", "domain", "gate", ""]
    assert [reason_of(report) for report in reports] == labels


def test_the_key_is_asked_for(marking):
    """In OpenAI's header or LiteLLM's; health and metrics need none."""
    with serving(marking, key=KEY) as address:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer \u00e9"}, {"X-Api-Key": ""}):
            status, _, answered = send(address, "/v1/check", conversation(""), headers)
            assert (status, answered["WWW-Authenticate"]) == (401, "Bearer")
        for headers in ({"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer {KEY}"}, {"X-Api-Key": KEY}):
            assert send(address, "/v1/check", conversation(""), headers)[0] == 200
        assert send(address, "/healthz")[0] == send(address, "/metrics")[0] == 200
        with client(address, KEY) as api, client(address, "wrong") as stranger:
            assert api.models.list().data
            with pytest.raises(openai.AuthenticationError, match="The API key is missing or wrong"):
                stranger.models.list()


# ------------------------------------------------------------------------------------------------------------- limits


def test_requests_and_images_that_are_too_large_are_refused(marking):
    """With a stated length, and without one."""
    with serving(marking, Limits(body_bytes=100_000, pixels=100, seconds=PATIENCE)) as address:
        expected = (413, "The request is larger than 100000 bytes. Send less at once.")
        assert refused(check(address, conversation("x" * 100_000))) == expected
        with connected(address) as wire:
            wire.sendall(b"POST /v1/check HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(3):
                wire.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
            wire.sendall(b"0\r\n\r\n")
            assert wire.recv(100).startswith(b"HTTP/1.1 413")
        _, report = check(address, conversation())
        assert "more pixels than is safe to unpack" in report["reason"]


@contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as wire:
        yield wire


def test_a_slow_caller_is_not_waited_for(marking):
    with serving(marking, Limits(seconds=0.2)) as address, connected(address) as wire:
        wire.sendall(b"POST /v1/check HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert wire.recv(100).startswith(b"HTTP/1.1 408")


def test_beyond_the_most_requests_under_way_all_are_refused(marking):
    """In the form of all errors, before they are read, so that there is an end to what callers take of the memory."""
    with serving(marking, Limits(seconds=PATIENCE, queue=1)) as address, ExitStack() as slow:
        for _ in range(8):
            wire = slow.enter_context(connected(address))
            wire.sendall(b"POST /v1/check HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nExpect: 100-continue\r\n\r\n")
            assert wire.recv(100).startswith(b"HTTP/1.1 100")  # it is being read
        status, answer, headers = send(address, "/v1/check", conversation())
        expected = (503, "8 requests are under way, and no more may. Try again later.", "1")
        assert (status, answer["error"]["message"], headers["Retry-After"]) == expected
        assert send(address, "/healthz")[0] == 200


class SlowGuard(GazeGuard):
    """A guard whose model waits until it is told to go on."""

    def __init__(self, *vlm: Any) -> None:
        super().__init__(*vlm)
        self.started, self.go, self.sizes = threading.Semaphore(0), threading.Event(), []
        self.prepared, prepare = threading.Semaphore(0), self.tracer.prepare

        def noted(*arguments: Any, **options: Any) -> Prepared:
            prepared = prepare(*arguments, **options)
            self.prepared.release()
            return prepared

        self.tracer.prepare = noted

    def check_prepared(self, prepared: Prepared) -> list[Any]:
        self.sizes.append(sum(len(part.captions) for part in prepared.parts))
        self.started.release()
        assert self.go.wait(PATIENCE)
        return super().check_prepared(prepared)


def test_a_full_queue_refuses_and_what_waits_shares_batches(lab_vlm):
    """429 with the seconds to wait; no answer is lost or mixed up, and a stop finishes what waits.

    A full batch is handed over while another one is worked off, prepared meanwhile, and does not wait any more.
    """
    guard = SlowGuard(*lab_vlm)
    captions = [f"There is a {colour} star." for colour in ("red", "green", "blue", "grey", "black")]
    with ThreadPoolExecutor() as callers, serving(guard, Limits(seconds=PATIENCE, queue=7, batch=3)) as address:
        first = callers.submit(check, address, conversation())
        assert guard.started.acquire(timeout=PATIENCE)
        many = {"conversations": [conversation(caption) for caption in captions]}
        answers = [callers.submit(check, address, many)]
        filling = callers.submit(check, address, {"conversations": [conversation()] * 2})
        while (waiting := send(address, "/healthz")[1]["queue"]) != 4:
            assert waiting in (0, 2, 5, 7)
        status, answer, headers = send(address, "/v1/check", {"conversations": [conversation()] * 4})
        assert (status, answer["error"]["message"]) == (429, "4 captions are waiting, and only 7 may. Try again later.")
        assert int(headers["Retry-After"]) >= 1
        assert guard.prepared.acquire(timeout=PATIENCE)
        assert guard.prepared.acquire(timeout=PATIENCE)
        guard.go.set()
        assert [r["caption"] for r in answers[0].result()[1]["reports"]] == captions
        assert {first.result()[0], filling.result()[0]} == {200}
        assert guard.sizes[0] == 1
        assert set(guard.sizes[1:-1]) == {3}


def test_a_time_out_frees_the_worker(lab_vlm):
    """503 within the limit; a caption that is being generated ends with it, whole or as a stream."""
    guard = GazeGuard(*lab_vlm)
    guard.model.generation_config.eos_token_id, ends = None, guard.model.generation_config.eos_token_id
    service = Service(Model(guard), "lab", Limits(seconds=0.3, new_tokens=10**6))
    request = ChatRequest(messages=[question()], max_tokens=10**6, temperature=0)

    async def streamed() -> list[Any]:
        return [piece async for piece in await service.stream(request)]

    try:
        for answer in (service.caption(request), streamed()):
            with pytest.raises(RefusedError, match=r"There was no answer within 0\.3 seconds") as caught:
                asyncio.run(answer)
            assert caught.value.status == 503
        service.queue.close()  # returns when the worker has come to an end
    finally:
        guard.model.generation_config.eos_token_id = ends


# ------------------------------------------------------------------------------------------------------------ process


def test_a_killed_process_of_the_model_is_started_again(tmp_path):
    """What it worked on is refused with 503, what waited is answered; meanwhile /healthz says what is going on."""
    for pipe in ("begun", "go"):
        os.mkfifo(tmp_path / pipe)
    worker = ModelProcess(partial(load_held, tmp_path), 8)
    with ThreadPoolExecutor() as callers, serving(worker) as address:
        under_way = callers.submit(send, address, "/v1/check", {"conversations": [conversation()] * 2})
        (tmp_path / "begun").read_text()
        waiting = callers.submit(check, address, conversation(FALSE))
        while send(address, "/healthz")[1]["queue"] < 1:
            pass
        os.kill(worker.pid, signal.SIGKILL)
        status, answer, headers = under_way.result()
        assert (status, answer["error"]["message"]) == (503, DIED)
        assert int(headers["Retry-After"]) >= 1
        while (health := send(address, "/healthz"))[1]["restarts"] == 0:
            pass
        assert (health[0], health[1]["status"]) == (503, "loading")
        (tmp_path / "go").write_text("")
        assert waiting.result()[1]["verdict"] == "flag"
        assert check(address, conversation())[1]["verdict"] == "pass"
        assert send(address, "/healthz")[:2] == (200, health[1] | {"status": "ok", "queue": 0})
        assert "gazeguard_model_restarts_total 1.0" in send(address, "/metrics")[1]
        asked = {"model": "any", "messages": [question()], "temperature": 0, "max_tokens": 60, "stream": True}
        with client(address) as api:
            *pieces, last = api.chat.completions.create(**asked)
            assert "".join(piece.choices[0].delta.content for piece in pieces) == last.model_extra["gazeguard"]["caption"]
            assert len(pieces) > 5


def test_a_process_that_hangs_is_killed():
    """When nobody waits for its task any more, so that a time-out frees the worker in every case."""
    worker = ModelProcess(Hanging, 8, patience=0)
    first = worker.pid
    try:
        with pytest.raises(RefusedError, match="died over this request"):
            worker.run(Task((Row(IMAGE, "", CAPTION),)), lambda _: True)
        while not worker.ready or worker.pid == first:
            pass
        assert worker.restarts == 1
    finally:
        worker.close()
    with pytest.raises(RefusedError, match="The model is being loaded"):
        worker.run(Task((Row(IMAGE, "", CAPTION),)), lambda _: False)


class DyingModel(Model):
    """A worker that is lost after the first piece of a caption."""

    def run(self, task: Task, stopped: Stopped, deltas: Deltas | None = None) -> Sequence[Any]:
        def last(piece: str) -> None:
            deltas(piece)
            raise RefusedError(503, DIED, 1)

        return super().run(task, stopped, last)


def test_a_stream_whose_model_is_lost_ends_with_an_error(lab_vlm):
    """After the pieces that it has; the client raises it."""
    with serving(DyingModel(GazeGuard(*lab_vlm))) as address, client(address) as api:
        pieces = api.chat.completions.create(model="any", messages=[question()], temperature=0, stream=True)
        assert next(pieces).choices[0].delta.role == "assistant"
        assert next(pieces).choices[0].delta.content
        with pytest.raises(openai.APIError, match="The process of the model died over this request"):
            next(pieces)


@pytest.mark.parametrize(
    ("load", "message"),
    [(load_nothing, "^There is no such model.$"), (die_loading, r"died while it was loaded \(signal SIGKILL\)")],
)
def test_a_model_that_cannot_be_loaded_is_said(load, message):
    with pytest.raises(GazeGuardError, match=message):
        ModelProcess(load, 8)


# -------------------------------------------------------------------------------------------------------------- queue


def test_an_error_of_one_row_is_no_error_of_its_batch():
    """And the worker outlives even what no handler catches."""

    def run(jobs: Sequence[Job]) -> list[Any]:
        if any(job.payload is None for job in jobs):
            raise SystemExit("a bad row")
        return [job.payload * 2 for job in jobs]

    queue, jobs = BatchQueue(8, 8), [Job(run, payload) for payload in (1, None, 3)]
    queue.submit(jobs)
    assert (jobs[0].future.result(PATIENCE), jobs[2].future.result(PATIENCE)) == (2, 6)
    assert isinstance(jobs[1].future.exception(PATIENCE), SystemExit)
    late = Job(run, 5)
    queue.submit([late])
    assert late.future.result(PATIENCE) == 10
    queue.close()
    with pytest.raises(RefusedError, match="The server is stopping"):
        queue.submit([Job(run, 1)])


def test_jobs_that_nobody_waits_for_are_not_run():
    """Jobs of another kind have batches of their own."""
    ran = []

    def note(jobs: Sequence[Job]) -> list[None]:
        ran.append([job.payload for job in jobs])
        return [None for _ in jobs]

    queue, other = BatchQueue(2, 8), lambda jobs: note(jobs)
    jobs = [Job(note, 1), Job(other, 2), Job(note, 3), Job(note, 4), Job(note, 5)]
    jobs[2].cancel()
    queue.submit(jobs)
    queue.close()
    assert sorted(ran) == [[1], [2], [4, 5]]


# ------------------------------------------------------------------------------------------------------------ LiteLLM


def guardrail(address: str, phase: str, **body: Any) -> dict[str, Any]:
    """LiteLLM's request, and the answer."""
    fields = {"input_type": phase, "request_data": {}, "additional_provider_specific_params": {}, "litellm_version": "1.110"}
    status, answer, _ = send(address, "/beta/litellm_basic_guardrail_api", fields | body)
    assert status == 200, answer
    return answer


def test_the_image_of_a_request_is_there_for_its_response(lab_vlm):
    """LiteLLM shows the image before the call alone; the answer is what the policy lets through."""
    guard = GazeGuard(*lab_vlm, policy="drop")
    mixed = f"{CAPTION} {FALSE}"
    filtered = guard.check(IMAGE, mixed).filtered_caption
    assert filtered not in ("", mixed)
    with serving(guard) as address:
        shown = {"images": [question()["content"][0]["image_url"]["url"]], "structured_messages": [question()]}
        assert guardrail(address, "request", litellm_call_id="a", texts=["Describe the picture."], **shown) == {
            "action": "NONE"
        }
        assert guardrail(address, "request", litellm_call_id="b", texts=["Hello."]) == {"action": "NONE"}
        assert guardrail(address, "response", litellm_call_id="a", texts=[CAPTION]) == {"action": "NONE"}
        intervened = {"action": "GUARDRAIL_INTERVENED", "texts": [filtered, CAPTION]}
        assert guardrail(address, "response", litellm_call_id="a", texts=[mixed, CAPTION]) == intervened
        assert guardrail(address, "response", litellm_call_id="b", texts=[FALSE]) == {"action": "NONE"}  # it shows no image


def test_under_abstain_an_answer_that_cannot_be_checked_is_blocked(lab_vlm):
    with serving(GazeGuard(*lab_vlm, policy="abstain")) as address:
        shown = {"images": [question()["content"][0]["image_url"]["url"]], "texts": ["Describe the picture."]}
        guardrail(address, "request", litellm_call_id="a", **shown)
        guardrail(address, "request", litellm_call_id="b", images=["https://example.org/a.png"], texts=["What is it?"])
        guardrail(
            address, "request", litellm_call_id="c", **shown, structured_messages=[question(), *conversation()["messages"]]
        )
        assert guardrail(address, "response", litellm_call_id="a", texts=[CAPTION, ""]) == {"action": "NONE"}
        reasons = {"a": "not supported by the image", "b": "Nothing is fetched", "c": "expected one question", "d": "not known"}
        for call, reason in reasons.items():
            answer = guardrail(address, "response", litellm_call_id=call, texts=[FALSE])
            assert answer["action"] == "BLOCKED"
            assert reason in answer["blocked_reason"]


# ------------------------------------------------------------------------------------------------------------ command


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", "--port", str(port), "--model", "nowhere/at all"])
    assert result.exit_code == 2
    assert f"Port {port} of 127.0.0.1 cannot be taken: Address already in use. Choose others" in result.stderr
    result = CliRunner().invoke(app, ["serve", "--host", "nowhere.invalid", "--model", "nowhere/at all"])
    assert "of nowhere.invalid cannot be taken: " in result.stderr


@pytest.mark.slow
def test_the_command_serves_and_stops_gracefully():
    """`gazeguard serve` with nothing else answers with the lab's model, and SIGTERM ends it after the answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gazeguard", "serve", "--port", str(port)]
    with subprocess.Popen(command, env={**os.environ, "GAZEGUARD_API_KEY": KEY}) as process:
        address = f"http://127.0.0.1:{port}"
        while process.poll() is None:  # a refused connection costs a millisecond: at most the time that loading takes
            try:
                health = send(address, "/healthz")
                break
            except urllib.error.URLError:
                pass
        assert health[1]["model"] == "lab"
        assert send(address, "/v1/check", conversation(), {"X-Api-Key": KEY})[1]["verdict"] == "pass"
        assert send(address, "/v1/check", conversation())[0] == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == -signal.SIGTERM

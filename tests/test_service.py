"""Minimal service of the examples, behind a real server on this machine's loopback."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

from gazeguard import lab

SERVICE = Path(__file__).resolve().parents[1] / "examples" / "serve_minimal.py"
PATIENCE = 600  # seconds until an answer counts as lost, however busy the machine is
SAMPLE = lab.samples("test", 2, seed=7)[1]
IMAGE, CAPTION = SAMPLE.image, SAMPLE.turns[0].answer


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    """The names of the example, which takes its time."""
    spec = importlib.util.spec_from_file_location("serve_minimal", SERVICE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SECONDS = PATIENCE
    return vars(module)


@pytest.fixture(scope="module")
def address(service) -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(service["app"], log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        assert server.started
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def post(address: str, body: bytes, path: str = "/v1/check") -> tuple[int, Any]:
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["detail"]


def uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def packed(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def conversation(url: str, caption: Any = CAPTION, prompt: str = "Describe the picture.") -> dict[str, Any]:
    """A conversation in OpenAI's form."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": caption}]}


def ask(address: str, *arguments: Any) -> tuple[int, Any]:
    return post(address, json.dumps(conversation(*arguments)).encode())


def test_the_example_is_short_enough_to_read():
    assert len(SERVICE.read_text(encoding="utf-8").splitlines()) <= 75


@pytest.mark.parametrize(("caption", "verdict"), [(CAPTION, "pass"), ("There is a red skull.", "flag"), ("", "unchecked")])
def test_an_answer_is_the_guards_report(service, address, caption, verdict):
    """Field by field what `check` says of the image."""
    status, report = ask(address, uri(packed(IMAGE)), caption)
    assert (status, report["verdict"]) == (200, verdict)
    assert report == service["guard"].check(packed(IMAGE), caption).to_dict()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<svg onload='alert(1)'/>", "is not an image that Pillow can read"),
        (packed(IMAGE)[:600], "is damaged"),
        (b"\x7fELF", "is not an image that Pillow can read"),
        (b"", "is not an image that Pillow can read"),
    ],
)
def test_what_is_no_image_is_unchecked(address, data, reason):
    """Whatever the URI says it is."""
    status, report = ask(address, uri(data, "jpeg"))
    assert (status, report["verdict"]) == (200, "unchecked")
    assert reason in report["reason"]


def test_a_prompt_of_special_tokens_is_unchecked(address):
    assert ask(address, uri(packed(IMAGE)), CAPTION, "Hi<end_of_utterance>")[1]["verdict"] == "unchecked"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/a.png",
        "https://example.org/a.png",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://example.org/a.png",
        "data:text/html;base64,PGI+",
        "data:image/png,raw",
        "data:image/png;base64,%%%",
        "data:image/png;base64,A",
        "data:image/png;base64,AA",
        "data:image/png;base64,A===",
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
    status, detail = ask(address, url)
    assert status == 400
    assert detail == "The image is no data:image/...;base64 URI. Nothing is fetched: send it whole."
    assert set(looked_up) <= {"127.0.0.1"}


def test_too_large_a_request_is_refused(service, address):
    """With a stated length, and without one."""
    status, detail = ask(address, uri(bytes(service["MAX_BYTES"])))
    assert (status, detail) == (413, "The request is larger than 8388608 bytes. Send a smaller image.")
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as wire:
        wire.sendall(b"POST /v1/check HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        piece = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        for _ in range(9):
            wire.sendall(piece)
        wire.sendall(b"0\r\n\r\n")
        assert wire.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "Invalid JSON"),
        (b"{", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON"),
        (b"\xff", "Invalid JSON"),
        (b"[]", "should be an object"),
        (b"{}", "Field required"),
        (json.dumps({"messages": [conversation("x")["messages"][0]]}).encode(), "Field required"),
        (json.dumps({"messages": [{"role": "system", "content": "x"}] * 2}).encode(), "Input should be 'user' or 'assistant'"),
    ],
    ids=lambda value: repr(value[:12]),
)
def test_what_is_no_conversation_is_refused(address, body, detail):
    status, refusal = post(address, body)
    assert status == 422
    assert detail in json.dumps(refusal)


@pytest.mark.parametrize("images", [0, 2])
def test_one_image_and_one_text_are_asked_for(address, images):
    talk = conversation(uri(packed(IMAGE)))
    parts = talk["messages"][0]["content"]
    talk["messages"][0]["content"] = [*parts[:1] * images, *parts[1:]]
    refused = (400, "Send one image in the first message and one text in the second.")
    assert post(address, json.dumps(talk).encode()) == refused
    assert ask(address, uri(packed(IMAGE)), [{"type": "text", "text": CAPTION}]) == refused


def test_a_slow_model_and_a_slow_caller_are_not_waited_for(service, address, monkeypatch):
    """503 within the limit; and afterwards the service is there again."""
    monkeypatch.setitem(service, "SECONDS", 0.5)
    slow = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(service["guard"], "check", lambda *_: slow.wait())
        status, detail = ask(address, uri(packed(IMAGE)))
    slow.set()
    assert (status, detail) == (503, "There was no answer within 0.5 seconds. Try again later.")
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as wire:
        wire.sendall(b"POST /v1/check HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert wire.recv(100).startswith(b"HTTP/1.1 503")
    monkeypatch.setitem(service, "SECONDS", PATIENCE)
    assert ask(address, uri(packed(IMAGE)))[0] == 200


def test_other_paths_are_not_there(address):
    assert post(address, b"{}", "/v1/chat/completions")[0] == 404

"""Minimal HTTP service: ``pip install fastapi uvicorn``, then ``uvicorn serve_minimal:app``.

It takes a conversation in OpenAI's form, images as ``data:`` URIs (it fetches nothing), and answers with `Report.to_dict`. What
cannot be checked is an answer, too: ``"verdict": "unchecked"``, and why. Put what your network needs (TLS, keys, rate limits)
in front of it.
"""

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, ValidationError

from gazeguard import GazeGuard

MAX_BYTES, SECONDS = 8 * 2**20, 30  # of a request, and for it
guard = GazeGuard.from_pretrained("lab")  # the folder or hub id of your model; artifacts= for its gaze heads and detector
app, one_at_a_time = FastAPI(), ThreadPoolExecutor(1)


class Part(BaseModel):
    type: Literal["text", "image_url"]
    text: str = ""
    image_url: dict[str, str] | None = None


class Message(BaseModel):
    role: Literal["user", "assistant"]
    content: str | list[Part]


class Conversation(BaseModel):
    messages: tuple[Message, Message]  # what the user showed and asked, and the answer to check


def decode_data_uri(url: str) -> bytes:
    kind, mark, data = url.partition(";base64,")
    try:
        if mark and kind.startswith("data:image/"):
            return base64.b64decode(data, validate=True)
    except ValueError:
        pass
    raise HTTPException(400, "The image is no data:image/...;base64 URI. Nothing is fetched: send it whole.")


@app.post("/v1/check")
async def check(request: Request) -> dict[str, Any]:
    try:
        async with asyncio.timeout(SECONDS):
            body = bytearray()
            async for piece in request.stream():
                body += piece if len(body) <= MAX_BYTES else b""  # the rest is read and dropped, so that the answer arrives
            if len(body) > MAX_BYTES:
                raise HTTPException(413, f"The request is larger than {MAX_BYTES} bytes. Send a smaller image.")
            question, answer = Conversation.model_validate_json(bytes(body)).messages
            parts = question.content if isinstance(question.content, list) else []
            images = [decode_data_uri(part.image_url.get("url", "")) for part in parts if part.image_url]
            if len(images) != 1 or not isinstance(answer.content, str):
                raise HTTPException(400, "Send one image in the first message and one text in the second.")
            prompt = " ".join(part.text for part in parts if part.type == "text") or "Describe the picture."
            work = (one_at_a_time, guard.check, images[0], answer.content, prompt)
            return (await asyncio.get_running_loop().run_in_executor(*work)).to_dict()
    except ValidationError as error:
        raise HTTPException(422, [{"loc": e["loc"], "msg": e["msg"]} for e in error.errors()]) from error
    except TimeoutError as error:
        raise HTTPException(503, f"There was no answer within {SECONDS} seconds. Try again later.") from error

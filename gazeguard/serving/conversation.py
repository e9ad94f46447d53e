"""Conversations in OpenAI's form, read as the guard takes them: one image, one prompt, one answer."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import NamedTuple

from gazeguard.errors import InputError
from gazeguard.prompts import DEFAULT_PROMPT
from gazeguard.serving.contracts import Message

INSTRUCTIONS = ("system", "developer")


class Question(NamedTuple):
    """An image as its file's bytes, and the prompt: what the user asked, behind the instructions if there are any."""

    image: bytes
    prompt: str


class Exchange(NamedTuple):
    """A question, and the answer to check."""

    question: Question
    answer: str


def decode_data_uri(url: str) -> bytes:
    """The bytes of a ``data:image/...;base64,`` URI; raises `InputError` for any other address: nothing is fetched."""
    kind, mark, data = url.partition(";base64,")
    try:
        if mark and kind.startswith("data:image/"):
            return base64.b64decode(data, validate=True)
    except ValueError:
        pass
    raise InputError("The image is no data:image/...;base64 URI. Nothing is fetched: send it whole.")


def read_question(messages: Sequence[Message]) -> Question:
    """The question of a conversation that ends with it.

    Raises:
        InputError: There is not one image, or not one question. Nothing says what a model that saw earlier turns would have
            attended to, so they are refused and not left out.
    """
    turns = [message for message in messages if message.role not in INSTRUCTIONS]
    if len(turns) != 1 or turns[0].role != "user":
        roles = ", ".join(message.role for message in messages)
        raise InputError(
            f"The messages are of: {roles}; expected one question of the user, with instructions (system, developer) or "
            "without. Earlier turns are not replayed: leave them out."
        )
    images = [url for message in messages for url in message.images]
    if len(images) != 1:
        raise InputError(f"The conversation has {len(images)} images; expected one, as an image_url in the question.")
    texts = [message.text.strip() for message in messages if message.role in INSTRUCTIONS]
    prompt = "\n\n".join(text for text in (*texts, turns[0].text.strip() or DEFAULT_PROMPT) if text)
    return Question(decode_data_uri(images[0]), prompt)


def read_exchange(messages: Sequence[Message]) -> Exchange:
    """The question and the answer of a conversation; raises `InputError` as `read_question` does."""
    if messages[-1].role != "assistant" or messages[-1].images:
        raise InputError(
            f"The last message is of {messages[-1].role!r}; expected the answer to check, a text of 'assistant' behind the "
            "question."
        )
    return Exchange(read_question(messages[:-1]), messages[-1].text)

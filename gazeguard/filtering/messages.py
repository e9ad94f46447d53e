"""Rows that are conversations, as in OpenAI's batch and chat files: the image, the question, and the caption that answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """What a conversation says of one image.

    Attributes:
        image: A path, a data: URI or a URL; None where there is none.
        caption: The last answer; None where there is none.
        prompt: The words of the last question; None where there are none.
        error: Why the row cannot be used; empty for a good one.
    """

    image: Any = None
    caption: Any = None
    prompt: str | None = None
    error: str = ""


def find_messages(fields: Mapping[str, Any]) -> list[Any] | None:
    """Return the messages of a row: under ``messages``, or in the ``body`` of a request; None where there are none."""
    body = fields.get("body")
    for place in (fields, body if isinstance(body, Mapping) else {}):
        if isinstance(messages := place.get("messages"), list) and messages:
            return messages
    return None


def read_conversation(messages: list[Any]) -> Conversation:
    """Read a conversation about one image.

    Args:
        messages: ``{"role", "content"}`` each; the content is text, or a list of parts ``{"type": "text" | "image_url" |
            "image", ...}``.
    """
    images, prompt, caption = [], None, None
    for message in messages:
        role, parts = _parts(message)
        text = "\n".join(part["text"] for part in parts if isinstance(part.get("text"), str))
        images += [image for part in parts if (image := _image(part)) is not None]
        if role == "user":
            prompt, caption = text or None, None
        elif role == "assistant":
            caption = text or None
    error = ""
    if len(images) != 1:
        error = f"the row has {len(images)} images: which one the caption describes is not known" if images else ""
        error = error or "there is no image in the messages"
    return Conversation(images[0] if len(images) == 1 else None, caption, prompt, error)


def _parts(message: Any) -> tuple[str, list[Mapping[str, Any]]]:
    """The role of a message, and what it is made of."""
    if not isinstance(message, Mapping):
        return "", []
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return str(message.get("role")), list(_mappings(content)) if isinstance(content, list) else []


def _mappings(parts: list[Any]) -> Iterator[Mapping[str, Any]]:
    return (part for part in parts if isinstance(part, Mapping))


def _image(part: Mapping[str, Any]) -> Any:
    """The image of a part; None for another part."""
    for name in ("image_url", "input_image", "image"):
        value = part.get(name)
        if value is not None:
            return value.get("url") if isinstance(value, Mapping) and "url" in value else value
    return None

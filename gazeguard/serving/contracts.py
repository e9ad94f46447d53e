"""Schemas of what the server takes: OpenAI's conversations and chat completions, LiteLLM's Generic Guardrail requests."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from gazeguard.serving.limits import MAX_CONVERSATIONS

MAX_MESSAGES, MAX_PARTS, MAX_NAME = 64, 64, 256
# What clients send although it asks for nothing; null does not, either.
NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "parallel_tool_calls": True, "store": False}
# A red square of 16 x 16 pixels, so that the examples of /docs can be sent as they are.
EXAMPLE_IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAF0lEQVR4nGM8wUAaYCJR/aiGUQ1DSAMAl+YA6LJqoPkAAAAASUVO"
    "RK5CYII="
)
_QUESTION = {
    "role": "user",
    "content": [
        {"type": "image_url", "image_url": {"url": EXAMPLE_IMAGE}},
        {"type": "text", "text": "Describe the picture."},
    ],
}
_CONVERSATION = {"messages": [_QUESTION, {"role": "assistant", "content": "There is a red square."}]}


def _examples(*values: dict[str, Any]) -> ConfigDict:
    return ConfigDict(extra="forbid", json_schema_extra={"examples": list(values)})


class TextPart(BaseModel):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    """An image as a ``data:image/...;base64,`` URI. Nothing is fetched."""

    url: str


class ImagePart(BaseModel):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    """One message of a conversation, as OpenAI's clients write and read it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS)]

    @property
    def text(self) -> str:
        """The message's text, its parts joined by line breaks."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[str]:
        """The URIs of the message's images."""
        return [] if isinstance(self.content, str) else [p.image_url.url for p in self.content if isinstance(p, ImagePart)]


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class Conversation(BaseModel):
    """A conversation to check: instructions if there are any, one question with its image, and the answer to it."""

    model_config = _examples(_CONVERSATION)

    messages: Messages


class Conversations(BaseModel):
    """Several conversations to check, which share batches."""

    model_config = _examples({"conversations": [_CONVERSATION]})

    conversations: Annotated[list[Conversation], Field(min_length=1, max_length=MAX_CONVERSATIONS)]


def _one_or_several(body: Any) -> str:
    several = "conversations" in body if isinstance(body, dict) else isinstance(body, Conversations)
    return "several" if several else "one"


CheckRequest = Annotated[
    Annotated[Conversation, Tag("one")] | Annotated[Conversations, Tag("several")], Discriminator(_one_or_several)
]


class StreamOptions(BaseModel):
    """What a stream brings along."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request for a guarded caption, as OpenAI's chat completions take it; what is not listed here is refused.

    ``model`` and ``user`` are taken and not used: a server has one model. Options that are null, or of a value that asks for
    nothing (``NEUTRAL``), are as good as absent.
    """

    model_config = _examples({"messages": [_QUESTION], "max_tokens": 64, "temperature": 0})

    messages: Messages
    model: str = Field(default="", max_length=MAX_NAME)
    user: str | None = Field(default=None, max_length=MAX_NAME)
    n: Literal[1] = 1
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None and value != NEUTRAL.get(name, ...)}


class GuardrailRequest(BaseModel):
    """What LiteLLM sends of a call, before the model ("request") and after it ("response"). Other fields are not read.

    Attributes:
        input_type: The phase.
        texts: The texts of the messages, or of the answers.
        images: The images of the messages; absent in the phase of the response.
        structured_messages: The messages; absent in the phase of the response.
        litellm_call_id: The call; both phases have the same.
    """

    input_type: Literal["request", "response"]
    texts: Annotated[list[str], Field(max_length=MAX_CONVERSATIONS * MAX_PARTS)] | None = None
    images: Annotated[list[str], Field(max_length=MAX_CONVERSATIONS)] | None = None
    structured_messages: list[dict[str, Any]] | None = None
    litellm_call_id: str | None = Field(default=None, max_length=MAX_NAME)

"""Responses that are no captions: refusals, placeholders, error texts and special tokens, by the table ``responses.txt``.

Crawled alt texts, APIs and chat models leave them where a caption was wanted. None states anything about the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files

REASONS = {
    "refusal": "refusal",
    "placeholder": "placeholder",
    "error": "error text",
    "special": "special token",
}

# How the alternatives of a section are joined: those of a whole text, and those that begin a sentence.
_WHOLE_TEXT = {"special": r"(?:\s*(?:%s))+\s*", "placeholder": r"\W{0,20}(?:%s)\W*", "error": r"\W{0,20}(?:%s)"}
_THANKS = r"thank(?:s| you)(?: for [^,.!?]{0,40})?"
_INTERJECTION = rf"(?:(?:hm+|oh|oops|well|uhm?|um+|hello|hi|hey|okay|ok|sure|{_THANKS})\W+(?:but |however\W+)?)?"
_SENTENCE_START = rf"\W*{_INTERJECTION}(?:%s)"

_STATES = re.compile(
    r"\b(?:but|however)\b,?\s+(?:(?:what\s+)?(?:i|we)\s+(?:can|do|could|see)\b(?!\s?n[o'\u2019]|['\u2019])|there\b|the\b|it\b|an?\b)",
    re.IGNORECASE,
)
_MAY_REFUSE = re.compile(
    r"\b(?:i|we|ai|sorry|apolog\w+|unfortunately|regrettably|unable|cannot|can['\u2019]?t|not able|please|kindly|you|no"
    r"|violates?|load|failed|could not|not|rejected|blocked|filtered|flagged|refused|denied|withheld|terminated|interrupted"
    r"|issues?|problems?|errors?)\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?:[^.!?\n]|\.(?=\w))+[.!?]*")


@cache
def _sections() -> dict[str, str]:
    """The alternatives of each section of the table; a section may name those before it, as ``(<name>)``."""
    sections: dict[str, list[str]] = {}
    text = (files("gazeguard.claims") / "data" / "responses.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            current = sections[header[1]] = []
        elif line and not line.startswith("# "):
            current.append(re.sub(r"\(<(\w+)>\)", lambda name: f"(?:{'|'.join(sections[name[1]])})", line))
    return {name: "|".join(alternatives) for name, alternatives in sections.items()}


@cache
def _whole_text() -> dict[str, re.Pattern[str]]:
    return {k: re.compile(shape % _sections()[k], re.IGNORECASE | re.DOTALL) for k, shape in _WHOLE_TEXT.items()}


@cache
def _refusal() -> re.Pattern[str]:
    return re.compile(_SENTENCE_START % _sections()["refusal"], re.IGNORECASE)


def whole_response(text: str) -> str | None:
    """The kind of response that a whole text is (a key of `REASONS`); None where it may be a caption."""
    return next((kind for kind, pattern in _whole_text().items() if pattern.fullmatch(text.strip())), None)


def refusals(text: str) -> Iterator[tuple[int, int]]:
    """The sentences of a text that refuse to describe the image, as characters, end exclusive.

    One that goes on to state something ("I can't see its face, but there is a dog") is none.
    """
    if not _MAY_REFUSE.search(text):
        return
    for match in _SENTENCE.finditer(text):
        if _refusal().match(match[0]) and not _STATES.search(match[0]):
            yield match.span()

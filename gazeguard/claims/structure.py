"""Structure of a caption: which characters are statements about the image, and which are markup, reasoning or talk.

Every part has a kind and, where it is not judged, the reason. `masked` gives a text of the same length in which what is not
judged is blank, so that offsets stay those of the caption.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from gazeguard.claims import responses

STOP, QUOTE = "\x01", "\x02"  # in a masked text: the end of a sentence; a character of quoted text

REASONS = {
    "reasoning": "reasoning before the answer",
    "code": "code",
    "json": "syntax of a JSON answer",
    "tag": "grounding tag",
    "table": "table",
    "heading": "heading",
    "markup": "Markdown syntax",
    "link": "address",
    "quote": "quoted text",
    "offer": "addressed to the user",
    "language": "another language",
    "label": "label of a topic",
    "hedge": "hedged: the caption does not assert it",
    "negation": "said to be absent",
    **responses.REASONS,
}

_REASONING = re.compile(
    r"(?:<\s*(?P<name>think|thinking|reasoning|reflection|analysis)\s*>|\u25c1think\u25b7).*?(?:</\s*(?:think|thinking|reasoning"
    r"|reflection|analysis)\s*>|\u25c1/think\u25b7|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_REASONING_END = re.compile(
    r"\A.*(?:</\s*(?:think|thinking|reasoning|reflection)\s*>|\u25c1/think\u25b7)", re.DOTALL | re.IGNORECASE
)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[^\n]*\n(?P<body>.*?)(?:^[ \t]*(?:```|~~~)[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_TAG = re.compile(
    r"<(?P<pair>box|bbox|quad|point|points|poly)\b[^<>]{0,200}>[^<>]{0,300}</(?P=pair)>"
    r"|<\|[A-Za-z_]{1,40}\|>|(?P<place><(?:loc|seg)_?\d{1,5}>)|</?[A-Za-z][\w|:.-]{0,40}(?:\s[^<>\n]{0,200})?/?>"
    r"|\[{1,3}\s*-?\d+(?:\.\d+)?(?:\s*,\s*-?\d+(?:\.\d+)?){1,7}\s*\]{0,3}(?:\s*,\s*\[\s*-?\d[^\[\]\n]{0,80}\]){0,20}\]{0,2}"
    r"|\(\s*\d+(?:\.\d+)?\s*,\s*\d+(?:\.\d+)?\s*\)(?:\s*,\s*\(\s*\d+(?:\.\d+)?\s*,\s*\d+(?:\.\d+)?\s*\))*"
)
_LINK = re.compile(r"!?\[(?P<label>[^\[\]\n]{0,200})\]\([^()\s]{1,500}\)|https?://\S{1,500}")
_HEADING = re.compile(
    r"^[ \t]*(?:#{1,6}[ \t]+[^\n]*|\*\*[^*\n]{1,120}\*\*[ \t]*:?[ \t]*|__[^_\n]{1,120}__[ \t]*:?[ \t]*)$", re.MULTILINE
)
_TABLE = re.compile(r"^[ \t]*\|[^\n]*\|[ \t]*$(?:\n[ \t]*\|[^\n]*\|[ \t]*$)*", re.MULTILINE)
_RULE = re.compile(r"^[ \t]*(?:[-*_=][ \t]*){3,}$", re.MULTILINE)
_MARK = re.compile(
    r"\*{1,3}|(?<!\w)_{1,3}(?=\w)|(?<=\w)_{1,3}(?!\w)|`+|^[ \t]*>+[ \t]?|^[ \t]*#{1,6}(?=[ \t])|~~", re.MULTILINE
)
_BULLET = re.compile(r"^[ \t]*(?:[-+*\u2022\u25cf\u25aa\u2013\u2014]|\(?\d{1,3}[.)]|\(?[a-z]\))(?=[ \t])", re.MULTILINE)
_LABEL = re.compile(r"\*\*(?P<inside>[^*\n]{1,80}?):\*\*|\*\*(?P<before>[^*\n]{1,80}?)\*\*[ \t]*:(?=\s|$)")
_QUOTES = re.compile(
    r"\u201c[^\u201c\u201d\n]{1,300}\u201d|\"[^\"\n]{1,300}\"|\u2018[^\u2018\u2019\n]{1,200}\u2019(?!\w)"
    r"|(?<![\w])'(?=\S)[^'\n]{0,200}(?:(?<=\w)'(?=\w)[^'\n]{0,200}){0,4}(?<=\S)'(?!\w)"
)
_CAPITALS = re.compile(r"(?<=\s)[A-Z0-9][A-Z0-9&'!?.-]*[A-Z0-9!?](?:[ ][A-Z0-9][A-Z0-9&'!?-]*)*")
_SAYS = re.compile(
    r"\b(?:reads?|reading|says?|saying|spells?|spelling|spelled|labell?ed|titled|named|inscribed|words?|letters|text|marked)"
    r"[ :,]+\Z"
)
_SENTENCE = re.compile(r"[^.!?\n\x01]*[.!?]*[\"\u201d')*]*")

_OFFER = re.compile(
    r"\A\W*(?:"
    r"(?:would|do|shall|should|could|can|may|did|are|were|have|is)\s+(?:you|i|we)\b"
    r"|(?:is|are)\s+there\s+(?:anything|something|any)\b|(?:what|which|how|who|where|why)\b[^.]*\?"
    r"|(?:please\s+)?(?:let\s+me\s+know|feel\s+free|tell\s+me|don'?t\s+hesitate)\b"
    r"|(?:sure|certainly|of\s+course|absolutely|okay|ok|alright|great|hello|hi|thanks|thank\s+you|sorry|i'?m\s+sorry)\b\s*[,!.:]"
    r"|here(?:'s|\u2019s|\s+is|\s+are)\s+(?:an?|the|my|some|your)\b[^.\n]*\b(?:description|caption|breakdown|summary|analysis|overview|list"
    r"|details?|explanation|interpretation|answer|response|translation|version|observations?)\b"
    r"|i(?:\s+can(?!\s+(?:(?:also|clearly|only)\s+)?(?:see|spot|make\s+out)\b)|\s+could|\s+will|'ll|\u2019ll|'d|\u2019d|\s+would|\s+am|'m|\u2019m|\s+hope|\s+think|\s+believe|\s+cannot|\s+can'?t)\b"
    r"|(?:if\s+you(?:'d|\u2019d)?\b|to\s+help\s+(?:me|you)\b|hope\s+this\b)"
    r"|(?:note|disclaimer)\s*:"
    r")",
    re.IGNORECASE,
)
_TO_USER = re.compile(
    r"\b(?:would\s+you\s+like|do\s+you\s+want|let\s+me\s+know|shall\s+i|want\s+me\s+to|feel\s+free)\b", re.IGNORECASE
)
_ADDRESS = re.compile(r"\b(?:you|your|me|i)\b", re.IGNORECASE)
_CODE_LINE = re.compile(
    r"^(?=[^\n]*[;{}()=])[ \t]*(?:def |class |import |from \w+ import|return\b|for \(|if \(|var |let |const |function\b|print\("
    r"|#include|public |<\?php|[\w.]+\([^)\n]*\);?$|[\w.\[\]]+ = ).*$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a caption and whether it is judged: ``caption[start:end] == text``.

    kind:   "statement", or what it is instead: see `REASONS`, and "language", "hedge", "negation" of the parser
    reason: why it is not judged; None where it is
    """

    start: int
    end: int
    text: str
    kind: str
    reason: str | None = None


class Mask:
    """A caption in which what is not judged is blanked, of the same length; every blank is remembered with its kind."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.chars = list(text)
        self.spans: list[tuple[int, int, str]] = []
        self.labels: list[tuple[int, int]] = []

    def blank(self, start: int, end: int, kind: str, fill: str = " ") -> None:
        """Blank ``start`` to ``end``; a STOP as ``fill`` ends the sentence there."""
        if start >= end:
            return
        self.spans.append((start, end, kind))
        self.chars[start:end] = (STOP if fill == STOP else fill) + (" " if fill == STOP else fill) * (end - start - 1)

    def __str__(self) -> str:
        return "".join(self.chars)


def mask(text: str) -> Mask:
    """The caption with everything blanked that states nothing about the image."""
    result = Mask(text)
    if kind := responses.whole_response(text):
        result.blank(0, len(text), kind, STOP)
        return result
    plain = text.isascii() and not _SPECIAL.search(text)
    if not plain:
        for step in (_reasoning, _json, _blocks, _inline, _quotes):
            step(result)
    for start, end in responses.refusals(str(result)):
        result.blank(start, end, "refusal", STOP)
    if plain is False or "?" in text or _OFFER_WORD.search(text):
        _offers(result)
    return result


_SPECIAL = re.compile(r"[*_`#<>\[\]{}|~\"\\]|(?<!\w)'|^[ \t]*[-+]|https?:|[A-Z]{3}", re.MULTILINE)
_OFFER_WORD = re.compile(r"\b(?:you|me|I|[Ss]ure|[Oo]kay|Here)\b")


def _reasoning(result: Mask) -> None:
    for match in _REASONING.finditer(result.text):
        result.blank(*match.span(), "reasoning", STOP)
    if end := _REASONING_END.search(str(result)):
        result.blank(*end.span(), "reasoning", STOP)


def _json(result: Mask) -> None:
    """Keys and syntax of JSON answers go; strings that are values stay, each a sentence of its own."""
    decoder, at, tries = json.JSONDecoder(), 0, 0
    text = str(result)
    while tries < 20 and (match := re.compile(r"[\[{]\s*[\[{\"]").search(text, at)):
        tries += 1
        try:
            _, end = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            at = match.start() + 1
            continue
        at = match.start()
        for value in _values(text, match.start(), end):
            result.blank(at, value[0], "json", STOP)
            at = value[1]
        result.blank(at, end, "json", STOP)
        at = end


_STRING = re.compile(r"\"(?:[^\"\\\n]|\\.)*+\"(?P<key>\s*:)?")


def _values(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    for match in _STRING.finditer(text, start, end):
        first, last = match.start() + 1, match.end() - 1
        if not match["key"] and re.search(r"[^\W\d]", text[first:last]) and "\\" not in text[first:last]:
            yield first, last


def _blocks(result: Mask) -> None:
    for match in _FENCE.finditer(str(result)):
        if STOP in match[0]:  # a JSON answer between the fences: its values stay
            result.blank(match.start(), match.start("body"), "markup", STOP)
            continue
        result.blank(*match.span(), "code", STOP)
    for pattern, kind in ((_TABLE, "table"), (_RULE, "markup"), (_HEADING, "heading"), (_CODE_LINE, "code")):
        for match in pattern.finditer(str(result)):
            if match[0].strip():
                result.blank(*match.span(), kind, STOP)


def _inline(result: Mask) -> None:
    for match in _LINK.finditer(str(result)):
        if match["label"] is None:
            result.blank(*match.span(), "link")
        else:
            result.blank(match.start(), match.start("label"), "markup")
            result.blank(match.end("label"), match.end(), "link")
    for match in _TAG.finditer(str(result)):
        result.blank(*match.span(), "tag", STOP if match["place"] else " ")
    for match in _BULLET.finditer(str(result)):
        result.blank(*match.span(), "markup", STOP)
    for match in _LABEL.finditer(str(result)):
        group = "inside" if match["inside"] is not None else "before"
        result.blank(match.start(), match.start(group), "markup", STOP)
        result.blank(match.end(group), match.end(), "markup")
        result.chars[match.end(group)] = ":"
        result.labels.append(match.span(group))
    for match in _MARK.finditer(str(result)):
        result.blank(*match.span(), "markup")


def _quotes(result: Mask) -> None:
    for match in _QUOTES.finditer(str(result)):
        result.blank(match.start(), match.end(), "quote", QUOTE)
    for match in _CAPITALS.finditer(str(result)):
        if _SAYS.search(result.text[: match.start()].lower()[-40:]):
            result.blank(*match.span(), "quote", QUOTE)


def _offers(result: Mask) -> None:
    for match in _SENTENCE.finditer(str(result)):
        sentence = match[0]
        if not sentence.strip():
            continue
        question = sentence.rstrip().endswith("?")
        if _OFFER.match(sentence) or _TO_USER.search(sentence) or (question and _ADDRESS.search(sentence)):
            result.blank(*match.span(), "offer", STOP)

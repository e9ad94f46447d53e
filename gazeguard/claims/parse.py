"""Parser of English captions: one text to one `Caption` value, which says what is claimed, and of what is not judged, why.

The steps, each a module of its own: `structure` blanks what states nothing about the image (Markdown, reasoning, offers, tags,
JSON syntax, quoted text), `language` refuses sentences in another language, `tagger` (or spaCy) gives each word its class,
`phrases` finds object phrases and locations, `statements` negation, hedges, predicative attributes and relations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from gazeguard.claims import responses, tagger
from gazeguard.claims.phrases import Phrase, Reading, Span, Tagger, Token, read
from gazeguard.claims.statements import Action, Predicate, Relation, Statements, unjudged
from gazeguard.claims.structure import REASONS, STOP, Mask, Part, mask
from gazeguard.claims.vocabulary import MEANINGS, TOPICS

Kind = Literal["object", "attribute", "location"]  # what detectors are fitted on
ClaimKind = Literal[Kind, "count", "relation"]
ClaimedKind = Literal[ClaimKind, "action"]  # all that a caption can claim
JUDGED: tuple[str, ...] = get_args(Kind)  # counts and relations are read, but no detector knows them yet
Parser = Callable[[str], Any]  # a spaCy pipeline: text to Doc

# Parts that are no part of a sentence.
_WHOLE = frozenset(("reasoning", "code", "table", "heading", "offer", "language", "json", *responses.REASONS))


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim of a caption about the image, true or false: ``caption[start:end] == text`` are the words to blame.

    Attributes:
        kind: "object": such an object is there; "attribute": it is red, small; "location": it is where the caption says;
            "count": there are that many; "relation": it is related to a second object as the caption says.
        phrase: The object that it is about.
        span: The words with which it is decided: the head noun, the attribute, the number, the second object, or whatever of
            object and location comes last.
        related: The words that have to agree with them: the head noun of an attribute or a count, the first object of a
            relation, of object and location the one that comes first; None for objects.
    """

    kind: ClaimKind
    start: int
    end: int
    text: str
    phrase: Phrase
    span: Span
    related: Span | None

    def __str__(self) -> str:
        """The object phrase for an object; for the others "red (a red star)", "in panel two (a red star)"."""
        if self.kind == "object":
            return self.text
        words = self.related if self.kind == "location" and self.span == self.phrase.head and self.related else self.span
        return f"{self.text if self.kind == 'relation' else words.text} ({self.phrase.text})"


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of a caption; ``reason`` says why it is not judged, None where it is."""

    start: int
    end: int
    text: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Caption:
    """A parsed caption.

    Attributes:
        text: The caption.
        parts: What the text consists of, in its order, without gaps: statements, and everything that is not judged with the
        reason. sentences: The sentences that have words, in order.
        phrases: The judged objects and locations, in order.
        claims: What is claimed, object by object.
        actions: Verbs with their subjects. No detector judges them.
        reading: The words and their classes, as the parser read them.
    """

    text: str
    parts: tuple[Part, ...]
    sentences: tuple[Sentence, ...]
    phrases: tuple[Phrase, ...]
    claims: tuple[Claim, ...]
    actions: tuple[Action, ...]
    reading: Reading

    @property
    def objects(self) -> tuple[Phrase, ...]:
        """The object phrases."""
        return tuple(phrase for phrase in self.phrases if phrase.kind == "object")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of claims that the caption makes, in the order of `ClaimedKind`."""
        claimed = {claim.kind for claim in self.claims} | ({"action"} if self.actions else set())
        return tuple(kind for kind in get_args(ClaimedKind) if kind in claimed)

    @property
    def reason(self) -> str | None:
        """Why nothing of the caption is judged; None if something is, or if it has no words."""
        judged = any(sentence.reason is None for sentence in self.sentences)
        return None if judged or not self.sentences else self.response or self.sentences[0].reason

    @property
    def response(self) -> str | None:
        """What the text is in place of a caption, a value of `responses.REASONS` ("refusal"); None if it is one."""
        reasons = [sentence.reason for sentence in self.sentences]
        return None if None in reasons else next((r for r in reasons if r in responses.REASONS.values()), None)


def parse(text: str, nlp: Parser | None = None, *, nouns: Iterable[str] = ()) -> Caption:
    """Read a caption.

    Args:
        text: The caption, as the model wrote it.
        nlp: A spaCy pipeline for the classes of words; None takes the tagger of this package.
        nouns: Nouns that are objects although the rules take them for abstract ("radiation").
    """
    masked = mask(text)
    reading = read(text, str(masked), _tag if nlp is None else _from_spacy(nlp), frozenset(noun.lower() for noun in nouns))
    silent = unjudged(reading) | _topics(reading, masked)
    statements = Statements(reading, silent)
    phrases = tuple(unit.phrase for i, unit in enumerate(reading.units) if unit.phrase and i not in silent)
    claims = _claims(text, phrases, tuple(statements.predicates()), tuple(statements.relations()))
    parts = _parts(reading, masked, silent)
    return Caption(text, parts, _sentences(reading, parts), phrases, claims, tuple(statements.actions()), reading)


def _topics(reading: Reading, masked: Mask) -> dict[int, str]:
    """The units that are a topic's name in a label: "**Clothing:**"."""
    if not masked.labels:
        return {}
    return {
        i: "label"
        for i, unit in enumerate(reading.units)
        if unit.phrase and unit.phrase.head.text.lower() in TOPICS
        for start, end in masked.labels
        if start <= unit.phrase.start and unit.phrase.end <= end
    }


def _parts(reading: Reading, masked: Mask, silent: dict[int, str]) -> tuple[Part, ...]:
    """The caption cut where what is judged begins and ends; white space goes with what is before it."""
    text = reading.text
    marks = [(start, end, kind, REASONS[kind]) for start, end, kind in masked.spans]
    marks += [(start, end, "language", reason) for start, end, reason in reading.refused]
    for i, kind in silent.items():
        if (phrase := reading.units[i].phrase) is not None:
            marks.append((phrase.start, phrase.end, kind, REASONS[kind]))
    parts: list[Part] = []
    at = 0
    for start, end, kind, reason in sorted(marks):
        if start > at and (re.search(r"\w", text[at:start]) or not parts):
            parts.append(Part(at, start, text[at:start], "statement"))
        elif start > at:
            last = parts.pop()
            parts.append(replace(last, end=start, text=text[last.start : start]))
        if end > max(at, start):
            parts.append(Part(max(at, start), end, text[max(at, start) : end], kind, reason))
        at = max(at, end)
    if at < len(text):
        parts.append(Part(at, len(text), text[at:], "statement"))
    return tuple(parts)


def _sentences(reading: Reading, parts: Sequence[Part]) -> tuple[Sentence, ...]:
    """The sentences that have words, and those that are not judged as a whole."""
    bounds: dict[int, tuple[int, int]] = {}
    for token, number, letter in zip(reading.tokens, reading.sentences, reading.letters, strict=True):
        if token.word == STOP and number not in bounds:
            continue  # it ends what is blanked, and begins no sentence
        start, end = bounds.get(number, (token.start, token.start))
        if letter not in ".," or (letter == "." and token.start - end < 2):
            bounds[number] = (start, token.end)
    result = [
        Sentence(start, end, reading.text[start:end])
        for start, end in bounds.values()
        if re.search(r"\w", reading.text[start:end])
    ]
    result += [
        Sentence(part.start, part.end, part.text, part.reason)
        for part in parts
        if part.kind in _WHOLE and re.search(r"\w", part.text)
    ]
    return tuple(sorted(result, key=lambda sentence: sentence.start))


def _tag(masked: str, tokens: Sequence[Token]) -> list[str]:
    return tagger.tag([token.word for token in tokens], [token.letter for token in tokens])


_SPACY = {
    "NN": "N", "NNS": "N", "NNP": "N", "NNPS": "N", "JJ": "a", "JJR": "a", "JJS": "a", "RB": "r", "RBR": "r", "RBS": "r",
    "VBZ": "v", "VBP": "v", "VB": "v", "VBD": "e", "VBN": "e", "VBG": "g", "FW": "N", "CD": "n",
    "NOUN": "N", "PROPN": "N", "ADJ": "a", "ADV": "r", "VERB": "v",
}  # fmt: skip


def _from_spacy(nlp: Parser) -> Tagger:
    """The classes that a spaCy pipeline gives; those of function words stay ours."""

    def classify(masked: str, tokens: Sequence[Token]) -> list[str]:
        tags = {}
        for token in nlp(masked.translate({1: ".", 2: "x"})):
            for offset in range(token.idx, token.idx + len(token)):
                tags[offset] = _SPACY.get(token.tag_ or token.pos_, "r")
        return [token.letter or tags.get(token.end - 1, "N") for token in tokens]

    return classify


def _claims(
    text: str, phrases: Sequence[Phrase], predicates: Sequence[Predicate], relations: Sequence[Relation]
) -> tuple[Claim, ...]:
    """Object by object: that it is there, its attributes, where it is, how many there are, what it is related to.

    The location of an object is the location phrase right behind it, else the last one before.
    """
    result: list[Claim] = []
    for i, phrase in enumerate(phrases):
        if phrase.kind == "location":
            continue
        result.append(Claim("object", phrase.start, phrase.end, phrase.text, phrase, phrase.head, None))
        spans = [*phrase.attributes, *(p.span for p in predicates if p.subject is phrase)]
        result += [Claim("attribute", a.start, a.end, a.text, phrase, a, phrase.head) for a in spans]
        near = [other for other in (*phrases[i + 1 : i + 2], *reversed(phrases[:i])) if other.sentence == phrase.sentence]
        if place := next((other for other in near if other.kind == "location"), None):
            where = Span(place.start, place.end, place.text)
            last = (where, where, phrase.head) if place.start > phrase.start else (phrase, phrase.head, where)
            blamed, span, related = last
            result.append(Claim("location", blamed.start, blamed.end, blamed.text, phrase, span, related))
        if phrase.count is not None:
            count = phrase.count
            result.append(Claim("count", count.start, count.end, count.text, phrase, count, phrase.head))
        for relation in relations:
            if relation.first is phrase:
                start, end = relation.words.start, relation.second.end
                words = text[start:end]
                result.append(Claim("relation", start, end, words, phrase, relation.second.head, phrase.head))
    return tuple(result)


def claims(caption: str, nlp: Parser | None = None, *, nouns: Iterable[str] = ()) -> list[Claim]:
    """The claims of a caption of the kinds that detectors are fitted on (`JUDGED`); `parse` has all."""
    return [claim for claim in parse(caption, nlp, nouns=nouns).claims if claim.kind in JUDGED]


def chunk(caption: str, nlp: Parser | None = None) -> list[Phrase]:
    """The judged phrases of a caption, sorted by their start; they never overlap."""
    return list(parse(caption, nlp).phrases)


def things(caption: str) -> list[Phrase]:
    """The object phrases of a caption, in order."""
    return list(parse(caption).objects)


def may_end_thing(word: str) -> bool:
    """Whether an object's name can end with this word: cheap to ask of every word of a caption that is being written."""
    word = word.lower()
    letter = MEANINGS.get(word)
    return letter in ("Y", "I", "S", "L", "P") if letter else bool(set("Nv") & set(tagger.classes_of(word)))

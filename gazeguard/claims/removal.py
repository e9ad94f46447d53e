"""Removal of phrases from a caption, so that the rest can still be read.

Sentences without a cut stay as they are, byte by byte. Where a sentence or clause cannot stand without what is removed it
goes whole, and what else it names, if it is named nowhere else, is kept as "There is a ball."
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from gazeguard.claims.cutting import Unit, code_of, cut_marked, is_single, takes_up
from gazeguard.claims.english import listed, with_article
from gazeguard.claims.parse import Caption, parse
from gazeguard.claims.phrases import Phrase, Span
from gazeguard.claims.vocabulary import UNCOUNTED

_KEPT = frozenset(("reasoning", "code", "table", "heading", "offer", "language", "json"))  # parts that no cut takes along
_DETERMINED = re.compile(r"(?:the|my|his|her|its|their|our|your|this|that|these|those|whose)\s+(.*)", re.DOTALL)


@dataclass(frozen=True)
class _Cuts:
    """What is to go: whole phrases, and words of others; ``plain`` has the text of what stays of a phrase."""

    phrases: frozenset[Phrase]
    plain: dict[Phrase, str]
    predicates: frozenset[int]  # first characters

    def __bool__(self) -> bool:
        return bool(self.phrases or self.plain or self.predicates)


@dataclass(frozen=True)
class _Sentence:
    """A sentence: ``lead`` is what stands between it and the one before, ``raw`` its text, ``units`` what it consists of."""

    lead: tuple[int, int]
    raw: str
    units: list[Unit] = field(default_factory=list)


def without(caption: str | Caption, spans: Iterable[tuple[int, int]]) -> str:
    """The caption without the phrases and attributes that overlap ``spans``.

    A span on an attribute alone ("red" of "a red star", or of "the star is red") cuts that word; one that reaches an
    object's head, or a location, cuts the phrase. Spans on other words cut nothing, and no span at all gives the caption
    itself. What is left may be empty.

    Args:
        caption: The caption, or its parse.
        spans: Character offsets, end exclusive.
    """
    parsed = parse(caption) if isinstance(caption, str) else caption
    cuts = _cuts(parsed, list(spans))
    if not cuts:
        return parsed.text
    sentences, tail = _sentences(parsed, cuts)
    lost: list[list[Unit]] = []  # of each sentence, the objects that went with what went
    left: list[list[Unit]] = []
    orphaned = False  # what the last sentence was about is gone
    for sentence in sentences:
        before = after = sentence.units
        if any(unit.code in "XQZ" for unit in before):
            after = cut_marked(before)
            after = [] if _is_label(after, before) else after
        elif orphaned and takes_up(before[0]):
            after = []
        first = next((unit.code for unit in before if unit.code in "KX"), "K")
        orphaned = not after and (first == "X" or orphaned)
        kept = {unit.phrase for unit in after}
        left.append(after)
        labels = {unit.phrase for unit, sign in pairwise(before) if sign.text == ":"}
        lost.append([u for u in before if u.code == "K" and u.phrase not in kept and u.phrase not in labels])
    return _assemble(parsed, sentences, left, _rescued(left, lost), tail)


def _is_label(after: Sequence[Unit], before: Sequence[Unit]) -> bool:
    """Whether nothing but the label of a bullet is left."""
    return len(after) < len(before) and bool(after) and after[-1].text == ":"


def _cuts(parsed: Caption, spans: Sequence[tuple[int, int]]) -> _Cuts:
    phrases, plain = set(), {}
    for phrase in parsed.phrases:
        hit = [span for span in spans if span[0] < phrase.end and phrase.start < span[1]]
        if any(_overlap(span, phrase.head) for span in hit) or (hit and phrase.kind == "location"):
            phrases.add(phrase)
            continue
        parts = (*phrase.attributes, *((phrase.count,) if phrase.count else ()))
        if gone := sorted((part.start, part.end) for part in parts if any(_overlap(span, part) for span in hit)):
            plain[phrase] = _plain(phrase, gone)
    predicates = frozenset(
        claim.start
        for claim in parsed.claims
        if claim.kind == "attribute"
        and not (claim.phrase.start <= claim.start < claim.phrase.end)
        and any(_overlap(span, claim.span) for span in spans)
    )
    return _Cuts(frozenset(phrases), plain, predicates)


def _overlap(span: tuple[int, int], part: Phrase | Span) -> bool:
    return span[0] < part.end and part.start < span[1]


def _plain(phrase: Phrase, gone: Sequence[tuple[int, int]]) -> str:
    """A phrase without some of its attributes: "a red and white kite" without "red" is "a white kite"."""
    text, start = phrase.text, phrase.start
    for first, last in sorted(gone, reverse=True):
        head, tail = text[: first - start], text[last - start :]
        joined = re.match(r"(?:,?\s+(?:and|or|but)|,)(?=\s)", tail)
        if joined:
            tail = tail[joined.end() :]
        else:
            head = re.sub(r"(?:,?\s+(?:and|or|but)|,)\s+$", " ", head)
        text = (head.rstrip() + " " + tail.lstrip()).strip()
    return with_article(text) if phrase.text[:1].islower() else with_article(text[:1].upper() + text[1:])


# -------------------------------------------------------------------------------------------------- text to units


def _sentences(parsed: Caption, cuts: _Cuts) -> tuple[list[_Sentence], str]:
    """The sentences of a caption with their units, and what stands behind the last one."""
    text, starts = parsed.text, {phrase.start: phrase for phrase in parsed.phrases}
    result: list[_Sentence] = []
    units: list[Unit] = []
    begin = done = lead = 0  # first character of the sentence, last of the last unit, last of the sentence before

    def close() -> None:
        nonlocal units, lead
        if units:
            result.append(_Sentence((lead, begin), text[begin:done], units))
            units, lead = [], done

    for token, letter in zip(parsed.reading.tokens, parsed.reading.letters, strict=True):
        if token.start < done:
            continue  # inside of a phrase
        word = text[token.start : token.end]
        if letter == "." and (word not in ".!?" or not units):  # a list's marker, an empty line, a stray full stop
            close()
            continue
        if units and units[-1].code == "." and letter != "." and token.start > done:
            close()
        if not units:
            begin = done = token.start
        unit, end = _unit(starts.get(token.start), word, letter, token.start, cuts)
        gap = text[done : token.start]
        units.append(replace(unit, gap=gap))
        done = max(end, token.end)
    close()
    return result, text[done:]


def _unit(phrase: Phrase | None, word: str, letter: str, start: int, cuts: _Cuts) -> tuple[Unit, int]:
    if phrase is None:
        return Unit("Z" if start in cuts.predicates else code_of(word, letter), "", word), 0
    location = phrase.kind == "location"
    code = ("Q" if location else "X") if phrase in cuts.phrases else ("P" if location else "K")
    return Unit(code, "", cuts.plain.get(phrase, phrase.text), phrase), phrase.end


# -------------------------------------------------------------------------------------------------- units to text


def _rescued(left: Sequence[Sequence[Unit]], lost: Sequence[Sequence[Unit]]) -> list[list[Unit]]:
    """For each lost sentence, its objects that no other sentence names."""
    named = {_noun(unit) for units in left for unit in units if unit.code == "K"}
    result: list[list[Unit]] = []
    for units in lost:
        result.append([])
        for unit in units:
            if _noun(unit) not in named:
                named.add(_noun(unit))
                result[-1].append(unit)
    return result


def _noun(unit: Unit) -> str:
    return unit.phrase.head.text.lower() if unit.phrase else unit.text.lower()


def _assemble(
    parsed: Caption, sentences: Sequence[_Sentence], left: Sequence[list[Unit]], rescued: Sequence[list[Unit]], tail: str
) -> str:
    text, carried, glued = "", "", False
    for sentence, units, saved in zip(sentences, left, rescued, strict=True):
        lead = parsed.text[slice(*sentence.lead)]
        if not units and not saved:
            kept = "".join(part.text for part in parsed.parts if part.kind in _KEPT and _inside(part.start, sentence.lead))
            text += kept
            glued = bool(kept) and not lead[-1:].isspace()
            carried = carried or ("".join(re.findall(r"\n\s*", lead)) if not kept else "")
            continue
        lead = lead if "\n" in lead or not text else carried or lead
        lead = lead.lstrip(" ") if glued else lead
        carried, glued = "", False
        if units == sentence.units and not saved and not _changed(units, sentence):
            text += (lead if text or sentence is sentences[0] else lead.lstrip()) + sentence.raw
            continue
        pieces = [piece for piece in (_text(units), _there_is(saved)) if piece]
        text += (lead if text or sentence is sentences[0] else lead.lstrip()) + _balanced(" ".join(pieces), lead)
    text += tail if text or tail.strip() else ""
    return text if text.strip() else ""


def _inside(start: int, bounds: tuple[int, int]) -> bool:
    return bounds[0] <= start < bounds[1]


def _changed(units: Sequence[Unit], sentence: _Sentence) -> bool:
    return "".join(unit.gap + unit.text for unit in units) != sentence.raw


def _balanced(text: str, lead: str) -> str:
    """Without bold marks that lost their other half."""
    text = re.sub(r"\*\*\s*\*\*", "", text)
    return text.replace("**", "") if (text.count("**") + lead.count("**")) % 2 else text


def _text(units: Sequence[Unit]) -> str:
    """A sentence with one capital and no sign where a sign cannot stand."""
    if not units:
        return ""
    text = units[0].text + "".join(unit.gap + unit.text for unit in units[1:])
    return text[:1].upper() + text[1:]


def _there_is(units: Sequence[Unit]) -> str:
    """ "There is a ball and a cat.", of objects that went with the sentence that named them."""
    if not units:
        return ""
    return f"There {'is' if is_single(units[0]) else 'are'} {listed([_introduced(unit) for unit in units])}."


def _introduced(unit: Unit) -> str:
    """An object as it is named for the first time: "a wall" for "the wall" and "their wall"."""
    text = unit.text if unit.gap else unit.text[:1].lower() + unit.text[1:]  # it opened a sentence
    match = _DETERMINED.match(text)
    if not match:
        return text
    bare, noun = match[1], _noun(unit).split()[-1]
    return (
        with_article(f"a {bare}") if is_single(unit) and noun not in UNCOUNTED and not re.match(r"\w+\s+of\b", bare) else bare
    )

"""Claims made false by construction: one word of a caption swapped for a plausible other.

    caption = parse("There is a red star next to the cup.")
    [site, *_] = sites(caption)
    swap(caption, site, "moon")      # "There is a red moon next to the cup.", and the claim in it that is now false

Pure functions on parsed captions. A swap changes nothing but its own words and the article before them: the new caption has the
same claims in the same order, which is checked by reading it again.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gazeguard.claims.english import is_plural, plural, singular, with_article
from gazeguard.claims.parse import Caption, Claim, Span, parse
from gazeguard.heads.strips import LOCATION_PHRASES, ORDINALS

# Words that can stand for each other: a swap takes another word of the same line.
ATTRIBUTES = (
    ("red", "blue", "green", "yellow", "purple", "orange", "black", "white", "brown", "pink", "gray", "grey"),
    ("small", "large"), ("little", "big"), ("tiny", "huge"), ("short", "tall"), ("young", "old"), ("open", "closed"),
    ("wooden", "metal", "plastic", "leather", "stone", "glass"), ("round", "square"), ("empty", "full"), ("wet", "dry"),
    ("striped", "plain"),
)  # fmt: skip
# Colours that two people may call the same patch; none is swapped for the other.
ALIKE = frozenset(
    frozenset(pair.split())
    for pair in (
        "red orange", "red pink", "red brown", "orange yellow", "orange brown", "blue purple", "purple pink", "gray grey",
        "gray white", "grey white", "gray black", "grey black", "black brown",
    )
)  # fmt: skip
COUNTS = ("two", "three", "four", "five", "six", "seven", "eight")
RELATIONS = (  # words, and what may stand in their place; "in front of" and "on top of" also name a location
    ("next to", "under", "above"), ("beside", "under", "above"), ("underneath", "above"), ("beneath", "above"),
    ("under", "above", "next to"), ("above", "under"), ("below", "above"), ("over", "under"), ("behind", "under", "above"),
    ("inside", "outside"), ("outside", "inside"), ("on", "under"), ("to the left of", "to the right of"),
    ("to the right of", "to the left of"),
)  # fmt: skip
_OPPOSITE = {
    "left": "right", "right": "left", "top": "bottom", "bottom": "top", "upper": "lower", "lower": "upper", "foreground":
    "background", "background": "foreground",
}  # fmt: skip
_LOCATIONS = tuple(phrase for row in LOCATION_PHRASES for phrase in row)
_RANKS = ("first", "second", "third", "fourth", "fifth", "sixth")
_NUMBERS = tuple({word: series for series in (ORDINALS, _RANKS, tuple("123456")) for word in series}.items())
_PANEL_NUMBER = re.compile(rf"\b({'|'.join(word for word, _ in _NUMBERS)})\b", re.IGNORECASE)
_DIRECTION = re.compile(rf"\b({'|'.join(_OPPOSITE)})\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Site:
    """Words of a caption that can be swapped.

    Attributes:
        claims: Indices of the claims, among all of the caption, that the swap makes false.
        kind: Of these claims.
        start, end: The characters to replace.
        options: What may stand there; None for an object, whose options are the nouns that go with the caption.
    """

    claims: tuple[int, ...]
    kind: str
    start: int
    end: int
    options: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Swap:
    """A caption with one swap in it.

    Attributes:
        caption: The new caption; its claims are those of the original one, in the same order.
        claims: Indices of the claims that the swap made false.
        word: What stands there now.
    """

    caption: Caption
    claims: tuple[int, ...]
    word: str


def noun_of(claim: Claim) -> str:
    """The noun of the object that a claim is about, lower case, in the singular."""
    return singular(claim.phrase.head.text.lower())


def nouns_of(caption: Caption) -> list[str]:
    """The nouns of all objects of a caption, lower case, in the singular, in order, each once."""
    return list(dict.fromkeys(noun_of(claim) for claim in caption.claims if claim.kind == "object"))


def location_span(claim: Claim) -> Span | None:
    """The words of a location claim that say where; None for other kinds."""
    if claim.kind != "location":
        return None
    return claim.related if claim.span == claim.phrase.head else claim.span


def sites(caption: Caption) -> list[Site]:
    """The words of a caption that can be swapped, in the order of the claims; a location of several objects once."""
    found: list[Site] = []
    for index, claim in enumerate(caption.claims):
        if claim.kind == "object":
            found.append(Site((index,), "object", claim.span.start, claim.span.end, None))
        elif claim.kind == "location":
            found += _location_site(caption, index)
        elif options := _OPTIONS[claim.kind](claim):
            words, end = options
            found.append(Site((index,), claim.kind, claim.start, end, words))
    return found


def _location_site(caption: Caption, index: int) -> Iterator[Site]:
    span = location_span(caption.claims[index])
    same = [i for i, claim in enumerate(caption.claims) if location_span(claim) == span]
    if span is not None and index == same[0] and (options := _locations(span.text)):
        yield Site(tuple(same), "location", span.start, span.end, options)


def _locations(text: str) -> tuple[str, ...]:
    """Other locations in the same form: another panel, another ninth of the image, the opposite side."""
    lower = text.lower()
    if lower in _LOCATIONS:
        own = set(lower.split()[2:])  # "at the top" is neither true nor clearly false of what is "at the top left"
        return tuple(phrase for phrase in _LOCATIONS if not (own <= (words := set(phrase.split()[2:])) or words <= own))
    if "panel" in lower and (number := _PANEL_NUMBER.search(text)):
        series = dict(_NUMBERS)[number[0].lower()]
        return tuple(text[: number.start()] + other + text[number.end() :] for other in series if other != number[0].lower())
    directions = _DIRECTION.finditer(text)
    return tuple(text[: word.start()] + _OPPOSITE[word[0].lower()] + text[word.end() :] for word in directions)


def _attributes(claim: Claim) -> tuple[tuple[str, ...], int] | None:
    word = claim.text.lower()
    words = next((line for line in ATTRIBUTES if word in line), ())
    others = tuple(other for other in words if other != word and frozenset((word, other)) not in ALIKE)
    return (others, claim.end) if others else None


def _counts(claim: Claim) -> tuple[tuple[str, ...], int] | None:
    word = claim.text.lower()
    return (tuple(other for other in COUNTS if other != word), claim.end) if word in COUNTS else None


def _relations(claim: Claim) -> tuple[tuple[str, ...], int] | None:
    for words, *others in RELATIONS:
        if claim.text.lower().startswith(f"{words} "):
            return tuple(others), claim.start + len(words)
    return None


_OPTIONS = {"attribute": _attributes, "count": _counts, "relation": _relations}


def swap(caption: Caption, site: Site, word: str) -> Swap | None:
    """Put another word in a site.

    Args:
        caption: The caption.
        site: One of its `sites`.
        word: What is put there: one of its options; for an object a noun in the singular that the caption does not name.

    Returns:
        The swap, or None where the new caption does not read as the same claims, or the word is what stood there.
    """
    old = caption.text[site.start : site.end]
    if site.kind == "object":
        word = plural(word) if is_plural(old) else word
    if word.lower() == old.lower():
        return None
    new = word[0].upper() + word[1:] if old[0].isupper() else word
    phrase = caption.claims[site.claims[0]].phrase
    if phrase.start <= site.start and site.end <= phrase.end:  # with the article that the new word asks for
        start, end = phrase.start, phrase.end
        new = with_article(caption.text[start : site.start] + new + caption.text[site.end : end])
    else:
        start, end = site.start, site.end
    swapped = parse(caption.text[:start] + new + caption.text[end:])
    if [claim.kind for claim in swapped.claims] != [claim.kind for claim in caption.claims]:
        return None
    if any(_says(swapped.claims[i]) == _says(caption.claims[i]) for i in site.claims):
        return None
    others = set(range(len(caption.claims))) - set(site.claims)
    if any(_own(swapped.claims[i]) != _own(caption.claims[i]) for i in others if caption.claims[i].phrase is not phrase):
        return None
    return Swap(swapped, site.claims, word)


def _says(claim: Claim) -> tuple[str, str, str]:
    """What a claim says, for comparison."""
    where = location_span(claim)
    return claim.text.lower(), claim.span.text.lower(), "" if where is None else where.text.lower()


def _own(claim: Claim) -> tuple[str, str]:
    """The words of a claim that no swap beside it touches."""
    return claim.kind, claim.span.text.lower() if claim.kind in ("object", "attribute", "count") else noun_of(claim)


# --------------------------------------------------------------------------------------------------- plausible nouns


def cooccurrence(captions: Iterable[Caption]) -> dict[str, Counter[str]]:
    """How many captions name two nouns together: noun -> noun -> captions."""
    company: dict[str, Counter[str]] = {}
    for caption in captions:
        named = nouns_of(caption)
        for noun in named:
            company.setdefault(noun, Counter()).update(other for other in named if other != noun)
    return company


def companions(named: Sequence[str], company: Mapping[str, Counter[str]], rng: random.Random, most: int) -> list[str]:
    """Nouns that go with those that a caption names but are not among them, the most usual company first.

    Args:
        named: The nouns that the caption names.
        company: `cooccurrence` of many captions.
        rng: Orders nouns with equal counts.
        most: Number of nouns at most.
    """
    totals: Counter[str] = Counter()
    for noun in named:
        totals.update(company.get(noun, Counter()))
    absent = sorted(noun for noun in company if noun not in named)
    rng.shuffle(absent)
    return sorted(absent, key=lambda noun: -totals[noun])[:most]

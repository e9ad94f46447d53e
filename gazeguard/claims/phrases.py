"""Phrase grammar for English captions: from words and their classes to object phrases, locations and what is said of them.

The classes of a caption are one string with one letter per word; possessive patterns over it find locations and noun
phrases, so the work grows with the caption's length and no faster. What is decided, where one could decide otherwise:

- The head of "a slice of pizza", "a group of people", "a couple of cars" is the noun after "of"; a vessel is an object of
its own
  ("a bowl of fruit" is "a bowl" and "fruit").
- The head of a compound is the whole compound: "fire hydrant", "hot dog", "dining table", "kitchen area".
- An owner is an object of its own: "the man's hat" is "the man" and "hat".
- What an image cannot show ("a cozy atmosphere") and what names the image itself ("the photo") is no phrase.
- In "on the left side of the room", "on the left side" is the location and "the room" an object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from gazeguard.claims.english import is_plural, singular
from gazeguard.claims.language import refusal
from gazeguard.claims.structure import QUOTE, STOP
from gazeguard.claims.tagger import classes_of
from gazeguard.claims.vocabulary import (
    ABSTRACT,
    ABSTRACT_ENDINGS,
    COLOURS,
    CONCRETE_DESPITE_ENDING,
    CONCRETE_ING,
    COUNTS,
    EVALUATIVE,
    FINE,
    MEANINGS,
    MEASURES,
    MODIFIER_ENDINGS,
    NO_ATTRIBUTE,
    PAIRS,
    SHADE_MODIFIERS,
    SHADES,
    WEAK,
)

Tagger = Callable[[str, Sequence["Token"]], list[str]]  # masked text and tokens to one class per token

# A list marker, a word, a clitic, quoted text, the end of a paragraph, any other sign.
_TOKEN = re.compile(
    r"(?P<stop>(?m:^)[ \t]*+(?:\d{1,3}[.)]|[-*•])(?=\s)|\n\s*\n)"
    rf"|(?P<word>\w[\w\u0300-\u036f]*+(?:-\w[\w\u0300-\u036f]*+)*+|(?<=\w)['\u2019]\w+|&)|(?P<quote>{QUOTE}++)|[^\w\s]"
)
_CONCRETE_MEASURES = frozenset(
    [
        "school",
        "schools",
        "patch",
        "patches",
        "piece",
        "pieces",
        "set",
        "sets",
        "swarm",
        "fleet",
        "splash",
        "couple",
        "couples",
        "crowd",
        "expanse",
    ]
)
_DEVICES = frozenset(["camera", "cameras", "frame", "frames"])  # "a frame" is an object, "the frame" is the image

_OBJECTS_OF = frozenset(["lines", "signs", "sheets", "strips", "schools"])  # objects, even before "of"
_SPECIAL = frozenset(("well", "can", "half", "camera", "cameras", "frame", "frames"))
_FRACTIONS = frozenset(("two-thirds", "one-third", "three-quarters", "one-half", "one-quarter"))
_GROUNDS = frozenset(["background", "foreground", "midground", "middle", "center", "centre", "left", "right"])

# What a word's neighbours say about its class; every rule keeps the length of the string.
_CONTEXT = (
    (re.compile(r"Y(?=[NxwMYIS]|[ae]++[NxwM]|,?c[aY])"), "a"),  # "an orange crown", "an orange and blue kite"
    (re.compile(r"(?<=[Ddn])Y(?![ge])|(?<=[Ddn][ae])Y(?![geaN])"), "N"),  # "an orange"
    (re.compile(r"Y"), "a"),
)

# Locations: "in panel one"; "in the first panel"; "at the top left of the image"; "Top left:" standing alone. A location may
# end in what names the image. The groups hold the head; words of direction are preferred to "side" and "corner".
_OF_IMAGE = r"(?:o[Dd]?+a*+(?:Pn?+|[Ix]?+)(?![NZxwS]))?+"
_LOCATION = "|".join((
    r"[pt]?+[Dd]?+P(?P<panel>n)",
    r"[pt][Dd]?+(?P<nth>n)P",
    rf"[pt][Ddnar]*+(?P<where>L++(?:[c|]L++)?+|S)S*+(?![NIxw]){_OF_IMAGE}",
    rf"(?<![^.,])[Dd]?+(?P<bare>L++)S*+{_OF_IMAGE}(?![^.,])",
))  # fmt: skip
# Objects: "a large group of", "two of the"; then modifiers, also coordinated ("small, clean and bright"); then nouns. An
# "-ing" word is a modifier only after a determiner: "a smiling woman", but "eating pizza".
_MODIFIER = r"[Dd]|[ae](?:,?+[c|]?+(?=[ae]))?+|n(?:[c|](?=n))?+|(?<=[Ddna,])r(?=[rae])|L(?=[LNaexw])"
_OBJECT = (
    rf"(?:[Ddnae]*+mo|[Ddn]++o(?=[Ddn]))*+(?:[Ddn](?:{_MODIFIER}|g)*+|(?:{_MODIFIER})*+)"
    r"(?:N|[xwSI]|a(?=[Na]))*+"
)
_PARTS = re.compile(rf"(?P<location>{_LOCATION})|(?P<object>{_OBJECT})|.", re.DOTALL)
# The head is the last run of nouns; a weak noun ("area") needs a modifier or another noun, an abstract one is none.
_HEAD = re.compile(r"(?P<head>(?<!N)N++)(?=a*+$)|(?P<compound>(?<!N)N++[wSI]++)$|(?<=[aegLxY])(?P<weak>w)$")


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a caption: ``caption[start:end] == text``, offsets in characters, end exclusive."""

    start: int
    end: int
    text: str


class Token(NamedTuple):
    """A word or sign of a caption; ``letter`` is its class where no neighbour can change it, else ""."""

    start: int
    end: int
    word: str
    letter: str


@dataclass(frozen=True, slots=True)
class Phrase:
    """What an image can support or not: ``caption[start:end] == text``, offsets in characters, end exclusive.

    Attributes:
        kind: "object", or "location": where in the image something is said to be.
        head: The noun with its compound ("star", "dining table"); of a location its main words ("top left", "two").
        attributes: What is said of the object inside the phrase, in order: colours, sizes, participles; none for a location.
        sentence: 0-based index of the sentence, among those that have words.
        count: The number that is stated of the object inside the phrase ("two dogs").
    """

    start: int
    end: int
    text: str
    kind: str
    head: Span
    attributes: tuple[Span, ...]
    sentence: int
    count: Span | None = None


class Unit(NamedTuple):
    """A phrase or a single word of a caption.

    Attributes:
        code: "K" an object phrase, "P" a location, else the class of the word with "b" distinguished (see `FINE`).
        first, last: Its tokens, end exclusive.
        phrase: The phrase; None for a word.
    """

    code: str
    first: int
    last: int
    phrase: Phrase | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """The words of a caption, their classes, and the units they form."""

    text: str
    tokens: tuple[Token, ...]
    letters: str
    sentences: tuple[int, ...]  # of each token
    units: tuple[Unit, ...]
    codes: str  # one character per unit
    refused: tuple[tuple[int, int, str], ...]  # sentences that cannot be read: start, end, reason

    def span(self, first: int, last: int) -> Span:
        """The characters of tokens ``first`` to ``last``, end exclusive."""
        start, end = self.tokens[first].start, self.tokens[last - 1].end
        return Span(start, end, self.text[start:end])

    def word(self, unit: int) -> str:
        """A unit's first word in lower case."""
        return self.tokens[self.units[unit].first].word


def tokenize(text: str, masked: str) -> list[Token]:
    """The words and signs of a masked caption."""
    tokens = []
    for match in _TOKEN.finditer(masked):
        group, string = match.lastgroup, match[0]
        word = string.lower().replace("\u2019", "'")
        if group == "word":
            letter = _closed(word)
        elif group == "quote":
            letter = "T"
        else:  # A full stop inside "3.5" or "a.m." ends nothing.
            ends = group == "stop" or (string in ".!?" + STOP and not masked[match.end() : match.end() + 1].isalnum())
            letter = "." if ends else ","
        tokens.append(Token(match.start(), match.end(), word, letter))
    return tokens


def _refuse(masked: str, tokens: list[Token]) -> tuple[tuple[int, int, str], ...]:
    """The sentences that are not readable English; their tokens become signs, so that no phrase is found in them."""
    refused, first = [], 0
    for last in range(len(tokens) + 1):
        if last < len(tokens) and tokens[last].letter != ".":
            continue
        inside = tokens[first:last]
        if inside and (
            reason := refusal(masked[inside[0].start : inside[-1].end], [t.word for t in inside if t.letter != "T"])
        ):
            refused.append((inside[0].start, inside[-1].end, reason))
            tokens[first:last] = [token._replace(letter=",") for token in inside]
        first = last + 1
    return tuple(refused)


@lru_cache(maxsize=1 << 16)
def _closed(word: str) -> str:
    if word in MEANINGS:
        return MEANINGS[word]
    if (letter := MEANINGS.get(singular(word), "")) and letter in "IS":
        return letter
    if "-" in word and word.endswith(MODIFIER_ENDINGS):
        return "a"
    if word[0] == "'":
        return "b"
    if word.isdecimal() or word in _FRACTIONS:
        return "n"
    if not any(map(str.isalpha, word)):  # "___", "½"
        return ","
    if "-" in word and {MEANINGS.get(part) for part in word.split("-")} == {"L"}:
        return "L"
    return ""


@lru_cache(maxsize=1 << 16)
def is_object_noun(word: str, nouns: frozenset[str] = frozenset()) -> str:
    """The class of a noun: "N" an object, "w" an object only with a modifier, "x" none."""
    single = singular(word)
    if word in nouns or single in nouns:
        return "N"
    if word in WEAK:
        return "w"
    if single.endswith("ing") and single not in CONCRETE_ING:
        return "x"
    if word in ABSTRACT or single in ABSTRACT:
        return "x"
    if single.endswith(ABSTRACT_ENDINGS) and single not in CONCRETE_DESPITE_ENDING:
        return "x"
    return "N"


def classes(tokens: Sequence[Token], tags: Sequence[str], nouns: frozenset[str]) -> str:
    """One class per token, after the neighbours have been consulted."""
    words = [token.word for token in tokens]
    letters = [
        is_object_noun(word, nouns) if tag == "N" and not token.letter else tag
        for word, tag, token in zip(words, tags, tokens, strict=True)
    ]
    settled: set[int] = set()  # by a pair
    for i, pair in enumerate(pairwise(words)):
        if fixed := PAIRS.get(pair) or PAIRS.get((pair[0], pair[1].removesuffix("s"))):
            letters[i : i + 2] = fixed
            settled.update((i, i + 1))
    for i, token in enumerate(tokens):
        letter = letters[i]
        if i in settled:
            continue
        if letter in "PLI" or token.word in _SPECIAL:
            letters[i] = _of_closed(words, letters, i)
        elif not token.letter and letter in "Nxwav":
            letters[i] = _of_open(words, letters, i, nouns)
    result = "".join(letters)
    for pattern, letter in _CONTEXT:
        result = pattern.sub(letter, result)
    return result


def _neighbours(letters: Sequence[str], i: int) -> tuple[str, str]:
    return letters[i - 1] if i else ".", letters[i + 1] if i + 1 < len(letters) else "."


def _of_closed(words: Sequence[str], letters: Sequence[str], i: int) -> str:
    """The class of a word of direction or of the image, and of a few others, by its neighbours."""
    word, letter = words[i], letters[i]
    before, after = _neighbours(letters, i)
    if letter == "P":
        return letter if "n" in (before, after) else "N"
    if word in _DEVICES:
        acts = before in "Nxw" and after in "Dd"  # "a beard frames his jaw"
        return "v" if acts else letter if i and words[i - 1] == "the" else "N"
    if letter == "I":
        return "N" if before == "e" and words[i - 1] == "framed" else letter
    if letter == "L":
        return letter if not _is_part(words, letters, i) else "x" if word in _GROUNDS else "N"
    if word == "can":
        return "N" if before in "aDY" else letter
    if word == "well":
        return "N" if before in "aDY" and after not in "aeg" else letter
    return "r" if after in "aeg" else letter  # "half open"


def _of_open(words: Sequence[str], letters: Sequence[str], i: int, nouns: frozenset[str]) -> str:
    """The class of a noun, verb or adjective by its neighbours."""
    word, letter = words[i], letters[i]
    before, after = _neighbours(letters, i)
    if letter == "v":  # no verb follows a determiner: "its shutters are"
        known = classes_of(word)
        if "e" in known and after in "Nxw" and (_opened(words, letters, i, False) or before == "r"):
            return "e"  # "a freshly dug hole"
        noun = "N" in known and _opened(words, letters, i, likely_verb=known[0] == "v" and word.endswith("s"))
        return is_object_noun(word, nouns) if noun else letter
    if letter == "a":
        noun = before in "Ddea" and after in "pobBv.t" and _is_noun(words, letters, i)
        return is_object_noun(word, nouns) if noun else letter  # "the liquid in"
    measure = MEASURES.get(word) or MEASURES.get(singular(word), "")
    if measure and (after == "o" or (letter == "N" and measure == "m")):
        return _measure(word, measure, after)
    if len(word) == 1 or (word in SHADES and i and words[i - 1] in SHADE_MODIFIERS and after not in "NxwYM"):
        return "x"
    if before in "bG" and i > 1 and words[i - 2] in ("viewer", "photographer") and words[i - 1].startswith("'"):
        return "x"  # "the viewer's eye"
    if letter == "N" and after == "a" and words[i + 1] in COLOURS and before in "Dab,cr.":
        following = letters[i + 2] if i + 2 < len(letters) else "."
        return letter if following in "NxwYMaeIS" or (before == "." and word not in SHADES) else "a"  # "mint green"
    if before == "T" and classes_of(word)[0] == "v" and after in "p,.DdrT":
        return "v"  # a sign that reads STOP stands
    if after not in "NxwSI" and _may_act(words, letters, i):
        return _verb_after_noun(words, letters, i)
    return letter


def _measure(word: str, measure: str, after: str) -> str:
    """The class of a measure word: "m" before "of", else that of an object or of none."""
    if after == "o":
        return "N" if word in _OBJECTS_OF else "m"
    return "N" if word in _CONCRETE_MEASURES else "w" if word in WEAK else "x"


def _opened(words: Sequence[str], letters: Sequence[str], i: int, likely_verb: bool) -> bool:
    """Whether a determiner, with adjectives after it, stands before a word: "its shutters", "a small orange gear"."""
    j = i - 1
    while j >= 0 and letters[j] in "aeY":
        j -= 1
    if j < 0 or letters[j] not in "Dd" or (j == i - 1 and words[j] in ("her", "that", "this")):
        return False
    return j == i - 1 or not likely_verb


def _is_noun(words: Sequence[str], letters: Sequence[str], i: int) -> bool:
    """Whether a word that can be an adjective or a noun ends a noun phrase that a determiner opened."""
    j = i - 1
    while j >= 0 and letters[j] in "ae":
        j -= 1
    return j >= 0 and letters[j] in "Dd" and "N" in classes_of(words[i])


def _may_act(words: Sequence[str], letters: Sequence[str], i: int) -> bool:
    if i == 0:
        return False
    orange = letters[i - 1] == "Y" and i > 1 and letters[i - 2] in "Dd"  # "an orange lies"
    return orange or letters[i - 1] in "NxwL" or words[i - 1] == "her"


def _verb_after_noun(words: Sequence[str], letters: Sequence[str], i: int) -> str:
    """The class of the last noun of a compound: "a zebra standing", "pillars line the hall" end in no noun."""
    word, letter = words[i], letters[i]
    if word.endswith("ing") and letter == "x":
        return "g"
    known = classes_of(word)
    if "v" not in known:
        return letter
    if _neighbours(letters, i)[1] in "Dd" and words[i + 1] != "whose":
        return "v"
    # "The dancer spins": a singular, a likely verb in "-s", and no other finite verb in the clause
    likely = known[0] == "v" and word.endswith("s") and not is_plural(words[i - 1])
    return "v" if likely and not _has_finite(letters, i) else letter


def _has_finite(letters: Sequence[str], i: int) -> bool:
    """Whether the clause around a word has a finite verb already."""
    first, last = i, i + 1
    while first and letters[first - 1] not in ".,c":
        first -= 1
    while last < len(letters) and letters[last] not in ".,c":
        last += 1
    return any(letters[k] in "vb" for k in range(first, last) if k != i)


def _is_part(words: Sequence[str], letters: Sequence[str], i: int) -> bool:
    """Whether a word of direction is a part of an object: "a red top", but not "the top"."""
    if i + 1 < len(letters) and letters[i + 1] in "NxwLSaemIM":
        return False
    j = i - 1
    while j >= 0 and letters[j] in "aeY":
        j -= 1
    if j == i - 1 or j < 0:
        return False
    return words[j] in ("a", "an", "its", "with", "his", "her") or any(word in COLOURS for word in words[j + 1 : i])


def read(text: str, masked: str, tagger: Tagger, nouns: frozenset[str] = frozenset()) -> Reading:
    """The phrases of a caption in the order of the text; they never overlap.

    Args:
        text: The caption.
        masked: The caption with what is not judged blanked, of the same length.
        tagger: Gives each token its class.
        nouns: Nouns, in lower case, that are objects although the rules take them for abstract.
    """
    tokens = tokenize(text, masked)
    refused = _refuse(masked, tokens)
    letters = classes(tokens, tagger(masked, tokens), nouns)
    sentences = _sentences(letters)
    draft = Reading(text, tuple(tokens), letters, sentences, (), "", refused)
    units: list[Unit] = []
    for part in _PARTS.finditer(letters):
        first, last = part.span()
        if first == last:
            continue  # an empty object: the search goes on from here with a single token
        if part["location"]:
            group = next(name for name in ("panel", "nth", "where", "bare") if part[name])
            whole, head = draft.span(first, last), draft.span(*part.span(group))
            phrase = Phrase(whole.start, whole.end, whole.text, "location", head, (), sentences[first])
            units.append(Unit("P", first, last, phrase))
        elif (noun := _HEAD.search(part[0])) and not _vague(draft, first, noun):
            last_noun = first + noun.end()
            units.append(Unit("K", first, last_noun, _object(draft, first, part[0], noun)))
            units += [Unit(_fine(draft, i), i, i + 1) for i in range(last_noun, last)]
        else:
            units += [Unit(_fine(draft, i), i, i + 1) for i in range(first, last)]
    return Reading(text, draft.tokens, letters, sentences, tuple(units), "".join([unit.code for unit in units]), refused)


def _vague(draft: Reading, first: int, noun: re.Match[str]) -> bool:
    """Whether nothing but praise tells a weak noun apart: "a perfect spot"."""
    return noun["weak"] is not None and draft.tokens[first + noun.start() - 1].word in EVALUATIVE


def _object(draft: Reading, first: int, part: str, noun: re.Match[str]) -> Phrase:
    head = (first + noun.start(), first + noun.end())
    whole = draft.span(first, head[1])
    last_of = part.rfind("o", 0, noun.start())
    inside = range(first + last_of + 1, head[0])
    letters, words = draft.letters, [token.word for token in draft.tokens]
    undecided = {i + step for i in inside if letters[i] == "|" for step in (-1, 1)}  # "a red or blue scarf"
    attributes = tuple(
        draft.span(i, i + 1) for i in inside if letters[i] in "aegL" and words[i] not in NO_ATTRIBUTE and i not in undecided
    )
    numbers = [i for i in inside if letters[i] == "n" and (words[i] in COUNTS or words[i].isdecimal())]
    if not numbers and last_of == 1 and words[first] in COUNTS:  # "two of the dogs"
        numbers = [first]
    count = draft.span(numbers[0], numbers[-1] + 1) if numbers else None
    return Phrase(whole.start, whole.end, whole.text, "object", draft.span(*head), attributes, draft.sentences[first], count)


def _fine(draft: Reading, i: int) -> str:
    letter = draft.letters[i]
    return FINE.get(draft.tokens[i].word, letter) if letter == "b" else letter


def _sentences(letters: str) -> tuple[int, ...]:
    numbers, sentence, ended, begun = [], 0, False, False
    for letter in letters:
        if letter == ".":
            ended = begun
        elif letter != ",":
            sentence, ended, begun = sentence + ended, False, True
        numbers.append(sentence)
    return tuple(numbers)

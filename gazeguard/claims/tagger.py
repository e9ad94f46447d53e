"""Part-of-speech tagger for English captions: a lexicon of 60,000 word forms and an averaged perceptron for the ambiguous ones.

Function words are decided by `gazeguard.claims.vocabulary`; a form that the lexicon knows with one class keeps it; what is
left is decided from left to right by a linear model over the word, its endings and its neighbours. Classes: "N" noun, "a"
adjective, "v" finite verb or infinitive, "e" past participle, "g" word in "-ing", "r" adverb. How the data came about:
``data/README.md``.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.resources import files

from gazeguard.claims.vocabulary import COLOURS, FINE, MEANINGS

TAGS = "Navegr"
_PLURALS = frozenset(["people", "men", "women", "children", "sheep"])
_SINGULAR = frozenset(["a", "an", "another", "each", "every", "one", "this", "that"])
_IN_PHRASE = frozenset("Naegrdn")
# Endings of words that the lexicon does not know, first fit wins.
_GUESSES = (
    ("ing", "Ng"), ("ed", "e"), ("ly", "r"), ("ness", "N"), ("tion", "N"), ("ment", "N"), ("ful", "a"), ("ous", "a"),
    ("ish", "a"), ("less", "a"), ("able", "a"), ("ive", "Na"), ("ic", "a"), ("al", "a"), ("esque", "a"), ("ward", "a"),
    ("like", "a"), ("ss", "N"), ("us", "N"), ("s", "N"), ("y", "Na"),
)  # fmt: skip


@cache
def lexicon() -> dict[str, str]:
    """Word form -> the classes it can have, the most likely first."""
    text = gzip.decompress(files("gazeguard.claims").joinpath("data/lexicon.txt.gz").read_bytes()).decode()
    return {
        word: classes for line in text.splitlines() for classes, _, words in [line.partition("\t")] for word in words.split()
    }


@cache
def weights() -> dict[str, tuple[int, ...]]:
    """Feature -> one weight per class of `TAGS`."""
    return {
        feature: tuple(values)
        for feature, values in json.loads(
            gzip.decompress(files("gazeguard.claims").joinpath("data/weights.json.gz").read_bytes())
        ).items()
    }


@lru_cache(maxsize=1 << 16)
def classes_of(word: str) -> str:
    """The classes that a lower-case word outside the closed lists can have."""
    known = lexicon().get(word)
    if known:
        return known
    if "-" in word:
        last = word.rpartition("-")[2]
        if last in COLOURS:
            return "a"
        after = lexicon().get(last) or _guess(last)
        return "a" if set(after) & set("eag") and after != "Ng" else "Na" if "N" in after else after
    return _guess(word)


def _guess(word: str) -> str:
    return next((classes for ending, classes in _GUESSES if word.endswith(ending) and len(word) > len(ending) + 1), "N")


def features(
    word: str, choice: str, before: tuple[str, str, str], after: tuple[str, str], clause: Sequence[str]
) -> tuple[str, ...]:
    """What the model sees of a word.

    Args:
        word: The word in lower case.
        choice: The classes that it can have, the most likely first.
        before: The classes of the two words before, and the word before itself.
        after: What the two words after can be.
        clause: Whether a finite verb came before ("0", "1", or "2" behind a conjunction), and the determiner of the noun
        phrase.
    """
    second, first, previous = before
    following, then = after
    finite, determiner = clause
    plural = "s" if word[-1] == "s" else ""
    return (
        "b" + choice,
        "w" + word,
        "1" + choice + first,
        "2" + second + first,
        "n" + choice + following,
        "m" + following + " " + then,
        "c" + choice + first + " " + following,
        "s" + choice + word[-3:],
        "f" + choice + finite + first,
        "F" + choice + finite + following,
        "W" + word + first,
        "p" + choice + previous,
        "d" + choice + determiner + plural + first,
        "D" + choice + determiner + plural + first + following,
        "q" + choice + plural + ("s" if previous[-1:] == "s" or previous in _PLURALS else "") + first,
        "Q" + choice + plural + ("s" if previous[-1:] == "s" or previous in _PLURALS else "") + first + finite + following,
    )


def context(words: Sequence[str], closed: Sequence[str]) -> list[str]:
    """What each word is to its neighbours before it is decided: its closed class, or the classes that it can have."""
    return [
        (FINE.get(word, letter) if letter in "bD" else letter) if letter else classes_of(word)
        for word, letter in zip(words, closed, strict=True)
    ]


def tag(words: Sequence[str], closed: Sequence[str]) -> list[str]:
    """One class per word; ``words`` are lower-case, ``closed`` has the class of what is decided already, else "".

    A full stop among ``closed`` ("." and ",") separates sentences and parts of a sentence.
    """
    table, seen = weights(), context(words, closed)
    count = len(words)
    tags: list[str] = []
    first, second, previous, finite, determiner = ".", ".", "", "0", "0"
    for i in range(count):
        letter = closed[i]
        choice = seen[i]
        if letter:
            result = letter
            state = choice
        elif len(choice) == 1:
            result = state = choice
        else:
            after = (seen[i + 1] if i + 1 < count else ".", seen[i + 2] if i + 2 < count else ".")
            result = state = _decide(
                table, choice, features(words[i], choice, (second, first, previous), after, finite + determiner)
            )
        tags.append(result)
        determiner = next_determiner(determiner, state, words[i])
        finite = next_finite(finite, state)
        second, first, previous = first, state, words[i]
    return tags


def next_determiner(current: str, state: str, word: str) -> str:
    """The determiner of the noun phrase at hand: "a" a singular one, "t" any other, "0" none."""
    if state == "D" or state == "d":
        return "a" if word in _SINGULAR else "t"
    return current if state[-1] in _IN_PHRASE else "0"


def next_finite(current: str, state: str) -> str:
    """Whether the clause at hand has a finite verb: "0" not yet, "1" it has, "2" a conjunction came after it."""
    if state in "vB":
        return "1"
    if state == ".":
        return "0"
    return "2" if state in "|cw" else current


def _decide(table: dict[str, tuple[int, ...]], choice: str, found: tuple[str, ...]) -> str:
    rows = [row for row in map(table.get, found) if row]
    best, top = choice[0], None
    for tag_ in choice:
        at = TAGS.index(tag_)
        score = sum([row[at] for row in rows])
        if top is None or score > top:
            best, top = tag_, score
    return best


def is_closed(word: str) -> str:
    """The closed class of a lower-case word, "" for an open-class word."""
    return MEANINGS.get(word, "")

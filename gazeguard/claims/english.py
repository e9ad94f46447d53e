"""English word forms: a/an, singular and plural, lists, and the nine locations of an image in words."""

from __future__ import annotations

import re
from collections.abc import Sequence

_VOWEL = re.compile(r"(?!(?:uni|use|usu|uten|eu|one|once)[a-z]*)[aeiou]|hour|honest|heir", re.IGNORECASE)
_IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "teeth": "tooth", "geese": "goose",
    "mice": "mouse", "knives": "knife", "leaves": "leaf", "shelves": "shelf", "loaves": "loaf", "wolves": "wolf", "halves":
    "half", "scarves": "scarf", "calves": "calf", "lives": "life", "wives": "wife", "hooves": "hoof", "oxen": "ox", "dice":
    "die", "buses": "bus", "gases": "gas", "policemen": "policeman", "firemen": "fireman", "snowmen": "snowman", "fishermen":
    "fisherman",
}  # fmt: skip
_PLURALS = {singular: plural for plural, singular in _IRREGULAR.items()}
_NO_PLURAL = re.compile(r"(?:ss|us|is|ous|news|gas|bus|lens|species|series)$")
# The image location that a word denotes: x and y from 0 (left, top) to 1; None leaves the axis open.
DIRECTIONS: dict[str, tuple[float | None, float | None]] = {
    "left": (0, None), "right": (1, None), "top": (None, 0), "upper": (None, 0), "bottom": (None, 1), "lower": (None, 1),
    "middle": (0.5, 0.5), "center": (0.5, 0.5), "centre": (0.5, 0.5),
}  # fmt: skip


def article(words: str) -> str:
    """ "a" or "an", as the words after it ask for."""
    return "an" if _VOWEL.match(words) else "a"


def with_article(text: str) -> str:
    """A phrase that starts with "a" or "an" with the right one of the two; any other phrase as it is."""
    match = re.match(r"(an?)(\s+)(.*)", text, re.IGNORECASE | re.DOTALL)
    if not match:
        return text
    return f"{match[1][0]}{'n' if _VOWEL.match(match[3]) else ''}{match[2]}{match[3]}"


def singular(noun: str) -> str:
    """The singular of a noun in lower case; a noun that is one already stays as it is."""
    head, _, last = noun.rpartition(" ")
    if head:
        return f"{head} {singular(last)}"
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if _NO_PLURAL.search(noun) or not noun.endswith("s"):
        return noun
    if noun.endswith("ies") and len(noun) > 4:
        return noun[:-3] + "y"
    if re.search(r"(?:ss|x|ch|sh|zz)es$", noun) or noun in ("tomatoes", "potatoes", "heroes", "mangoes"):
        return noun[:-2]
    return noun[:-1]


def plural(noun: str) -> str:
    """The plural of a noun in lower case."""
    head, _, last = noun.rpartition(" ")
    if head:
        return f"{head} {plural(last)}"
    if noun in _PLURALS:
        return _PLURALS[noun]
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(?:s|x|ch|sh)$", noun) else "s")


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 false positive", "2,000 false positives"."""
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def is_plural(noun: str) -> bool:
    """Whether a noun's last word is a plural."""
    last = noun.lower().rpartition(" ")[2]
    return last in _IRREGULAR or (last.endswith("s") and not _NO_PLURAL.search(last))


def listed(items: Sequence[str], conjunction: str = "and") -> str:
    """ "a cup", "a cup and a fork", "a cup, a fork and a knife"."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {conjunction} {items[-1]}"

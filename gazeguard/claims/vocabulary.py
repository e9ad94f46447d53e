"""Closed word lists of English captions: function words, colours and materials, directions, and nouns that are no objects.

The lists stand in ``data/vocabulary.txt``. One letter per class; the patterns of `gazeguard.claims.phrases` are written in
these letters. Open-class words (nouns, verbs, adjectives, adverbs) are decided by `gazeguard.claims.tagger`, with what
stands here as the final word.
"""

from __future__ import annotations

import re
from importlib.resources import files


def _read() -> dict[str, str]:
    text = files("gazeguard.claims").joinpath("data/vocabulary.txt").read_text(encoding="utf-8")
    sections = re.split(r"^\[(.+)\]$", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)
    return dict(zip(sections[1::2], sections[2::2], strict=True))


_LISTS = _read()


def _group(prefix: str) -> dict[str, str]:
    """Word -> letter, of all lists whose name is the prefix and a letter."""
    names = [name for name in _LISTS if name.startswith(prefix + " ")]
    return {word: name[-1] for name in names for word in _LISTS[name].split()}


def _words(name: str) -> frozenset[str]:
    return frozenset(_LISTS[name].split())


COLOURS = _words("colours")
ABSTRACT, CONCRETE_DESPITE_ENDING = _words("abstract"), _words("concrete")
ABSTRACT_ENDINGS = tuple(_LISTS["abstract endings"].split())
CONCRETE_ING = _words("objects in -ing")
WEAK, EVALUATIVE, TOPICS = _words("weak"), _words("evaluative"), _words("topics")
UNCOUNTED = _words("uncounted")
SHADES, SHADE_MODIFIERS = _words("shades"), _words("shade modifiers")
COUNTS, NO_ATTRIBUTE, RELATIONAL = _words("counts"), _words("no attribute"), _words("relational")
MODIFIER_ENDINGS = tuple(_LISTS["modifier endings"].split())
# Measure words: the head comes after "of"; alone "m" is no object and "M" is one.
MEASURES = _group("measure")
# Kinds of the class "b": "B" forms of be, "H" have, "U" modals, "i" pronouns, "w" relatives, "h" there, "s" conjunctions,
# "G" 's.
FINE = _group("kind")
# Words whose class no neighbour changes, "Y" apart: a colour or material that is an object where no noun follows.
MEANINGS = (
    _group("closed")
    | dict.fromkeys(COLOURS, "a")
    | dict.fromkeys(_words("adjectives"), "a")
    | dict.fromkeys(_words("nouns and modifiers"), "Y")
)
# Pairs that mean something else than their words do, so that "hot", "stop" or "dining" does not mislead.
PAIRS = {
    tuple(pair.split()): name.removeprefix("pair ")
    for name, pairs in _LISTS.items()
    if name.startswith("pair ")
    for pair in pairs.split(",")
}

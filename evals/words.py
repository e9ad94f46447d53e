"""Words of a text: tokens, tags and base forms, as the published metrics read them.

Tokens are NLTK's (`nltk.word_tokenize` without Punkt: sentences end at ``.``, ``!`` or ``?`` before white space).
Singulars and part-of-speech tags are TextBlob's, which are those of the `pattern` library.

Base forms are WordNet's: the endings are those of `morphy(7WN)`, the shortest base form wins (as NLTK's
``WordNetLemmatizer`` has it), and `_OTHERWISE` holds what WordNet 3.0 says beyond the endings. WordNet itself is not
needed, because a base form matters only when it is one of the words that a metric knows.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Set
from functools import cache
from importlib import import_module
from typing import Any

from gazeguard.errors import InputError

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_ENDINGS = {
    "noun": (
        ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"),
        ("ies", "y"),
    ),
    # The last two are not rules of WordNet's: it lists these forms one by one.
    "verb": (
        ("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""), ("ied", "y"),
        (re.compile(r"([bdgmnpt])\1(ed|ing)$"), r"\1"),
    ),
}  # fmt: skip
# Of the forms that captions hold: irregular ones, and those where WordNet knows a shorter word, likely or not. It takes
# "vases" for blood vessels, "kites" (as a verb) for kits, and "men" for a noun of its own.
_OTHERWISE = {
    "noun": """children child grandchildren grandchild geese goose mice mouse oxen ox knives knife pocketknives
        pocketknife leaves leaf busses bus taxies taxi buffaloes buffalo flamingoes flamingo potatoes potato tomatoes
        tomato men men vases vas sports sport chopsticks chopstick earrings earring slippers slipper sunglasses
        sunglass""",
    "verb": """born bear borne bear tying tie sank sink sunk sink sunken sink lit light phoned phone phones phone
        phoning phone taxying taxi taxis taxis stove stave dining din moped mop parking park potted pot skies sky sports
        sport cares care cared care caring care kites kit kited kit kiting kit mares mar planes plan planed plan planing
        plan plates plat plated plat plating plat wines win wined win wining win scissors scissor trafficking traffic""",
}
_IRREGULAR = {kind: dict(zip(said.split()[::2], said.split()[1::2], strict=True)) for kind, said in _OTHERWISE.items()}


def sentences(text: str) -> list[list[str]]:
    """The tokens of every sentence."""
    return [_tokenizer().tokenize(sentence) for sentence in _SENTENCE_END.split(text)]


def singulars(text: str) -> list[str]:
    """Every token in lower case and in the singular, verbs and all: "has" becomes "ha" and "bus" "bu"."""
    return [_singular(token) for tokens in sentences(text.lower()) for token in tokens]


def lemmas(text: str, known: Set[str]) -> list[str]:
    """Every token in lower case and in its base form: that of a verb where it is tagged as one, else that of a noun.

    known: the words that matter; a word whose base form is none of them may be left as it is.
    """
    found = []
    for tokens in sentences(text.lower()):
        for token, tag in _tagger()(tokens):
            kind = {"V": "verb", "J": None, "R": None}.get(tag[:1], "noun")
            found.append(token if kind is None else lemma(token, kind, known))
    return found


def nouns(text: str, known: Set[str]) -> list[str]:
    """The base forms of the tokens that are tagged as nouns; case is kept, as AMBER keeps it."""
    tagged = (pair for tokens in sentences(text) for pair in _tagger()(tokens))
    return [lemma(token, "noun", known) for token, tag in tagged if tag.startswith("NN")]


def lemma(word: str, kind: str, known: Set[str]) -> str:
    """The shortest base form that is known, or the word as it is. kind: "noun" or "verb"."""
    if word in _IRREGULAR[kind]:
        return _IRREGULAR[kind][word]
    forms = [word]
    for ending, base in _ENDINGS[kind]:
        if isinstance(ending, re.Pattern):
            forms.append(ending.sub(base, word))
        elif word.endswith(ending) and not (ending == "s" and word.endswith("ss")):
            forms.append(word[: -len(ending)] + base)
    return min((form for form in forms if form in known), key=len, default=word)


def library(name: str) -> Any:
    """A module of the libraries that a plain install lacks. Raises `InputError` where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(
            f"{name.partition('.')[0]} is not installed. Install it: pip install '.[evals]' in the checkout"
        ) from error


@cache
def _tokenizer() -> Any:
    return library("nltk.tokenize").NLTKWordTokenizer()


@cache
def _singular(token: str) -> str:
    return library("textblob.en.inflect").singularize(token)


@cache
def _tagger() -> Callable[[list[str]], list[list[str]]]:
    """Tokens of one sentence -> pairs of token and Penn Treebank tag."""
    parser = library("textblob.en").parser
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # TextBlob leaves its word list open, at the first call
        parser.find_tags(["a"])
    return parser.find_tags

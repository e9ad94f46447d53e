"""Language gate: is a sentence English that the parser can read?

The share of words that the lexicon knows decides the clear cases: .5 and more in nearly every English caption, less in
nearly every other text. In between, `py3langid` names the language. Short captions give no library enough to go by ("A red
star."), so the lexicon comes first. Measured in ``tests/data/reading``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any
from unicodedata import combining, normalize

from gazeguard.claims.english import singular
from gazeguard.claims.tagger import lexicon
from gazeguard.claims.vocabulary import MEANINGS, MEASURES

CLEAR, FAIR, POOR = (
    0.8,
    0.6,
    0.5,
)  # shares of known words: surely English; English if it is ASCII; unreadable at four words and more
SURE = 0.9  # probability of another language from which a single word is refused
_STARTS = frozenset(["a", "an", "the", "this", "that", "these", "those", "two", "three", "some", "my", "his", "her"])
_ARTICLES = frozenset(["a", "an", "the", "with", "and", "of", "is", "are"])
_LETTER = re.compile(r"[^\W\d_]")
# The languages that are told apart; more of them make the library err on short English captions.
_LANGUAGES = [
    "en",
    "de",
    "fr",
    "es",
    "it",
    "pt",
    "nl",
    "pl",
    "tr",
    "ru",
    "ar",
    "ja",
    "zh",
    "sv",
    "da",
    "no",
    "fi",
    "cs",
    "hu",
    "ro",
    "el",
    "ko",
    "hi",
    "th",
    "vi",
    "id",
    "uk",
    "he",
    "fa",
]
_NAMES = {
    "de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese", "nl": "Dutch", "pl": "Polish",
    "tr": "Turkish", "ru": "Russian", "ar": "Arabic", "ja": "Japanese", "zh": "Chinese", "sv": "Swedish", "da": "Danish",
    "no": "Norwegian", "fi": "Finnish", "cs": "Czech", "hu": "Hungarian", "ro": "Romanian", "el": "Greek", "ko": "Korean",
    "hi": "Hindi", "th": "Thai", "vi": "Vietnamese", "id": "Indonesian", "uk": "Ukrainian", "he": "Hebrew", "fa": "Persian",
}  # fmt: skip
UNREADABLE = "not readable as English"


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(_LANGUAGES)
    return identifier


@lru_cache(maxsize=1 << 16)
def is_known(word: str) -> bool:
    """Whether a lower-case word is English as far as the lexicon knows; a compound is if its last part is."""
    word = word.partition("'")[0] or word
    if not word.isascii():  # "crêpe", "café"
        word = "".join(letter for letter in normalize("NFD", word) if not combining(letter))
    return (
        word in MEANINGS
        or word in MEASURES
        or word in lexicon()
        or singular(word) in lexicon()
        or ("-" in word and is_known(word.rpartition("-")[2]))
    )


def refusal(sentence: str, words: Sequence[str]) -> str | None:
    """Why a sentence cannot be read, None if it can.

    Args:
        sentence: The text.
        words: Its words in lower case, without numbers and signs.
    """
    words = [word for word in words if _LETTER.search(word) and not word.startswith("'")]
    if not words:
        return None
    share = sum(map(is_known, words)) / len(words)
    if share >= CLEAR:
        return None
    plain = sentence.isascii()
    if len(words) >= 4 and share < POOR:
        return _named(sentence) or UNREADABLE
    if share >= FAIR and (plain or not _ARTICLES.isdisjoint(words)):
        return None
    if plain and len(words) <= 2 and words[0] in _STARTS:
        return None
    return _named(sentence, SURE if plain and len(words) == 1 else 0.0)


def _named(sentence: str, least: float = 0.0) -> str | None:
    """ "in German", if the library takes the sentence for German with a probability of ``least`` or more."""
    code, probability = _identifier().classify(sentence)
    return None if code == "en" or probability < least else f"in {_NAMES.get(code, code)}"


def unknown_share(tokens: Sequence[int], unknown: int | None) -> float:
    """The share of tokens that the tokenizer does not know: above a few percent, the model did not read what was written.

    Args:
        tokens: Token ids of a prompt or a caption.
        unknown: The tokenizer's ``unk_token_id``; None if it has none.
    """
    return 0.0 if unknown is None or not tokens else sum(token == unknown for token in tokens) / len(tokens)

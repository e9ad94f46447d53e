"""Repetition loops: degenerate text in which a model says the same words, or the same letters, again and again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEAST = 6  # repeats without a break; lists of real captions name an object two or three times
LONG, LEAST_OF_LONG = 12, 3  # words; more of them than LONG are a loop from fewer repeats on
LONGEST = 160  # words of what is repeated
LEAST_IN_WORD = 20  # repeats of letters within one word
MAX_SHOWN = 60  # characters of it in a reason
_WORD = re.compile(r"\w[\w'\u2019-]*")
_LETTERS = re.compile(rf"([^\W_]{{1,12}}?)\1{{{LEAST_IN_WORD - 1},}}")


class Repetition(NamedTuple):
    """Words, or letters, that a text repeats without a break.

    Attributes:
        text: The words, as they stand there first.
        times: How often they stand there, the first time included.
    """

    text: str
    times: int

    def __str__(self) -> str:
        """The loop in words: "'a red horse' repeated 80 times"."""
        return f"{shortened(self.text)!r} repeated {self.times} times"


def shortened(text: str) -> str:
    """A text as it stands in a reason: at most `MAX_SHOWN` characters."""
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "\u2026"


def find_repetition(text: str) -> Repetition | None:
    """Find the shortest words that a text repeats in a row, or letters within a word; None where there are none.

    Words count from `LEAST` repeats on, more than `LONG` of them from `LEAST_OF_LONG` on. Case, the signs between the words,
    and which number stands where a number stands ("1. A dog 2. A dog") do not count.
    """
    found = list(_WORD.finditer(text))
    words = ["0" if match[0].isdecimal() else match[0].lower() for match in found]
    index = {word: i for i, word in enumerate(dict.fromkeys(words))}
    ids = np.array([index[word] for word in words], dtype=np.int64)
    spare = len(words) - len(index)  # every repeat adds words, and none that is new
    for period in range(1, min(LONGEST, spare // (LEAST_OF_LONG - 1)) + 1):
        more = ((LEAST if period <= LONG else LEAST_OF_LONG) - 1) * period  # words behind the first time
        if more > spare:
            continue
        breaks = np.concatenate(([-1], np.flatnonzero(ids[period:] != ids[:-period]), [len(words) - period]))
        runs = np.diff(breaks) - 1  # words in a row that stand again one period later
        for i in np.flatnonzero(runs >= more):
            start, run = int(breaks[i]) + 1, int(runs[i])
            if set(words[start : start + period]) != {"0"}:  # numbers alone are no loop
                first = _phrase_start(text, found, start, period, run - more)
                times = (start + run + period - first) // period
                return Repetition(text[found[first].start() : found[first + period - 1].end()], times)
    return _repeated_letters(text, found)


def _repeated_letters(text: str, found: Sequence[re.Match[str]]) -> Repetition | None:
    if all(len(match[0]) < LEAST_IN_WORD for match in found) or (match := _LETTERS.search(text)) is None:
        return None
    return Repetition(match[1], len(match[0]) // len(match[1]))


def _phrase_start(text: str, found: Sequence[re.Match[str]], first: int, period: int, spare: int) -> int:
    """The first word of a loop: behind a sign, where one period has a sign and enough of the loop is left."""
    for i in range(first, first + min(period, spare + 1)):
        if i == 0 or re.search(r"[^\w\s]|\n", text[found[i - 1].end() : found[i].start()]):
            return i
    return first

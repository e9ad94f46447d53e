"""Repetition loops: degenerate text in which a model says the same words again and again."""

from __future__ import annotations

import re
from typing import NamedTuple

LEAST = 6  # repeats without a break; lists of real captions name an object two or three times
LONGEST = 24  # words of what is repeated
MAX_SHOWN = 60  # characters of it in a reason
_WORD = re.compile(r"\w[\w'\u2019-]*")


class Repetition(NamedTuple):
    """Words that a text repeats without a break.

    Attributes:
        text: The words, as they stand there first.
        times: How often they stand there, the first time included.
    """

    text: str
    times: int

    def __str__(self) -> str:
        """The loop in words: "'a red horse' repeated 80 times"."""
        shown = self.text if len(self.text) <= MAX_SHOWN else self.text[: MAX_SHOWN - 1] + "\u2026"
        return f"{shown!r} repeated {self.times} times"


def find_repetition(text: str) -> Repetition | None:
    """Find the shortest words that a text repeats at least `LEAST` times in a row; None where it does not.

    Case and the signs between the words do not count. Linear in the length of the text.
    """
    found = list(_WORD.finditer(text))
    words = [match[0].lower() for match in found]
    for period in range(1, min(LONGEST, len(words) // LEAST) + 1):
        run = 0  # words in a row that stand again one period later
        for i in range(len(words) - period + 1):
            if i + period < len(words) and words[i] == words[i + period]:
                run += 1
            elif run >= (LEAST - 1) * period:
                first = _phrase_start(text, found, i - run, period, run)
                start, end = found[first].start(), found[first + period - 1].end()
                return Repetition(text[start:end], (i - first) // period + 1)
            else:
                run = 0
    return None


def _phrase_start(text: str, found: list[re.Match[str]], first: int, period: int, run: int) -> int:
    """The first word of a loop: behind a sign, where one period has a sign and enough of the loop is left."""
    for i in range(first, first + min(period, run - (LEAST - 1) * period + 1)):
        if i == 0 or re.search(r"[^\w\s]|\n", text[found[i - 1].end() : found[i].start()]):
            return i
    return first

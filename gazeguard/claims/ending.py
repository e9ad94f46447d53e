"""Ending of a caption: whether it stops in the middle of a clause, as a text does that was cut off."""

from __future__ import annotations

import re

from gazeguard.claims.phrases import Reading

# The last units: an article with nothing it could belong to, "and", a comma, "a group of", "there is".
_OPEN = re.compile(r"(?:D[aegnLS]*+|[c|]|,|o|hB)$")
_SIGNS = frozenset(",;:&/-\u2013\u2014")  # other signs, such as a bracket, may end a text
_ENDS = frozenset(["his", "her", "both", "all", "each", "another"])  # "he looks at her", "two of each"
_LEADS_ON = frozenset(["with", "of", "from", "between", "into", "wearing", "holding"])  # no clause of a caption ends so
_MOST_WORDS = 3  # of what is shown


def open_ending(reading: Reading) -> str:
    """The last words of a text that ends in the middle of a clause ("on the left and a"); "" for one that does not.

    A missing full stop is no open ending.
    """
    if not reading.tokens:
        return ""
    last = reading.tokens[-1]
    match = _OPEN.search(reading.codes)
    if match is not None:
        first = reading.tokens[reading.units[match.start()].first]
        is_open = last.word in _SIGNS if match[0] == "," else first.word not in _ENDS
    else:
        is_open = last.word in _LEADS_ON
    if not is_open or reading.text[last.end :].strip():  # what follows is no statement, such as a tag or an offer
        return ""
    return " ".join(reading.text.split()[-_MOST_WORDS:])

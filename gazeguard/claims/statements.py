"""Statements of a caption beyond the phrase: negation, hedges, predicative attributes, relations and actions.

Everything works on the units of a `Reading` (`gazeguard.claims.phrases`): object phrases "K", locations "P", and single words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from gazeguard.claims.phrases import Phrase, Reading, Span
from gazeguard.claims.vocabulary import COLOURS, NO_ATTRIBUTE, RELATIONAL

# What is absent: from the word that says so to the first object, and on through "cups, plates or forks".
_ABSENT = re.compile(r"-[^-ptq.,cKs]*+(?P<absent>K(?:(?:,K)*+,?+\|K)*+)")
_ALTERNATIVES = re.compile(r"K(?:,K)*+,?+\|,?+K")
_HEDGES = frozenset(
    [
        "possibly",
        "perhaps",
        "maybe",
        "probably",
        "likely",
        "presumably",
        "apparently",
        "potentially",
        "supposedly",
        "might",
        "may",
        "suggest",
        "suggests",
        "suggesting",
        "suggested",
        "indicate",
        "indicates",
        "indicating",
        "imply",
        "implies",
        "implying",
        "hint",
        "hints",
        "hinting",
        "evoke",
        "evokes",
        "evoking",
        "resemble",
        "resembles",
        "resembling",
        "reminiscent",
        "seem",
        "seems",
        "seeming",
        "seemingly",
    ]
)
_HEDGES_BEFORE = {  # a hedge only before these
    "appear": "tae", "appears": "tae", "appearing": "tae", "could": "B", "looks": "q", "look": "q", "looking": "q", "as": "s",
    "what": "", "like": "D",
}  # fmt: skip
_END_OF_HEDGE = frozenset(".,;s")
_LINKS = frozenset(["look", "looks", "remain", "remains", "stay", "stays", "feel", "feels"])
_PAINTED = frozenset(["painted", "coloured", "colored", "dyed", "tinted"])
_FINITE = frozenset("vBHU")
_DEFINITE = frozenset(["the", "his", "her", "its", "their", "this", "that", "these", "those"])


@dataclass(frozen=True, slots=True)
class Predicate:
    """An attribute outside the phrase of its object: "red" in "The train is red"."""

    subject: Phrase
    span: Span


@dataclass(frozen=True, slots=True)
class Relation:
    """Two objects and the words between them: "a dog", "next to", "a cat"."""

    first: Phrase
    second: Phrase
    words: Span


@dataclass(frozen=True, slots=True)
class Action:
    """A verb of a caption and the object that does it, None where the caption names none."""

    verb: Span
    subject: Phrase | None


def unjudged(reading: Reading) -> dict[int, str]:
    """The units that are not asserted -> "negation" or "hedge"."""
    codes = reading.codes
    result: dict[int, str] = {}
    for match in _ALTERNATIVES.finditer(codes):
        result |= {i: "hedge" for i in range(*match.span()) if codes[i] == "K"}
    for i, unit in enumerate(reading.units):
        if unit.phrase is None and _is_hedge(reading, i):
            result |= dict.fromkeys(range(i + 1, _end_of_hedge(codes, i)), "hedge")
    for i in _presupposed(reading, result):
        del result[i]
    for match in _ABSENT.finditer(codes):
        result |= {i: "negation" for i in range(*match.span("absent")) if codes[i] == "K"}
    return result


def _presupposed(reading: Reading, silent: dict[int, str]) -> list[int]:
    """Hedged phrases that take up an object which the caption asserts elsewhere: "possibly waiting for the train"."""
    heads = {
        unit.phrase.head.text.lower()
        for i, unit in enumerate(reading.units)
        if unit.code == "K" and unit.phrase and i not in silent
    }
    return [
        i
        for i in silent
        if (phrase := reading.units[i].phrase) is not None
        and phrase.head.text.lower() in heads
        and reading.tokens[reading.units[i].first].word in _DEFINITE
    ]


def _is_hedge(reading: Reading, i: int) -> bool:
    word, codes = reading.word(i), reading.codes
    if word in _HEDGES:
        return True
    if word not in _HEDGES_BEFORE or i + 1 >= len(codes):
        return False
    if word == "like":  # "shaped like a heart", but not "fruits like apples"
        after = reading.units[i + 1]
        return codes[i + 1] == "K" and reading.tokens[after.first].word in ("a", "an", "the")
    if word == "as":
        return reading.word(i + 1) in ("if", "though")
    if word in ("looks", "look", "looking"):
        return reading.word(i + 1) == "like"
    return codes[i + 1] in _HEDGES_BEFORE[word]


def _end_of_hedge(codes: str, i: int) -> int:
    j = i + 1
    while j < len(codes) and codes[j] not in _END_OF_HEDGE:
        if codes[j] == "c" and re.match(r"c(?:K|i|h)r*[vBHU]", codes[j : j + 6]):
            break
        j += 1
    return j


class Statements:
    """What a reading states of its objects; ``silent`` are the units that are not asserted."""

    def __init__(self, reading: Reading, silent: dict[int, str]) -> None:
        self.reading, self.codes, self.silent = reading, reading.codes, silent

    def _phrase(self, i: int | None) -> Phrase | None:
        return None if i is None or i in self.silent else self.reading.units[i].phrase

    # ------------------------------------------------------------------------------------------------ subjects

    def _clause_start(self, i: int) -> int:
        """The unit at which the clause around ``i`` starts."""
        j = i
        while j > 0:
            code = self.codes[j - 1]
            if code in ".sw" or (code == "," and self.reading.tokens[self.reading.units[j - 1].first].word in ";:"):
                break
            if code == "," and self._starts_clause(j, i):
                break
            if code == "c" and self._starts_clause(j, i) and self._has_verb(j - 1):
                break
            if self.codes[j] == "K" and self.reading.word(j) == "whose":
                break
            j -= 1
        return j

    def _starts_clause(self, j: int, i: int) -> bool:
        """Whether an object at ``j`` (after "and") is the subject of the verb at ``i``."""
        j += j < len(self.codes) and self.codes[j] == "c"
        between = self.codes[j:i]
        return bool(re.fullmatch(r"r*[Ki](?:[po]+K)*r*", between))

    def _has_verb(self, j: int) -> bool:
        k = j
        while k > 0 and self.codes[k - 1] not in ".s":
            k -= 1
            if self.codes[k] in _FINITE:
                return True
        return False

    def subject(self, i: int) -> int | None:
        """The object that the verb or copula at unit ``i`` is said of."""
        codes = self.codes
        j = i - 1
        while j >= 0 and codes[j] in "r-":
            j -= 1
        if j < 0:
            return None
        if codes[j] == "w":  # "the cabin, which is small"
            j -= 1
            j -= j >= 0 and codes[j] == ","
            while j >= 0 and codes[j] == "P":
                j -= 1
            return j if j >= 0 and codes[j] == "K" else None
        if codes[j] == "i":
            return self._antecedent(j)
        return self._first_object(self._clause_start(i), i)

    def _first_object(self, start: int, end: int) -> int | None:
        codes = self.codes
        for k in range(start, end):
            if codes[k] != "K":
                continue
            before = codes[k - 1] if k > start else ""
            owner = k + 1 < end and codes[k + 1] == "G"
            if before in ("p", "t", "q", "o", "g") or owner:
                continue
            return k
        return None

    def _antecedent(self, j: int) -> int | None:
        """What "it" or "they" at unit ``j`` takes up: the first object of the sentence before, or of this one."""
        if self.reading.word(j) not in ("it", "they"):
            return None
        sentence = self.reading.sentences[self.reading.units[j].first]
        same, before = [], []
        for k in range(j):
            if self.codes[k] == "K":
                number = self.reading.sentences[self.reading.units[k].first]
                if number == sentence:
                    same.append(k)
                elif number == sentence - 1:
                    before.append(k)
        return next(iter(same or before), None)

    # ---------------------------------------------------------------------------------------------- predicates

    def predicates(self) -> Iterator[Predicate]:
        """Predicative attributes: "is red and white", "remains soft", "its foliage full and vibrant", "painted green"."""
        done: dict[int, int] = {}  # unit of a copula -> subject, for "is small and is white"
        for i, code in enumerate(self.codes):
            if i in self.silent:
                continue
            contracted = code == "G" and i > 0 and self.codes[i - 1] in "ih"  # "it's red"
            if code == "B" or contracted or (code == "v" and self.reading.word(i) in _LINKS):
                owner = self.subject(i)
                if owner is None and i and self.codes[i - 1] == "c":
                    owner = next(reversed(done.values()), None)
                if owner is None:
                    continue
                done[i] = owner
                yield from self._adjectives(owner, i + 1)
            elif code == "e" and self.reading.word(i) in _PAINTED and i and self.codes[i - 1] == "K":
                yield from self._adjectives(i - 1, i + 1, colours=True)
            elif code == "K":
                yield from self._absolute(i)

    def _absolute(self, i: int) -> Iterator[Predicate]:
        """Adjectives right behind a noun: "its mane wild and wet"; "Truck: large, red"."""
        j = i + 1
        if re.match(r",[ae],", self.codes[j : j + 3]) and self.reading.word(j) == ":" and self._first_of_sentence(i):
            yield from self._adjectives(i, j + 1)
        elif match := re.match(r"(?:[rp]?,)?r*(?=a(?:[.,bs]|,?c[ae]|$))", self.codes[j : j + 8]):
            yield from self._adjectives(i, j + match.end())

    def _first_of_sentence(self, i: int) -> bool:
        return i == 0 or self.codes[i - 1] == "."

    def _adjectives(self, owner: int, j: int, colours: bool = False) -> Iterator[Predicate]:
        phrase = self._phrase(owner)
        codes = self.codes
        while phrase is not None and j < len(codes):
            if codes[j] == "r" or self.reading.word(j) in ("both", "all", "half"):
                j += 1
                continue
            word = self.reading.word(j)
            if codes[j] not in "ae" or j in self.silent or (colours and word not in COLOURS):
                return
            after = codes[j + 1 : j + 2]
            known = word in NO_ATTRIBUTE or (codes[j] == "e" and (word in RELATIONAL or self._passive(j)))
            if not known:
                unit = self.reading.units[j]
                yield Predicate(phrase, self.reading.span(unit.first, unit.last))
            step = re.match(r"(?:,?c|,)?r*(?=[ae])", codes[j + 1 :])
            if not after or step is None:
                return
            j += 1 + step.end()

    def _passive(self, j: int) -> bool:
        """Whether the participle at ``j`` has an agent: "is driven by a man"."""
        return j + 1 < len(self.codes) and self.reading.word(j + 1) == "by"

    # ----------------------------------------------------------------------------------------------- relations

    def relations(self) -> Iterator[Relation]:
        """Pairs of objects that a preposition, "with" or a verb joins."""
        codes = self.codes
        for match in re.finditer(r"(?P<join>(?:P(?=o))?[potqr]*[pot][potq]*|[gve][potr]*|H)K", codes):
            join, second = match.start("join"), match.end() - 1
            while join < second and codes[join] == "r":
                join += 1
            first = self._governor(join)
            if first is None or first == second or self.reading.word(join) in ("as", "like", "such"):
                continue
            yield from self._pair(first, join, second)
            yield from self._listed(first, join, second)

    def _pair(self, first: int, join: int, second: int) -> Iterator[Relation]:
        a, b = self._phrase(first), self._phrase(second)
        if a is not None and b is not None:
            words = self.reading.span(self.reading.units[join].first, self.reading.units[second].first)
            yield Relation(a, b, words)

    def _listed(self, first: int, join: int, second: int) -> Iterator[Relation]:
        """ "with a hat, a scarf and gloves": the relation holds of each."""
        at = second + 1
        while match := re.match(r"(?:,?c|,)K(?=[,c.]|$|[p])", self.codes[at : at + 4]):
            if re.match(r"(?:,?c|,)Kr?[vBHU]", self.codes[at : at + 6]):
                return
            at += match.end()
            yield from self._pair(first, join, at - 1)

    def _governor(self, join: int) -> int | None:
        """The object that a preposition or verb at unit ``join`` is said of."""
        codes = self.codes
        if codes[join] in "vH":
            return self.subject(join)
        j = join - 1
        while j >= 0 and codes[j] in "rP":
            j -= 1
        if j < 0:
            return None
        if codes[j] == "K":
            return j
        start = self._clause_start(join)
        return self._first_object(start, join)

    # ------------------------------------------------------------------------------------------------- actions

    def actions(self) -> Iterator[Action]:
        """Finite verbs and "-ing" words that are no modifier, with their subjects."""
        for i, code in enumerate(self.codes):
            if code in "vg" and i not in self.silent:
                unit = self.reading.units[i]
                subject = self.subject(i) if code == "v" else self._governor(i)
                yield Action(self.reading.span(unit.first, unit.last), self._phrase(subject))

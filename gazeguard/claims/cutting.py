"""Cutting of a sentence: what goes with an object that is removed, and how what is left stays a sentence.

An object goes with what hangs on it: its location, its preposition, the participle that holds it, the "there is" that has
nothing else to say. A list closes over the gap. There is no parser: a sentence is a string with one letter per phrase or
word, and patterns over that string say what can go.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gazeguard.claims.english import is_plural
from gazeguard.claims.phrases import Phrase
from gazeguard.errors import given

LONGEST = 400  # words of a sentence; the work grows faster than its length, so a longer one goes whole

# Words that a cut has to tell apart, beside the classes of `gazeguard.claims.vocabulary`: "there", forms of "be", pronouns, the
# openings of relative and of adverbial clauses, and what makes an owner. "K" is an object, "X" one to cut, "P" a location,
# "Q" one to cut, "Z" a predicative attribute to cut.
_TABLES = {
    "h": "there",
    "B": "is are was were be been being am",
    "i": "i you he she it we they someone everyone others",
    "x": "himself herself itself themselves him them",
    "w": "which that who whom where",
    "s": "while but whereas because so yet when if although though",
    "G": "'s ' \u2019s \u2019",
    ",": ",",
    ";": "; :",
}
_CODE = {word: letter for letter, several in _TABLES.items() for word in several.split()}
_BACK = frozenset(
    ["he", "she", "it", "they", "his", "its", "their"]
)  # as a sentence's first word: takes up what was named before
_SINGLE = frozenset(["a", "an", "one", "another", "each", "every", "this", "that"])

_TAIL = r"[^,;.c|sBvbhiw'G]*(?:w[^,;.c|s']*)?"  # what hangs on an object, up to the next part of the sentence
_HANGS = re.compile(rf"G?{_TAIL}")  # with a stray mark of possession, of an owner of nothing
_LEFT, _RIGHT = re.compile(r"(?:,?[c|]|,)$"), re.compile(r",?[c|]|,")
_LISTED = re.compile(rf"[KX]{_TAIL}$")
_COMMA_OF_LIST = re.compile(rf",(?=[KX]{_TAIL}$)")
_LOOSE = re.compile(r"(?:D[aerngc]*)?$")  # an article and adjectives that the phrase left out
_BEFORE = re.compile(r"(?:[potq]*rr(?=o)|r?(?:[ar](?=t))?)[potq]+$")  # "in", "close to", "in front of", "with a lot of"
# Where one clause ends and the next begins, given that something finite came before.
_CLAUSE = re.compile(rf";|,?(?<!q)s|,?c(?=[Pr,]*(?:[KX]{_TAIL}(?<![tp])|[ih])[Bvb])|,(?=r?(?:h|i)[Bvb])")


@dataclass(frozen=True)
class Unit:
    """A phrase, a word or a sign of a sentence.

    Attributes:
        code: Which: see the table above.
        gap: The white space before it.
        text: The word or phrase, without the attributes that are cut.
        phrase: The phrase; None for a word.
    """

    code: str
    gap: str
    text: str
    phrase: Phrase | None = None


def code_of(text: str, letter: str) -> str:
    """The code of a word with its class."""
    return _CODE.get(text.lower()) or ("'" if letter == "," else "x" if letter in "wTmY" else letter)


def takes_up(unit: Unit) -> bool:
    """Whether a sentence that starts with this unit speaks of what was named before."""
    return unit.text.lower() in _BACK


def cut_marked(units: list[Unit]) -> list[Unit]:
    """The units of a sentence without those that are to be cut and what cannot stay without them."""
    if len(units) > LONGEST:
        return []
    while (i := next((i for i, unit in enumerate(units) if unit.code in "XQZ"), None)) is not None:
        first, last = _clause(units, i)
        inside = _cut(units[first:last], i - first)
        if inside is not None:
            units = [*units[:first], *inside, *units[last:]]
            continue
        units = _joined(units[:first], units[last:])
        if not first and units and takes_up(units[0]):  # "..., but they are ..."
            units = []
    # What has lost its statement is no sentence; the caller keeps what it still names.
    return units if any(unit.code in "KPBvbNxI" for unit in units) and units[0].code != "." else []


def _codes(units: Sequence[Unit]) -> str:
    return "".join(unit.code for unit in units)


def _clause(units: Sequence[Unit], i: int) -> tuple[int, int]:
    """The clause around a unit: from behind what joins it to the one before, up to what joins it to the next."""
    codes = _codes(units)
    end = len(codes) - 1 if codes.endswith(".") else len(codes)
    first = 0
    for joint in _CLAUSE.finditer(codes, 0, end):
        # A clause that opens the sentence ("While a man sits, ...") begins with its joint.
        if not re.search(r"[Bvb]", codes[first : joint.start()]):
            continue
        if joint.start() > i:
            return first, joint.start()
        if joint.end() <= i:
            first = joint.end()
    return first, end


def _joined(before: list[Unit], after: list[Unit]) -> list[Unit]:
    """What is left when the clause between is gone, and with it what joined it to the rest."""
    joint = re.search(r"(?:;|,?[sc]|,)$", _codes(before))
    if joint:
        before = before[: joint.start()]
    else:
        after = after[given(re.match(r"(?:;|,?[sc]|,)?", _codes(after))).end() :]
    return [*before, *after]


def _cut(units: list[Unit], i: int) -> list[Unit] | None:
    """A clause without its unit ``i``; None when it cannot stand without it."""
    return {"Q": _cut_location, "Z": _cut_predicate}.get(units[i].code, _cut_object)(units, i)


def _cut_location(units: list[Unit], i: int) -> list[Unit] | None:
    codes = _codes(units)
    j = i + 1 + len(given(re.match(r"(?:o[KX])?", codes[i + 1 :]))[0])
    if codes[:i].endswith(("B", "s")) or re.search(r"[ptoq]$", codes[:i]):
        return None
    if i == 0:
        j += codes[j : j + 1] == ","
    elif both := re.match(r",?[c|](?=[PQp])", codes[j:]):
        j += both.end()
    elif left := re.search(r",?[c|]$", codes[:i]):
        i = left.start()
    elif codes[:i].endswith(",") and codes[j : j + 1] in ("", ","):
        i -= 1
    return [*units[:i], *units[j:]]


def _cut_predicate(units: list[Unit], i: int) -> list[Unit] | None:
    """A predicative attribute out of its list: "is red and white" is "is white"; None when it was all that is stated."""
    codes = _codes(units)
    first = i
    while first and codes[first - 1] == "r":
        first -= 1
    joint = re.search(r"[aeZ](,?c|,)$", codes[:first])
    further = re.match(r"(,?c|,)r*[aeZ]", codes[i + 1 :])
    if joint is None:
        return None if further is None else [*units[:first], *units[i + 1 + further.end(1) :]]
    rest = [*units[: joint.start(1)], *units[i + 1 :]]
    before = re.search(r"[aeZ](,)r*[aeZ]$", codes[: joint.start(1)])
    if "c" in joint[1] and before:  # "red, white and blue" without its end is "red and white"
        conjunction = next(unit for unit in units[joint.start(1) : first] if unit.code == "c")
        rest[before.start(1)] = replace(conjunction, gap=" ")
    return rest


def _cut_object(units: list[Unit], i: int) -> list[Unit] | None:
    codes = _codes(units)
    if re.match(r"G[^,;.'c|]", codes[i + 1 :]):  # an owner: "the man's hat" leaves "the hat"
        the = "The" if units[i].text[:1].isupper() else "the"
        return [*units[:i], Unit("D", units[i].gap, the), *units[i + 2 :]]
    if codes[:i].endswith("G"):
        return None
    j = i + 1 + given(_HANGS.match(codes[i + 1 :])).end()
    hangs, i = codes[i + 1 : j], given(_LOOSE.search(codes[:i])).start()
    left = codes[:i]
    front = not re.search(r"[Bvbhi]", left) and not re.match(r"[rPs]*,?[KX]", left.replace("P,", "P"))
    if (joint := _LEFT.search(left)) and not (front and joint[0] == ",") and _LISTED.search(left[: joint.start()]):
        return _closed(units, joint.start(), j, joint.start(), i)
    after = _RIGHT.match(codes[j:])
    # "a man wearing glasses and a suit": the list is not of men.
    if (
        after
        and "g" not in hangs
        and re.match(r"[KX]", codes[j + after.end() :])
        and not (after[0] == "," and _BEFORE.search(left) and front)
    ):
        return _agreeing(_headless(units, i, j + after.end()))
    if before := _BEFORE.search(left):
        return _cut_preposition(units, before.start(), i, j)
    if re.search(r"r?g$", left):
        return _cut_participle(units, i - 1 - left.endswith("rg"), j)
    return None


def _headless(units: list[Unit], i: int, j: int) -> list[Unit]:
    """A list without its first object, ``i`` to ``j``. A comma that then separates two objects alone goes."""
    rest = units[j:]
    two = re.match(rf"[KX]{_TAIL}(,)[c|]", _codes(rest))
    if two and _codes(units[i:j]).endswith(","):
        rest = [*rest[: two.start(1)], *rest[two.end(1) :]]
    first = replace(rest[0], gap=units[i].gap)
    return [*units[:i], first, *rest[1:]]


def _closed(units: list[Unit], i: int, j: int, joint: int, item: int) -> list[Unit]:
    """A list without the object that stands, with the joint before it, from ``i`` to ``j``."""
    codes, result = _codes(units), [*units[:i], *units[j:]]
    conjunction = [unit for unit in units[joint:item] if unit.code in "c|"]
    further = re.match(r",?[c|]", codes[j:])
    commas = _COMMA_OF_LIST.search(codes[:i])
    if conjunction and commas and not further:
        # "a cup, a fork and a knife" without its end: "a cup and a fork"; in longer lists a serial comma stays.
        at, serial = commas.start(), units[joint].code == ","
        more = _COMMA_OF_LIST.search(codes[:at])
        result = [*result[: at + (1 if serial and more else 0)], replace(conjunction[0], gap=" "), *result[at + 1 :]]
    elif not conjunction and further and further[0].startswith(",") and not commas:
        del result[i]  # "a cup, a fork, and a knife" without its middle: "a cup and a knife"
    return _agreeing(result)


def _agreeing(units: list[Unit]) -> list[Unit]:
    """ "there are" and "is" as the objects ask for that are left of a list."""
    codes = _codes(units)
    result = list(units)
    if match := re.search(rf"h(B)[rn]*([KX]){_TAIL}(,?[c|](?=[KX])|,(?=[KX]))?", codes):
        verb, item = match.start(1), units[match.start(2)]
        many = not is_single(item) or (match[3] and units[verb].text in ("are", "were"))
    elif (match := re.search(rf"(?:^|[,sP])([KX]){_TAIL}(B)", codes)) and not re.search(r"[,c|]", codes[: match.start(1)]):
        verb, item = match.start(2), units[match.start(1)]
        many = not is_single(item)
    else:
        return result
    change = {"are": "is", "were": "was"} if not many else {"is": "are", "was": "were"}
    if many and not item.phrase:
        return result
    result[verb] = replace(units[verb], text=change.get(units[verb].text, units[verb].text))
    return result


def is_single(unit: Unit) -> bool:
    """Whether an object is one, or cannot be counted."""
    if unit.phrase is None or re.match(r"(?:an?|another)\s+(?:few|couple|dozen|lot|group|variety|number)\b", unit.text, re.I):
        return False
    first = unit.text.split()[0].lower()
    return first in _SINGLE or not is_plural(unit.phrase.head.text)


def _cut_preposition(units: list[Unit], k: int, i: int, j: int) -> list[Unit] | None:
    """Without what a preposition leads in: the prepositions are ``k`` to ``i``, the object and its tail end at ``j``."""
    codes = _codes(units)
    left = codes[:k]
    if not re.match(r"[egwao]", codes[i + 1 :]) and "o" not in codes[k:i]:
        j = i + 1  # what stands behind holds of more than this object
    if left.endswith(("B", "Be", "h", "b", "s")) or (left.endswith("v") and re.search(r"[oq]", codes[k:i])):
        return None
    if re.search(r"(?:^|[KXPx,])r?e$", left):
        k -= 1
        k -= codes[:k].endswith("r")
        left = codes[:k]
    if left == "" or re.fullmatch(r"r,?", left):
        if codes[j : j + 1] in ("", ".") or not re.search(r"[Bv]", codes[j:]):
            return None
        comma = given(re.match(r"[^,;]*,|", codes[j:]))  # "In addition to the food and drinks, ..."
        return [*units[:k], *units[j + comma.end() :]]
    if joint := re.search(r",?[c|]$", left):
        k = joint.start()
    elif left.endswith(",") and codes[j : j + 1] in ("", ",", "c", "|"):
        k -= 1
    return [*units[:k], *units[j:]]


def _cut_participle(units: list[Unit], k: int, j: int) -> list[Unit] | None:
    """Without what a participle does: it stands at ``k``, and its object and what hangs on it end at ``j``."""
    codes = _codes(units)
    left, right = codes[:k], codes[j:]
    if led := re.search(r"[pqs]$", left):
        k, left = led.start(), left[: led.start()]
    elif left.endswith("P") and units[k - 1].text.endswith(" of"):  # "in the middle of throwing a ball"
        k, left = k - 1, left[:-1]
    if left == "":
        return [*units[j + 1 :]] if right.startswith(",") and re.search(r"[Bv]", right) else None
    if more := re.match(r",?[c|](?=r?g)", right):  # "wearing a hat and holding a cup" without its first half
        return [*units[:k], *units[j + more.end() :]]
    if left.endswith(("B", "b", "h")):
        return None
    if joint := re.search(r",?[c|]$", left):
        return [*units[: joint.start()], *units[j:]]
    if left.endswith(",") or left[-1] in "KXPxegra":
        k -= left.endswith(",") and right[:1] in ("", ",", "c", "|")
        return [*units[:k], *units[j:]]
    return None

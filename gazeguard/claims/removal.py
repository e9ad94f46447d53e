"""What is left of a caption when some of its phrases are cut? A text that can still be read.

A thing goes with what hangs on it: its place, its preposition, the participle that holds it, the "there is" that has
nothing else to say. A list closes over the gap. Where a sentence or clause cannot stand without the thing it goes whole, and
what else it named, if it is named nowhere else, is kept as "There is a ball."

As in `gazeguard.phrases`, there is no parser: a sentence becomes a string with one letter per phrase or word, and patterns
over that string say what can go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from gazeguard.claims.parse import Phrase, chunk, words

LONGEST = 400  # words of a sentence; the work grows faster than its length, so a longer one goes whole

# Words that a cut has to tell apart, beside the classes of `gazeguard.phrases`: "there", forms of "be", pronouns, the
# openings of relative and of adverbial clauses, and what makes an owner. "K" is a thing, "X" one to cut, "P" a place.
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
_LISTS = {
    "back": "he she it they his its their",  # as a sentence's first word: speaks of what was said before
    "single": "a an one another each every this that",
    "plural": "people men women children",  # without an s
    "uncounted": """water snow grass sand dirt fruit food rice bread meat cheese broccoli luggage furniture equipment clothing
        traffic vegetation foliage wood hair ice mud gravel silverware greenery lettuce milk coffee tea wine beer juice""",
}  # fmt: skip
_BACK, _SINGLE, _PLURAL, _UNCOUNTED = (frozenset(several.split()) for several in _LISTS.values())
_VOWEL = re.compile(r"(?!(?:uni|use|usu|uten|eu|one|once)[a-z]*)[aeiou]|hour|honest|heir", re.I)

_TAIL = r"[^,;.c|sBvbhiw'G]*(?:w[^,;.c|s']*)?"  # what hangs on a thing, up to the next part of the sentence
_HANGS = re.compile(_TAIL)
_LEFT, _RIGHT = re.compile(r"(?:,?[c|]|,)$"), re.compile(r",?[c|]|,")
_LISTED = re.compile(rf"[KX]{_TAIL}$")
_COMMA_OF_LIST = re.compile(rf",(?=[KX]{_TAIL}$)")
_LOOSE = re.compile(r"(?:D[aerngc]*)?$")  # an article and adjectives that the phrase left out
_BEFORE = re.compile(r"r?(?:[ar](?=t))?[potq]+$")  # "in", "next to", "close to", "in front of"
# Where one clause ends and the next begins, given that something finite was said before.
_CLAUSE = re.compile(rf";|,?(?<!q)s|,?c(?=[Pr,]*(?:[KX]{_TAIL}(?<![tp])|[ih])[Bvb])|,(?=r?(?:h|i)[Bvb])")


@dataclass(frozen=True)
class _Unit:
    """A phrase, a word or a sign: ``code`` says which, ``gap`` is the white space before it."""

    code: str
    gap: str
    text: str
    phrase: Phrase | None = None


@dataclass(frozen=True)
class _Sentence:
    """``lead``: white space and the marker of a list before it. ``units``: what it consists of, its full stop included."""

    lead: str
    units: list[_Unit]


def without(caption: str, spans: Iterable[tuple[int, int]]) -> str:
    """The caption without the phrases and attributes that overlap ``spans`` (character offsets, end exclusive).

    A span on an attribute alone ("red" of "a red star") cuts that word; one that reaches a thing's noun, or a place, cuts the
    phrase. Spans on other words cut nothing, and no span at all gives the caption itself. What is left may be empty.
    """
    spans, phrases = list(spans), chunk(caption)
    plainer, cut = {}, set()
    for phrase in phrases:
        hit = [span for span in spans if span[0] < phrase.end and phrase.start < span[1]]
        if any(_overlap(span, phrase.head) for span in hit) or (hit and phrase.kind == "location"):
            cut.add(phrase)
        elif gone := [(a.start, a.end) for a in phrase.attributes if any(_overlap(span, a) for span in hit)]:
            plainer[phrase] = _plainer(phrase, gone)
    if not cut and not plainer:
        return caption
    made: list[tuple[_Sentence, list[_Unit]]] = []  # each sentence that is left, and the things that went with what went
    orphaned = False  # what the last sentence was about is gone
    for sentence in _sentences(caption, phrases, plainer, cut):
        before, after = sentence.units, sentence.units
        if any(unit.code in "XQ" for unit in before):
            after = _repaired(before)
        elif orphaned and before[0].text.lower() in _BACK:
            after = []
        first = next((unit.code for unit in before if unit.code in "KX"), "K")
        orphaned = not after and (first == "X" or orphaned)
        kept = {unit.phrase for unit in after}
        made.append((_Sentence(sentence.lead, after), [u for u in before if u.code == "K" and u.phrase not in kept]))
    named = {_noun(unit.phrase) for sentence, _ in made for unit in sentence.units if unit.code == "K"}
    text, carried = "", ""
    for sentence, lost in made:
        rescued = []
        for unit in lost:
            if _noun(unit.phrase) not in named:
                named.add(_noun(unit.phrase))
                rescued.append(unit)
        if not sentence.units and not rescued:
            carried = carried or "".join(re.findall(r"\n\s*", sentence.lead))
            continue
        lead = sentence.lead if "\n" in sentence.lead or not text else carried or sentence.lead
        carried = ""
        said = [part for part in (_text(sentence.units), _there_is(rescued)) if part]
        text += (lead if text else lead.lstrip()) + " ".join(said)
    return text if text.strip() else ""


def _overlap(span: tuple[int, int], part: Phrase | object) -> bool:
    return span[0] < part.end and part.start < span[1]


def _noun(phrase: Phrase) -> str:
    return phrase.head.text.lower()


def _sentences(caption: str, phrases: Sequence[Phrase], plainer: dict[Phrase, str], cut: set[Phrase]) -> Iterator[_Sentence]:
    at = {phrase.start: phrase for phrase in phrases}
    lead, units, done = "", [], 0
    for span, letter in words(caption):
        if span.start < done:
            continue  # inside of a phrase
        gap = caption[done : span.start]
        if not span.text.strip() or (letter == "." and not units):  # an empty line, a list's marker, a stray full stop
            if units:
                yield _Sentence(lead, units)
                lead, units = "", []
            lead, done = lead + gap + span.text, span.end
            continue
        if not units:
            lead, gap = lead + gap, ""
        phrase = at.get(span.start)
        if phrase is None:
            end, unit = span.end, _Unit(_code(span.text, letter), gap, span.text)
        else:
            end, place = phrase.end, phrase.kind == "location"
            code = ("Q" if place else "X") if phrase in cut else ("P" if place else "K")
            unit = _Unit(code, gap, plainer.get(phrase, phrase.text), phrase)
        if units and units[-1].code == "." and letter != "." and gap:
            yield _Sentence(lead, units)
            lead, units, unit = gap, [], replace(unit, gap="")
        units.append(unit)
        done = end
    if units:
        yield _Sentence(lead, units)


def _code(text: str, letter: str) -> str:
    return _CODE.get(text.lower()) or ("'" if letter == "," else letter)


def _plainer(phrase: Phrase, gone: Sequence[tuple[int, int]]) -> str:
    """A phrase without some of its attributes: "a red and white kite" without "red" is "a white kite"."""
    text, start = phrase.text, phrase.start
    for first, last in sorted(gone, reverse=True):
        head, tail = text[: first - start], text[last - start :]
        joined = re.match(r"(?:,?\s+(?:and|or|but)|,)(?=\s)", tail)
        if joined:
            tail = tail[joined.end() :]
        else:
            head = re.sub(r"(?:,?\s+(?:and|or|but)|,)\s+$", " ", head)
        text = (head.rstrip() + " " + tail.lstrip()).strip()
    return _article(text) if text[:1].islower() else _article(text[:1].upper() + text[1:])


def _article(text: str) -> str:
    """ "an" before a vowel, "a" before the rest."""
    found = re.match(r"(an?)(\s+)(.*)", text, re.I | re.S)
    if not found:
        return text
    return f"{found[1][0]}{'n' if _VOWEL.match(found[3]) else ''}{found[2]}{found[3]}"


def _repaired(units: list[_Unit]) -> list[_Unit]:
    """The units of a sentence without those that are to be cut and what cannot stay without them."""
    if len(units) > LONGEST:
        return []
    while (i := next((i for i, unit in enumerate(units) if unit.code in "XQ"), None)) is not None:
        first, last = _clause(units, i)
        inside = _cut(units[first:last], i - first)
        if inside is not None:
            units = [*units[:first], *inside, *units[last:]]
            continue
        units = _joined(units[:first], units[last:])
        if not first and units and units[0].text.lower() in _BACK:  # "..., but they are ..."
            units = []
    # What has lost all that it said is no sentence; what it still names is saved by who called.
    return units if any(unit.code in "KPBvbNxI" for unit in units) and units[0].code != "." else []


def _codes(units: Sequence[_Unit]) -> str:
    return "".join(unit.code for unit in units)


def _clause(units: Sequence[_Unit], i: int) -> tuple[int, int]:
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


def _joined(before: list[_Unit], after: list[_Unit]) -> list[_Unit]:
    """What is left when the clause between is gone, and with it what joined it to the rest."""
    joint = re.search(r"(?:;|,?[sc]|,)$", _codes(before))
    if joint:
        before = before[: joint.start()]
    else:
        after = after[re.match(r"(?:;|,?[sc]|,)?", _codes(after)).end() :]
    return [*before, *after]


def _cut(units: list[_Unit], i: int) -> list[_Unit] | None:
    """A clause without its unit ``i``; None when it cannot stand without it."""
    return _cut_place(units, i) if units[i].code == "Q" else _cut_thing(units, i)


def _cut_place(units: list[_Unit], i: int) -> list[_Unit] | None:
    codes = _codes(units)
    j = i + 1 + len(re.match(r"(?:o[KX])?", codes[i + 1 :])[0])
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


def _cut_thing(units: list[_Unit], i: int) -> list[_Unit] | None:
    codes = _codes(units)
    if re.match(r"G[^,;.']", codes[i + 1 :]):  # an owner: "the man's hat" leaves "the hat"
        the = "The" if units[i].text[:1].isupper() else "the"
        return [*units[:i], _Unit("D", units[i].gap, the), *units[i + 2 :]]
    if codes[:i].endswith("G"):
        return None
    j = i + 1 + _HANGS.match(codes[i + 1 :]).end()
    hangs, i = codes[i + 1 : j], _LOOSE.search(codes[:i]).start()
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


def _headless(units: list[_Unit], i: int, j: int) -> list[_Unit]:
    """A list without its first thing, ``i`` to ``j``. A comma that then separates two things alone goes."""
    rest = units[j:]
    two = re.match(rf"[KX]{_TAIL}(,)[c|]", _codes(rest))
    if two and _codes(units[i:j]).endswith(","):
        rest = [*rest[: two.start(1)], *rest[two.end(1) :]]
    first = replace(rest[0], gap=units[i].gap)
    return [*units[:i], first, *rest[1:]]


def _closed(units: list[_Unit], i: int, j: int, joint: int, thing: int) -> list[_Unit]:
    """A list without the thing that stands, with the joint before it, from ``i`` to ``j``."""
    codes, made = _codes(units), [*units[:i], *units[j:]]
    conjunction = [unit for unit in units[joint:thing] if unit.code in "c|"]
    further = re.match(r",?[c|]", codes[j:])
    commas = _COMMA_OF_LIST.search(codes[:i])
    if conjunction and commas and not further:
        # "a cup, a fork and a knife" without its end: "a cup and a fork"; of more the serial comma stays if there was one.
        at, serial = commas.start(), units[joint].code == ","
        more = _COMMA_OF_LIST.search(codes[:at])
        made = [*made[: at + (1 if serial and more else 0)], replace(conjunction[0], gap=" "), *made[at + 1 :]]
    elif not conjunction and further and further[0].startswith(",") and not commas:
        del made[i]  # "a cup, a fork, and a knife" without its middle: "a cup and a knife"
    return _agreeing(made)


def _agreeing(units: list[_Unit]) -> list[_Unit]:
    """ "there are" and "is" as the things ask for that are left of a list."""
    codes = _codes(units)
    made = list(units)
    if found := re.search(rf"h(B)[rn]*([KX]){_TAIL}(,?[c|](?=[KX])|,(?=[KX]))?", codes):
        verb, thing = found.start(1), units[found.start(2)]
        many = not _single(thing) or (found[3] and units[verb].text in ("are", "were"))
    elif (found := re.search(rf"(?:^|[,sP])([KX]){_TAIL}(B)", codes)) and not re.search(r"[,c|]", codes[: found.start(1)]):
        verb, thing = found.start(2), units[found.start(1)]
        many = not _single(thing)
    else:
        return made
    change = {"are": "is", "were": "was"} if not many else {"is": "are", "was": "were"}
    if many and not thing.phrase:
        return made
    made[verb] = replace(units[verb], text=change.get(units[verb].text, units[verb].text))
    return made


def _single(unit: _Unit) -> bool:
    """Whether a thing is one, or cannot be counted."""
    if unit.phrase is None or re.match(r"(?:an?|another)\s+(?:few|couple|dozen|lot|group|variety|number)\b", unit.text, re.I):
        return False
    first, noun = unit.text.split()[0].lower(), _noun(unit.phrase)
    return first in _SINGLE or (noun not in _PLURAL and (not noun.endswith("s") or noun.endswith("ss")))


def _cut_preposition(units: list[_Unit], k: int, i: int, j: int) -> list[_Unit] | None:
    """Without what a preposition leads in: ``k`` to ``i`` are the prepositions, the thing and what hangs on it end at ``j``."""
    codes = _codes(units)
    left = codes[:k]
    if not re.match(r"[egwao]", codes[i + 1 :]) and "o" not in codes[k:i]:
        j = i + 1  # what stands behind is said of more than this thing
    if left.endswith(("B", "Be", "h", "b", "s")) or (left.endswith("v") and re.search(r"[oq]", codes[k:i])):
        return None
    if re.search(r"(?:^|[KXPx,])r?e$", left):
        k -= 1
        k -= codes[:k].endswith("r")
        left = codes[:k]
    if left == "" or re.fullmatch(r"r,?", left):
        if codes[j : j + 1] in ("", ".") or not re.search(r"[Bv]", codes[j:]):
            return None
        comma = re.match(r"[^,;]*,|", codes[j:])  # "In addition to the food and drinks, ..."
        return [*units[:k], *units[j + comma.end() :]]
    if joint := re.search(r",?[c|]$", left):
        k = joint.start()
    elif left.endswith(",") and codes[j : j + 1] in ("", ",", "c", "|"):
        k -= 1
    return [*units[:k], *units[j:]]


def _cut_participle(units: list[_Unit], k: int, j: int) -> list[_Unit] | None:
    """Without what a participle does: it stands at ``k``, and its object and what hangs on it end at ``j``."""
    codes = _codes(units)
    left, right = codes[:k], codes[j:]
    if led := re.search(r"[pqs]$", left):
        k, left = led.start(), left[: led.start()]
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


def _text(units: Sequence[_Unit]) -> str:
    """A sentence with one capital and no sign where a sign cannot stand."""
    if not units:
        return ""
    made = units[0].text + "".join(unit.gap + unit.text for unit in units[1:])
    return made[:1].upper() + made[1:]


def _there_is(units: Sequence[_Unit]) -> str:
    """ "There is a ball and a cat.", of things that went with the sentence that named them."""
    if not units:
        return ""
    things = [_introduced(unit) for unit in units]
    listed = things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
    return f"There {'is' if _single(units[0]) else 'are'} {listed}."


def _introduced(unit: _Unit) -> str:
    """A thing as it is named for the first time: "a wall" for "the wall" and "their wall"."""
    text = unit.text if unit.gap else unit.text[:1].lower() + unit.text[1:]  # it opened a sentence
    found = re.match(r"(?:the|my|his|her|its|their|our|your|this|that|these|those|whose)\s+(.*)", text, re.S)
    if not found:
        return text
    bare, noun = found[1], _noun(unit.phrase).split()[-1]
    return _article(f"a {bare}") if _single(unit) and noun not in _UNCOUNTED and not re.match(r"\w+\s+of\b", bare) else bare

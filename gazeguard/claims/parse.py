"""What was said? The phrases of an English caption that a picture can support or not: things, and where they are.

There is no tagger and no model. Every word gets a one-letter class from closed word lists and a few endings; a word
that no list knows is taken for a noun, because things are the open class of captions. Patterns over the string of
classes then find places and noun phrases. They never give back what they took, so the work grows with the caption's
length and no faster.

What it decides, where one could decide otherwise:
- The head of "a slice of pizza", "a group of people", "a couple of cars" is the noun after "of"; a vessel is a thing of
  its own ("a bowl of fruit" is "a bowl" and "fruit").
- The head of a compound is the whole compound: "fire hydrant", "hot dog", "dining table".
- An owner is a thing of its own: "the man's hat" is "the man" and "hat".
- What a picture cannot show ("a cozy atmosphere") and what speaks of the picture ("the image") is no phrase.
- What is said to be absent ("no dog", "without a hat", "no cups, plates or forks") is no phrase.
- In "on the left side of the room", "on the left side" is the place and "the room" a thing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

# One class per word; the letter is what the patterns below are written in.
_TABLES = {
    # articles and owners
    "D": "a an the my his her its their our your whose",
    # other determiners
    "d": "this these those some another each every any either other such certain what same own",
    # numbers, ordinals, quantities
    "n": """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
        seventeen eighteen nineteen twenty thirty forty fifty hundred thousand dozen several many few multiple numerous
        first second third fourth fifth sixth seventh eighth ninth tenth single""",
    # what is not there
    "-": "no not without neither never lack lacks lacking absence devoid cannot 't",
    "o": "of",
    "t": "to",
    "c": "and & plus",
    "|": "or nor",
    # prepositions
    "p": """in on at by with from into onto near beside besides behind under underneath beneath below above over
        across along alongside around through throughout between among amongst against toward towards inside outside
        within upon off up down out next past beyond amid atop forward backwards""",
    # prepositions that never say where
    "q": "as for like per via despite since until except than during before after about",
    # never a noun: pronouns, auxiliaries, links
    "b": """i you he she it we they me him us them who whom which that there here where when while whereas if
        because so but yet both all none himself herself itself themselves someone everyone anyone nobody everything
        nothing something anything others ones else mine theirs hers is are was were be been being am has have had
        having do does did will would could may might must shall should isn aren wasn weren doesn don didn hasn haven
        hadn won couldn wouldn shouldn 's 're 've 'll s how why let whether though although due can""",
    # adverbs
    "r": """very quite rather too also just still even almost more most less least much well far away together
        again already perhaps maybe often always ever now then later soon once instead otherwise indoors outdoors
        overall apart ahead upside aside however thus therefore somewhat further closer upright forth upwards downwards
        mid-air sideways anywhere everywhere somewhere elsewhere""",
    # adjectives
    "a": """red blue green yellow purple black white brown pink gray grey beige golden tan teal maroon turquoise
        small little tiny large big huge giant tall short long wide narrow thick thin high low deep miniature larger
        smaller taller bigger older younger longer higher main old new young modern vintage fresh clean dirty wet dry
        hot cold warm cool bright dark pale lush clear cloudy sunny snowy rainy sandy grassy rocky muddy dusty rusty
        shiny furry fluffy hairy curly fuzzy empty full open busy quiet calm cozy cute happy sad pretty lovely lively
        friendly elderly tasty creamy juicy healthy wooden leather concrete steel wool oval rectangular triangular
        plain different similar entire whole additional extra rest ready present close natural urban rural public
        private outdoor indoor interior exterior professional casual formal unique interesting good great nice perfect
        ideal matching flat smooth rough soft hard heavy loose tight steep lone sole nearest unusual ample significant
        abundant safe serene vibrant dense worn broken frozen written drawn stolen woven torn fallen hidden bare blond
        blonde bald upper-class asian american common rare simple complex typical popular special favorite important
        essential key evident alert asleep awake alone intact separate adjacent opposite parallel familiar aware eager
        fun wild rear classic elegant overhead diverse rich ripe raw vast tidy neat ornate intricate pleasant prominent
        energetic artistic social functional easy secure moderate personal nostalgic bygone majestic stylish
        reminiscent ordinary suburban highest scenic oral lived-in fenced-in dramatic sleek primary unripe free wintry
        intimate funny homemade intense necessary steady electronic medical traditional nearby""",
    # adjectives that are things where no noun follows ("an orange")
    "Y": "orange light metal plastic square brick stone antique round gold silver navy",
    # verbs without a tell-tale ending
    "v": """sit sat stood lie lies lay laid rode hold held wore eat ate play run ran fly flew hang hung see seen
        saw show shown feature depict capture showcase contain include appear seem make made take took taken give gave
        given get got go goes went gone come came put keep kept used bring brought pull push pushes carry threw thrown
        catch catches caught hit serve cut enjoy create add suggest indicate provide allow occupy cover surround fill
        reach reaches leave wait move graze relax relaxes consist belong resemble emphasize highlight convey evoke read
        say said try want help ensure share prepare perform participate enter crosses pass passes travel focuses lean
        sleep slept stay start stop begin continue drive drove driven surf navigate observe explore gather attend
        interact engage browse roam maintain protect pick find found leads led talk smile soar glide fall fell rise
        grow grown feel remain become became vary extend span lines complete accompany feed fed know known bent lit
        cast spread split protrude represent built disembark chase climb learn spend avoid transport kneel check
        approach approaches demonstrate mark hide overlook offer purchase join contribute reflect kiss hug tend float
        bend think unfold consume ride walk jump look display use throw kick work turn pose need focus rest swim
        support attempt practice eaten ridden spent choose dig partake deteriorate operate misses miss pay beaten
        chosen enhance wear""",
    # verbs that are things after a determiner ("a drink")
    "V": "watch watches drink stand park board swing cook leaves face bite cross lead ski",
    # measure words: the head comes after "of"; alone, "m" is no thing and "M" is one
    "m": """group variety number couple set lot kind type sort assortment array mix mixture combination amount
        collection selection series plenty range handful pair bit majority row trace hint evidence form portion dozens
        hundreds quantity abundance multitude total host pattern""",
    "M": "slice piece bunch bunches herd flock crowd pile stack sign line cluster",
    # where in the picture
    "L": """left right top bottom middle center centre background foreground front back upper lower left-hand
        right-hand leftmost rightmost upper-left upper-right lower-left lower-right""",
    # the nouns that go with it
    "S": "side corner edge end part section distance half",
    # what names the picture
    "I": "image picture photo photograph scene frame view shot panels close-up",
    # what is numbered in a strip
    "P": "panel",
    # never a head, though it may stand before a thing ("game controller") or after ("kitchen area")
    "x": """area space place spot locations way time day moments night morning afternoon evening season hour sense
        touch atmosphere mood vibe feeling point backdrop setting surroundings game match event actions sport trick
        skill control talent energy thrill pleasure joy interest appeal beauty charm character aesthetic style design
        color colour shape size texture height depth length width speed state manner aspect detail elements item thing
        object stuff content subject theme story idea purpose reason result case fact example order shade contrast
        warmth safety care comfort leisure nature life job task role process progress journey adventure trip break
        contact access options level degree angle positions viewer perspective sight glimpse shadow lights air layout
        habitat race party lunch dinner breakfast weather winter summer spring autumn flavor taste scent smell sound
        posture effort technique camaraderie enthusiasm nostalgia behavior attire meaning message bond conditions era
        future mode stage scheme company visual rhythm service home spectacle reminder dynamic touches factor value
        scale deal skiing danger risk name world culture history century disrepair landmark hygiene expertise maneuver
        gaze grip nap routine demeanor mind context internet recovery altitude architecture grandeur outcome approval
        ceremony harmony bustle hustle descent storage gameplay playtime pace call birthday christmas gesture challenge
        feat sip leap stunt arrival procedure passage return cruise emphasis regulation orientation breeze expanse
        emergency treat offering year month week""",
}  # fmt: skip
_CLASS = {word: letter for letter, words in _TABLES.items() for word in words.split()}

# Pairs that mean something else than their words do, so that "hot", "stop" or "dining" does not mislead.
_PAIRS = {
    "NN": """hot dog, teddy bear, stop sign, dining table, dining room, living room, cutting board, parking meter,
        parking lot, jet ski, trash can, swimming pool, steering wheel, frying pan, shopping cart, shopping bag,
        washing machine, traffic light, street light, traffic sign, street sign, road sign, skate park, ski slope, ski
        pole, ski lift, hot tub, light fixture, light bulb, sleeping bag, potted plant, stuffed animal, picture frame,
        cutting mat, water park, light pole, ski boot, ski resort, ski jacket, video game, living area, dining area,
        bath mat, home plate, cell phone, wine glass, fire hydrant, remote control, train track, drying rack, baking
        sheet, baking dish, display case, glass case, orange juice, surf board, landing gear""",
    "bb": "not only",
    "SS": "hand side",
    "rr": "at least, a lot, in half, as well, such as, each other, one another",
    "xx": "focal point, main focus, close up",
}  # fmt: skip
_PAIR = {tuple(pair.split()): letters for letters, pairs in _PAIRS.items() for pair in pairs.split(",")}

# Endings, first fit wins. "A" is an adjective before a noun and a noun elsewhere; "Z" may be a plural or a verb.
_NOUNS = """building painting ceiling clothing wedding railing awning ring string king wing pudding icing frosting
    earring dressing lighting crossing topping drawing carving stuffing bedding flooring lettering writing clearing
    sibling duckling dumpling covering sling shed sled family butterfly jelly belly lily bully trolley station
    television fence appliance equipment apartment monument ambulance entrance audience city utensil garment ornament
    instrument document pavement cement residence science intersection reception condiment vegetation illustration
    cushion plantation battleship steamship facility decoration compartment basement supply firefly ship vegetable
    cable olive moped table baby elephant restaurant hospital animal plant kitchen chicken kitten garden children women
    citizen monkey turkey donkey goldfish adult"""
_NOUNS_DESPITE_ENDING = frozenset(_NOUNS.split())
_ENDINGS = (
    (("ly",), "r"),
    (("eed",), "N"),
    (("ed",), "e"),
    (("ing",), "g"),
    (("ness", "ity", "tion", "sion", "ment", "ance", "ence", "ism", "ship"), "x"),
    (("ful", "ous", "ive", "less", "able", "ible", "esque"), "a"),
    (("y", "ic", "al", "ish", "ary", "en", "ant", "ent"), "A"),
    (("ss", "us"), "N"),
    (("s",), "Z"),
)

# What a word's neighbours say about its class; every rule keeps the length of the string.
_CONTEXT = (
    (re.compile(r"(?<=[NZ])Z(?=[Dd])|(?<=Z)N(?=D)"), "v"),  # "a dog chases the", "dogs chase the"
    (re.compile(r"Y(?=[NZAaMYV]|,?c[aY])"), "a"),  # "an orange crown", "an orange and blue kite"
    (re.compile(r"(?<=[Ddnae,c|])Y(?![ge])"), "N"),  # "an orange"
    (re.compile(r"(?<=[Dnaegpqo])V"), "N"),  # "a drink", "with drinks"
    (re.compile(r"A(?=[NZAaMx])|Y"), "a"),
    (re.compile(r"V"), "v"),
    (re.compile(r"M(?=o)"), "m"),
    (re.compile(r"m(?!o)"), "x"),
    (re.compile(r"[AZM]"), "N"),
)

# Places: "in panel one"; "in the first panel"; "at the top left of the image"; "Top left:" standing alone. A place may
# end in what names the picture. The groups hold the head; words of direction are preferred to "side" and "corner".
_OF_PICTURE = r"(?:o[Dd]?+a*+(?:Pn?+|In?+)(?![NZx]))?+"
_PLACE = "|".join((
    r"[pt]?+[Dd]?+P(?P<panel>n)",
    r"[pt][Dd]?+(?P<nth>n)P",
    rf"[pt][Ddnar]*+(?P<where>L++(?:[c|]L++)?+|S)S*+(?![NIx]){_OF_PICTURE}",
    rf"(?<![^.,])[Dd]?+(?P<bare>L++)S*+{_OF_PICTURE}(?![^.,])",
))  # fmt: skip
# Things: "a large group of", "two of the"; then modifiers, also coordinated ("small, clean and bright"); then nouns. An
# "-ing" word is a modifier only after a determiner: "a smiling woman", but "eating pizza".
_MODIFIER = r"[Dd]|[ae](?:,?+[c|]?+(?=[ae]))?+|n(?:[c|](?=n))?+|(?<=[Ddna])r(?=[rae])|L(?=[LNaex])"
_THING = (
    rf"(?:[Ddnae]*+mo|[Ddn]++o(?=[Ddn]))*+(?:[Ddn](?:{_MODIFIER}|g)*+|(?:{_MODIFIER})*+)"
    r"(?:N|[xSI]|a(?=[Na]))*+"
)
_PARTS = re.compile(rf"(?P<place>{_PLACE})|(?P<thing>{_THING})|.", re.DOTALL)
# The last run of nouns is the head; "area" or "scene" may trail it.
_HEAD = re.compile(r"(?<!N)(?P<head>N++)[xSI]*+(?=a*+$)")
# What is absent: from the word that says so to the first thing, and on through "cups, plates or forks".
_LAST = frozenset("NZAYMVmxSI")  # what `_CONTEXT` can turn into a noun is among them
_ABSENT = re.compile(r"-[^-ptq.,cK]*+(?P<absent>K(?:(?:,K)*+,?+\|K)*+)")

# A list marker, a word, a clitic, the end of a paragraph, any other sign.
_TOKEN = re.compile(
    r"(?P<stop>(?m:^)[ \t]*+(?:\d{1,3}[.)]|[-*•])(?=\s)|\n\s*\n)"
    r"|(?P<word>\w[\w\u0300-\u036f]*+(?:-\w[\w\u0300-\u036f]*+)*+|(?<=\w)['\u2019]\w+|&)|[^\w\s]"
)


Kind = Literal["object", "attribute", "location"]
Parser = Callable[[str], Any]  # a spaCy pipeline: text to Doc


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a caption: ``caption[start:end] == text``, offsets in characters, end exclusive."""

    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class Phrase:
    """What a picture can support or not: ``caption[start:end] == text``, offsets in characters, end exclusive.

    kind:        "object", a thing, or "location", where in the picture something is said to be
    head:        the noun with its compound ("star", "dining table"); of a place its main words ("top left", "two")
    attributes:  what is said of the thing, in order: colours, sizes, numbers, participles; none for a place
    sentence:    0-based index of the sentence, among those that have words
    """

    start: int
    end: int
    text: str
    kind: Literal["object", "location"]
    head: Span
    attributes: tuple[Span, ...]
    sentence: int


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing that a caption says of the picture, true or false: ``caption[start:end] == text`` are the words to blame.

    kind:   "object": such a thing is there; "attribute": it is red, small, two; "location": it is where the caption says
    phrase: the thing that it is about
    said:   the words with which it is decided: the head noun, the attribute, or whatever of thing and place comes last
    other:  the words that have to agree with them: an attribute's head noun, of thing and place the first; None for objects
    """

    kind: Kind
    start: int
    end: int
    text: str
    phrase: Phrase
    span: Span
    related: Span | None

    def __str__(self) -> str:
        """The thing for an object; for the others "red (a red star)", "in panel two (a red star)"."""
        if self.kind == "object":
            return self.text
        words = self.related if self.kind == "location" and self.span == self.phrase.head else self.span
        return f"{words.text} ({self.phrase.text})"


def _class_of(word: str) -> str:
    """The class of a lower-case word by itself."""
    singular = word[:-3] + "y" if word.endswith("ies") else word.removesuffix("s")
    if word in _CLASS:
        return _CLASS[word]
    if word.startswith("'"):
        return "b"
    if word.isdecimal():
        return "n"
    if not any(map(str.isalpha, word)):  # "___", "½"
        return ","
    if _CLASS.get(singular, "") in tuple("xmMISvV"):
        return _CLASS[singular]
    if singular in _NOUNS_DESPITE_ENDING:
        return "N" if singular == word else "Z"
    if "-" in word:
        parts = {_CLASS.get(part) for part in word.split("-")}
        return "L" if parts == {"L"} else "a" if word.startswith("well-") or word.endswith(("ed", "ing")) else "A"
    return next((letter for endings, letter in _ENDINGS if len(word) > 3 and word.endswith(endings)), "N")


def may_end_thing(word: str) -> bool:
    """Whether a thing's name can end with this word: cheap to ask of every word of a caption that is being written."""
    return _class_of(word.lower()) in _LAST


def _classes(caption: str, tokens: list[re.Match[str]]) -> str:
    """One class per token, after a look at the neighbours."""
    letters = []
    for token in tokens:
        # A full stop inside "3.5" or "a.m." ends nothing.
        ends = token["stop"] or (token[0] in ".!?" and not caption[token.end() : token.end() + 1].isalnum())
        letters.append(_class_of(token[0].lower().replace("\u2019", "'")) if token["word"] else "." if ends else ",")
    words = [token[0].lower() for token in tokens]
    for i, pair in enumerate(pairwise(words)):
        plural = (pair[0], pair[1].removesuffix("s"))
        letters[i : i + 2] = _PAIR.get(pair) or _PAIR.get(plural) or letters[i : i + 2]
    classes = "".join(letters)
    for pattern, letter in _CONTEXT:
        classes = pattern.sub(letter, classes)
    return classes


def words(caption: str) -> list[tuple[Span, str]]:
    """Every word and sign of a caption with its one-letter class: see the tables at the top of this module.

    Beside them "N" a noun, "e" and "g" words in "-ed" and "-ing", "." the end of a sentence and "," any other sign.
    """
    tokens = list(_TOKEN.finditer(caption))
    spans = [Span(token.start(), token.end(), token[0]) for token in tokens]
    return list(zip(spans, _classes(caption, tokens), strict=True))


def things(caption: str) -> list[Phrase]:
    """The object phrases of a caption, in order: what can be in a picture or not."""
    return [phrase for phrase in chunk(caption) if phrase.kind == "object"]


def claims(caption: str, nlp: Parser | None = None) -> list[Claim]:
    """What a caption claims, thing by thing: that it is there, its attributes, and where it is if that is said.

    The place of a thing is the place phrase right behind it, else the last one before
    """
    found: list[Claim] = []
    phrases = chunk(caption, nlp)
    for i, thing in enumerate(phrases):
        if thing.kind == "location":
            continue
        found.append(Claim("object", thing.start, thing.end, thing.text, thing, thing.head, None))
        found += [Claim("attribute", a.start, a.end, a.text, thing, a, thing.head) for a in thing.attributes]
        near = [phrase for phrase in (*phrases[i + 1 : i + 2], *reversed(phrases[:i])) if phrase.sentence == thing.sentence]
        if place := next((phrase for phrase in near if phrase.kind == "location"), None):
            where = Span(place.start, place.end, place.text)
            blamed, said, other = (where, where, thing.head) if place.start > thing.start else (thing, thing.head, where)
            found.append(Claim("location", blamed.start, blamed.end, blamed.text, thing, said, other))
    return found


def chunk(caption: str, nlp: Parser | None = None) -> list[Phrase]:
    """The phrases of a caption, sorted by their start; they never overlap. No words or no nouns give ``[]``.

    nlp: a spaCy pipeline with a parser (``pip install gazeguard[spacy]``, then a model of your language); things are then its
    noun chunks, and only places are found by the rules of this module
    """
    return _ruled(caption) if nlp is None else _parsed(caption, nlp)


def _parsed(caption: str, nlp: Parser) -> list[Phrase]:
    """Things as spaCy's noun chunks, but pronouns and what is denied; places, and the number of the sentence, as ruled."""
    places = [phrase for phrase in _ruled(caption) if phrase.kind == "location"]
    doc = nlp(caption)
    found, sentences = list(places), {token.i: number for number, part in enumerate(doc.sents) for token in part}

    def span(first: Any, last: Any) -> Span:
        start, end = first.idx, last.idx + len(last.text)
        return Span(start, end, caption[start:end])

    for chunk in doc.noun_chunks:
        whole, root = span(chunk[0], chunk.root), chunk.root
        denied = any(token.lower_ in ("no", "without") or token.dep_ == "neg" for token in (*chunk, *root.lefts))
        if root.pos_ == "PRON" or denied or any(p.start < whole.end and whole.start < p.end for p in places):
            continue
        first = root
        while first.i > chunk[0].i and first.nbor(-1).dep_ == "compound":
            first = first.nbor(-1)
        said = [token for token in chunk if token.i < first.i and token.dep_ in ("amod", "nummod")]
        attributes = tuple(span(token, token) for token in said)
        found.append(Phrase(whole.start, whole.end, whole.text, "object", span(first, root), attributes, sentences[root.i]))
    return sorted(found, key=lambda phrase: phrase.start)


def _ruled(caption: str) -> list[Phrase]:
    tokens = list(_TOKEN.finditer(caption))
    classes = _classes(caption, tokens)
    sentences, sentence, ended, begun = [], 0, False, False
    for letter in classes:
        if letter == ".":
            ended = begun
        elif letter != ",":
            sentence, ended, begun = sentence + ended, False, True
        sentences.append(sentence)

    def span(first: int, last: int) -> Span:
        start, end = tokens[first].start(), tokens[last - 1].end()
        return Span(start, end, caption[start:end])

    found: list[tuple[str, Phrase | None]] = []
    for part in _PARTS.finditer(classes):
        first, last, code, phrase = part.start(), part.end(), "p", None
        if part["place"]:
            head = next(part.span(name) for name in ("panel", "nth", "where", "bare") if part[name])
            whole = span(first, last)
            phrase = Phrase(whole.start, whole.end, whole.text, "location", span(*head), (), sentences[first])
        elif noun := _HEAD.search(part[0]):
            head = (first + noun.start("head"), first + noun.end("head"))
            whole = span(first, first + noun.end())
            said = range(first + part[0].rfind("o") + 1, head[0])
            attributes = tuple(span(i, i + 1) for i in said if classes[i] in "naegL")
            phrase = Phrase(whole.start, whole.end, whole.text, "object", span(*head), attributes, sentences[first])
            code = "K"
        elif part[0]:
            code = part[0] if len(part[0]) == 1 else "x"
        else:
            continue  # an empty thing: the search goes on from here with a single token
        found.append((code, phrase))
    codes = "".join(code for code, _ in found)
    absent = {i for match in _ABSENT.finditer(codes) for i in range(*match.span("absent"))}
    return [phrase for i, (_, phrase) in enumerate(found) if phrase and (i not in absent or codes[i] != "K")]

"""What was said? The phrases of an English caption that a picture can support or not: things, and where they are.

There is no tagger and no model. Every word gets a one-letter class from closed word lists and a few endings; a word that
no list knows is taken for a noun, because things are the open class of captions. Two patterns over the string of classes
then find places and noun phrases. The patterns never give back what they took, so the work grows with the caption's
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
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

# One class per word; the letter is what the patterns below are written in.
_TABLES = {
    # articles and owners
    "D": "a an the my his her its their our your whose",
    # other determiners
    "d": "this these those some another each every any either other such certain what same own",
    # numbers, ordinals, quantities
    "n": """one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
        eighteen nineteen twenty thirty forty fifty hundred thousand dozen several many few multiple numerous first
        second third fourth fifth sixth seventh eighth ninth tenth single""",
    # what is not there
    "-": "no not without neither never lack lacks lacking absence devoid cannot 't ’t",
    "o": "of",
    "t": "to",
    "c": "and & plus",
    "|": "or nor",
    # prepositions
    "p": """in on at by with from into onto near beside besides behind under underneath beneath below above over across
        along alongside around through throughout between among amongst against toward towards inside outside within
        upon off up down out next past beyond amid atop forward backwards""",
    # prepositions that never say where
    "q": "as for like per via despite since until except than during before after about",
    # never a noun: pronouns, auxiliaries, links
    "b": """i you he she it we they me him us them who whom which that there here where when while whereas if because so
        but yet both all none himself herself itself themselves someone everyone anyone nobody everything nothing
        something anything others ones else mine theirs hers is are was were be been being am has have had having do
        does did will would could may might must shall should isn aren wasn weren doesn don didn hasn haven hadn won
        couldn wouldn shouldn 's ’s 're ’re 've ’ve 'll ’ll s each-other how why let whether though although due can""",
    # adverbs
    "r": """very quite rather too also just still only even almost nearly more most less least much well far away
        together again already perhaps maybe often always ever now then later soon once mostly instead otherwise
        indoors outdoors overall nearby apart ahead upside aside however thus therefore somewhat further closer
        upright forth upwards downwards mid-air sideways anywhere everywhere somewhere elsewhere""",
    # adjectives
    "a": """red blue green yellow purple black white brown pink gray grey beige golden tan teal maroon turquoise small
        little tiny large big huge giant tall short long wide narrow thick thin high low deep massive miniature
        medium-sized larger smaller taller bigger older younger longer higher main old new young modern vintage
        fresh clean dirty wet dry hot cold warm cool bright dark pale lush clear cloudy sunny snowy rainy sandy
        grassy rocky muddy dusty rusty shiny furry fluffy hairy curly fuzzy empty full open busy crowded quiet calm
        cozy cute happy sad pretty beautiful lovely lively friendly elderly delicious tasty creamy juicy healthy
        colorful colourful wooden leather concrete steel wool oval rectangular triangular striped plain different
        similar various entire whole additional extra rest ready available visible present close natural urban rural
        public private outdoor indoor interior exterior professional casual formal cheerful playful unique
        interesting impressive good great nice perfect ideal likely possible able right-handed matching assorted
        stainless flat smooth rough soft hard heavy loose tight steep lone sole nearest unusual generous ample
        significant abundant comfortable safe serene vibrant dense worn broken frozen written drawn stolen woven
        torn fallen hidden bare blond blonde bald upper-class asian american common rare simple complex typical
        popular special favorite important essential key evident active alert attentive excited curious relaxed
        bored tired asleep awake alone intact separate adjacent opposite parallel familiar aware eager fun sizable
        wild rear classic elegant overhead diverse rich ripe raw numbered vast tidy neat ornate intricate""",
    # adjectives that are things where no noun follows ("an orange")
    "Y": "orange light metal plastic square brick stone antique round gold silver navy",
    # verbs without a tell-tale ending
    "v": """sit sits sat stood lie lies lay lays laid rides rode hold holds held wear wears wore eat eats ate play plays
        run runs ran walks jumps fly flies flew hang hangs hung looks see sees seen saw shows show shown features
        feature depicts depict captures capture showcases showcase displays contains contain includes include appear
        appears seem seems make makes made take takes took taken give gives gave given get gets got go goes went
        gone come comes came put puts keep keeps kept uses used bring brings brought pull pulls push pushes carry
        carries throws threw thrown catch catches caught hit hits kicks serve serves cut cuts enjoy enjoys create
        creates add adds suggest suggests indicate indicates provide provides allow allows occupy occupies cover
        covers surround surrounds fill fills reach reaches leave wait waits works move moves poses graze grazes
        relax relaxes consist consists belong belongs resemble resembles emphasize emphasizes highlight highlights
        enhance enhances convey conveys evoke evokes read reads say says said try tries want wants help helps ensure
        ensures share shares prepare prepares perform performs participate enter enters crosses pass passes travel
        travels focuses lean leans rests sleep sleeps slept stay stays start starts stop stops begin begins continue
        continues drive drives drove driven swims surf surfs navigate navigates observe observes explore explores
        gather gathers attend attends interact interacts engage engages browse roam maintain maintains protect
        protects supports pick picks find found leads led talk talks smile smiles soar soars glide glides fall falls
        fell rise rises grow grows grown feel feels remain remains become becomes became vary extend extends span
        spans lines complete completes accompany accompanies feed feeds fed attempts practices know known bent lit
        cast spread spreads split protrude represent represents built disembark chase chases climb climbs learn
        spend avoid transport kneel check checks approach approaches demonstrate demonstrates ski mark hide hides
        overlook overlooks offer offers purchase join contribute contributes reflect reflects kiss hug tend float
        floats bend bends think unfold consume ride walk jump look display use throw kick work turn turns pose need
        needs focus rest swim support attempt practice""",
    # verbs that are things after a determiner ("a drink")
    "V": """watch watches drink drinks stand stands park parks board boards swing swings cook cooks leaves face faces
        bite bites cross lead""",
    # measure words: the head comes after "of"; alone, "m" is no thing and "M" is one
    "m": """group variety number couple set lot lots kind kinds type types sort sorts assortment array mix mixture
        combination amount collection selection series plenty range handful pair pairs bit majority rows row groups
        sets trace hint evidence form portion portions dozens hundreds quantity abundance multitude total host
        pattern""",
    "M": """slice slices piece pieces bunch bunches herd herds flock crowd pile stack sign signs line cluster clusters""",
    # where in the picture
    "L": """left right top bottom middle center centre background foreground front back upper lower left-hand right-hand
        leftmost rightmost upper-left upper-right lower-left lower-right""",
    # the nouns that go with it
    "S": "side sides corner corners edge edges end ends part section distance half",
    # what names the picture
    "I": """image images picture pictures photo photos photograph photographs scene frame view shot panels close-up""",
    # what is numbered in a strip
    "P": "panel",
    # never a head, though it may stand before a thing ("game controller") or after ("kitchen area")
    "x": """area areas space spaces place places spot spots location locations way ways time times day days moment
        moments night morning afternoon evening season hour sense touch atmosphere ambiance mood vibe feeling
        addition point presence backdrop setting environment surroundings game games match event events action
        actions activity sport trick tricks skill skills control ability talent balance energy excitement thrill
        pleasure joy interest attention appeal beauty charm elegance character aesthetic aesthetics style design
        color colors colour colours shape shapes size sizes texture height heights depth length width speed state
        manner aspect detail details element elements item items thing things object objects stuff content contents
        subject theme story idea purpose purposes reason result case cases fact example order shade contrast warmth
        safety care comfort leisure nature life job task role process progress journey adventure trip break
        experience conversation contact access option options level degree angle position positions direction viewer
        perspective sight glimpse shadow lights air shadows appearance arrangement layout composition vicinity
        proximity habitat essence impression expression session race competition performance celebration occasion
        party lunch dinner breakfast weather winter summer spring autumn flavor flavors taste scent smell sound
        movement motion posture effort technique athleticism camaraderie companionship relaxation transportation
        entertainment interaction anticipation determination enthusiasm passion curiosity nostalgia behavior attire
        information meaning message bond relationship connection condition conditions era future mode modes stage
        stages scheme company convenience visual visuals enjoyment protection preparation possibility notion rhythm
        chance opportunity service home spectacle reminder dynamic touches factor value quality intensity scale deal
        skiing danger risk name names world community culture tradition history century disrepair landmark
        tranquility hygiene expertise maneuver maneuvers stance gaze grip nap routine demeanor exploration
        destination mind context""",
}  # fmt: skip
_CLASS = {word: letter for letter, words in _TABLES.items() for word in words.split()}

# Pairs that mean something else than their words do, so that "hot", "stop" or "dining" does not mislead.
_PAIRS = {
    "NN": """hot dog,teddy bear,stop sign,dining table,dining room,living room,cutting board,parking meter,parking lot,
        swimming pool,steering wheel,frying pan,shopping cart,shopping bag,washing machine,traffic light,street light,
        traffic sign,street sign,road sign,skate park,ski slope,ski pole,ski lift,hot tub,light fixture,light bulb,
        sleeping bag,potted plant,stuffed animal,picture frame,cutting mat,water park,light pole,
        ski boot,ski resort,ski jacket,video game,living area,dining area,bath mat,home plate,
        cell phone,wine glass,fire hydrant,remote control,train track,drying rack,baking sheet,baking dish,
        display case,glass case,orange juice,surf board,landing gear""",
    "bb": "not only",
    "rr": "at least,a lot,as well,such as,each other,one another",
    "xx": "focal point,main focus,close up",
}  # fmt: skip
_PAIR = {tuple(pair.split()): letters for letters, pairs in _PAIRS.items() for pair in pairs.replace("\n", "").split(",")}

# Endings, first fit wins. "A" is an adjective before a noun and a noun elsewhere; "Z" may be a plural or a verb.
_NOUNS_DESPITE_ENDING = frozenset(
    """building painting ceiling clothing wedding railing awning ring string king wing pudding icing frosting earring
    dressing lighting crossing topping drawing carving stuffing bedding flooring lettering writing clearing sibling
    duckling dumpling covering sling shed sled family butterfly jelly belly lily bully trolley station television fence
    appliance equipment apartment monument ambulance entrance audience city utensil garment ornament instrument
    document pavement cement residence science intersection reception condiment vegetation illustration cushion
    plantation battleship steamship airship spaceship facility decoration compartment basement supply belonging
    firefly motorcyclist""".split()
)
_ENDINGS = (
    (("eed", "ss", "us"), "N"),
    (("ly",), "r"),
    (("ed",), "e"),
    (("ing",), "g"),
    (("ness", "ity", "tion", "sion", "ment", "ance", "ence", "ism", "ship"), "x"),
    (("y", "ful", "ous", "ic", "al", "ive", "ish", "less", "able", "ible", "ary", "en", "ant", "ent"), "A"),
    (("s",), "Z"),
)

# What a word's neighbours say about its class; every rule keeps the length of the string.
_CONTEXT = (
    (re.compile(r"(?<=[NZ])Z(?=[Dd])|(?<=Z)N(?=D)"), "v"),  # "a dog chases the", "dogs chase the"
    (re.compile(r"Y(?=(?:,?c)?[NZAaMYV])"), "a"),  # "an orange crown", "an orange and blue kite"
    (re.compile(r"(?<=[Ddnae,c|])Y(?![ge])"), "N"),  # "an orange"
    (re.compile(r"(?<=[Dnae])V"), "N"),
    (re.compile(r"A(?=[NZAaM])|Y"), "a"),
    (re.compile(r"V"), "v"),
    (re.compile(r"M(?=o)"), "m"),
    (re.compile(r"m(?!o)"), "x"),
    (re.compile(r"[AZM]"), "N"),
)

# Places: "in panel one"; "in the first panel"; "at the top left of the image"; "Top left:" standing alone. A place may end
# in what names the picture. The groups hold the head; words of direction are preferred to "side" and "corner".
_OF_PICTURE = r"(?:o[Dd]?+a*+(?:Pn?+|In?+)(?![NZx]))?+"
_PLACE = "|".join((
    r"[pt]?+[Dd]?+P(?P<panel>n)",
    r"[pt][Dd]?+(?P<nth>n)P",
    rf"[pt][Ddnar]*+(?P<where>L++(?:[c|]L++)?+|S)S*+(?![NIx]){_OF_PICTURE}",
    rf"(?<![^.,])[Dd]?+(?P<bare>L++)S*+{_OF_PICTURE}(?![^.,])",
))  # fmt: skip
# Things: "a large group of", "two of the"; then modifiers, also coordinated ("small, clean and bright"); then nouns. An
# "-ing" word is a modifier only after a determiner: "a smiling woman", but "eating pizza".
_MODIFIER = r"[Dd]|[nae](?:,?+c?+(?=[nae]))?+|(?<=[Ddna])r(?=[rae])|L(?=[LNaex])"
_THING = (
    rf"(?:[Ddnae]*+mo|[Ddn]++o(?=[Ddn]))*+(?:[Ddn](?:{_MODIFIER}|g)*+|(?:{_MODIFIER})*+)"
    r"(?:N|[xSI]|a(?=[Na]))*+"
)
_PARTS = re.compile(rf"(?P<place>{_PLACE})|(?P<thing>{_THING})|.", re.DOTALL)
# The last run of nouns is the head; "area" or "scene" may trail it.
_HEAD = re.compile(r"(?P<head>N++)[xSI]*+(?=a*+$)")
# What is absent: from the word that says so to the first thing, and on through "cups, plates or forks".
_ABSENT = re.compile(r"-[^-ptq.,cK]*+(?P<absent>K(?:(?:,K)*+,?+\|K)*+)")

# A list marker, a word, a clitic, the end of a paragraph, any other sign.
_TOKEN = re.compile(
    r"(?m:^)[ \t]*+(?:\d{1,3}[.)]|[-*•])(?=\s)|\w[\w\u0300-\u036f]*+(?:-\w[\w\u0300-\u036f]*+)*+|(?<=\w)['’]\w+"
    r"|\n\s*\n|[^\w\s]"
)


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a caption: ``caption[start:end] == text``, offsets in characters, end exclusive."""

    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class Phrase:
    """What a picture can support or not: ``caption[start:end] == text``, offsets in characters, end exclusive.

    kind:        "object", a thing, or "place", where in the picture something is said to be
    head:        the noun with its compound ("star", "dining table"); of a place its main words ("top left", "two")
    attributes:  what is said of the thing, in order: colours, sizes, numbers, participles; none for a place
    sentence:    0-based index of the sentence, among those that have words
    """

    start: int
    end: int
    text: str
    kind: Literal["object", "place"]
    head: Span
    attributes: tuple[Span, ...]
    sentence: int


def _class_of(word: str) -> str:
    """The class of a lower-case word by itself."""
    singular = word.removesuffix("s")
    if word in _CLASS:
        return _CLASS[word]
    if word.isdecimal():
        return "n"
    if not any(map(str.isalpha, word)):
        return ","
    if _CLASS.get(singular, "") in tuple("xmMI"):
        return _CLASS[singular]
    if singular in _NOUNS_DESPITE_ENDING:
        return "N" if singular == word else "Z"
    if "-" in word:
        parts = {_CLASS.get(part) for part in word.split("-")}
        return "L" if parts == {"L"} else "a" if word.startswith("well-") or word.endswith(("ed", "ing")) else "A"
    return next((letter for endings, letter in _ENDINGS if len(word) > 3 and word.endswith(endings)), "N")


def _classes(caption: str, tokens: list[re.Match[str]]) -> str:
    """One class per token, after a look at the neighbours."""
    letters = []
    for token in tokens:
        text = token[0]
        if text[0].isalnum() and not text.endswith((".", ")")) or text[0] in "_'’&":
            letters.append(_class_of(text.lower()))
        else:
            # A full stop inside "3.5" or "a.m." ends nothing.
            ends = len(text) > 1 or text in ".!?。！？" and not caption[token.end() : token.end() + 1].isalnum()
            letters.append("." if ends else ",")
    words = [token[0].lower() for token in tokens]
    for i, pair in enumerate(zip(words, words[1:], strict=False)):
        plural = (pair[0], pair[1].removesuffix("s"))
        letters[i : i + 2] = _PAIR.get(pair) or _PAIR.get(plural) or letters[i : i + 2]
    classes = "".join(letters)
    for pattern, letter in _CONTEXT:
        classes = pattern.sub(letter, classes)
    return classes


def chunk(caption: str) -> list[Phrase]:
    """The phrases of a caption, sorted by their start; they never overlap. No words or no nouns give ``[]``."""
    tokens = list(_TOKEN.finditer(caption))
    classes = _classes(caption, tokens)
    # A sentence counts once it has a word: stops in a row end one sentence only.
    starts = {stop.end() for stop in re.finditer(r"(?<=[^.,])[.,]*\.[.,]*(?=[^.,])", classes)}
    sentences = list(accumulate(int(i in starts) for i in range(len(classes))))

    def span(first: int, last: int) -> Span:
        start, end = tokens[first].start(), tokens[last - 1].end()
        return Span(start, end, caption[start:end])

    found: list[tuple[str, Phrase | None]] = []
    for part in _PARTS.finditer(classes):
        first, last, code, phrase = part.start(), part.end(), "p", None
        if part["place"]:
            head = next(part.span(name) for name in ("panel", "nth", "where", "bare") if part[name])
            whole = span(first, last)
            phrase = Phrase(whole.start, whole.end, whole.text, "place", span(*head), (), sentences[first])
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
            continue
        found.append((code, phrase))
    codes = "".join(code for code, _ in found)
    absent = {i for match in _ABSENT.finditer(codes) for i in range(*match.span("absent"))}
    return [phrase for i, (_, phrase) in enumerate(found) if phrase and (i not in absent or codes[i] != "K")]

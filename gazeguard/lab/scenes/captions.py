"""Captions, questions and answers of the scenes lab, in varied natural English and always true.

A `Turn` is one prompt and the answer that the model learns to give. What a caption says follows from the truth of the drawn
image alone: no invented mention is ever planted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gazeguard.claims.english import listed
from gazeguard.heads.strips import LOCATION_PHRASES, ORDINALS, a_phrase
from gazeguard.lab.scenes.vocabulary import COLOUR_NAMES, NOUNS, THEME_OF, THEMES, look_alikes, plural
from gazeguard.lab.scenes.world import DrawnImage, DrawnObject, relation

LOCATIONS = tuple(name for row in LOCATION_PHRASES for name in row)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
RANKS = ("first", "second", "third", "fourth", "fifth", "sixth")
ALIVE = frozenset(
    [*THEMES["pets"], *THEMES["farm"], *THEMES["wild"], "bird", "fish", "whale", "crab", "dolphin", "shark", "octopus"]
) - {"bone", "tractor", "basket", "palm tree", "cactus", "mushroom"}

DESCRIBE = (
    "Describe the picture.",
    "Describe the image.",
    "What do you see in the picture?",
    "Write a caption for this picture.",
)
LIST = ("List all objects.", "Which objects are in the picture?", "Describe all objects.")
LIST_BULLETS = ("List all objects as bullet points.", "List the objects, one per line.")
DETAIL = ("Describe the picture in detail.", "Describe the picture and say where everything is.")
SENTENCES = ("Describe the picture in full sentences.", "Describe the picture in a few sentences.")
PANELS = ("Describe all panels.", "Describe the comic page.", "Describe every panel.")
PANELS_BULLETS = ("List the panels as bullet points.", "Describe the panels in Markdown.")
LEADS = ("There {be} {what}.", "The picture shows {what}.", "I can see {what}.", "In the picture there {be} {what}.")
MORE = ("There {be} also {what}.", "I can also see {what}.", "The picture also shows {what}.")


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt and the answer that the model learns to give."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Group:
    """Objects that a caption names with one phrase: one object, or several of one noun and colour."""

    items: tuple[DrawnObject, ...]

    @property
    def noun(self) -> str:
        """The noun of all items."""
        return self.items[0].noun

    @property
    def location(self) -> str | None:
        """The location that all share, or None."""
        locations = {item.location for item in self.items}
        return locations.pop() if len(locations) == 1 else None

    def phrase(self, colour: bool = True, article: str | None = None) -> str:
        """``a small red cup``, ``two cups``; with ``article`` "the": ``the small red cup``."""
        first = self.items[0]
        words = [
            *(["small"] if all(item.small for item in self.items) else []),
            *([first.colour] if colour and first.colour else []),
        ]
        if len(self.items) > 1:
            return " ".join((article or NUMBERS[len(self.items)], *words, plural(self.noun)))
        return " ".join((article, *words, self.noun)) if article else a_phrase(*words, self.noun)


def grouped(objects: Sequence[DrawnObject]) -> list[Group]:
    """The objects in order; those of the same noun and colour together, where the first of them stands."""
    groups: dict[tuple[str, str | None], list[DrawnObject]] = {}
    for item in objects:
        groups.setdefault((item.noun, item.colour), []).append(item)
    return [Group(tuple(items)) for items in groups.values()]


def _be(group: Group) -> str:
    return "is" if len(group.items) == 1 else "are"


def _lead(rng: random.Random, templates: Sequence[str], groups: Sequence[Group], phrases: Sequence[str]) -> str:
    return rng.choice(templates).format(be=_be(groups[0]), what=listed(phrases))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# ---------------------------------------------------------------------------------------------------- whole scenes


def list_caption(rng: random.Random, objects: Sequence[DrawnObject]) -> str:
    """``There is a cup, a red plate and two spoons.``"""
    groups = grouped(objects)
    return _lead(rng, LEADS, groups, [group.phrase() for group in groups])


def located_caption(rng: random.Random, objects: Sequence[DrawnObject]) -> str:
    """``There is a cup at the top left and a red plate in the middle.`` Every object is named on its own."""
    groups = [Group((item,)) for item in objects]
    return _lead(rng, LEADS, groups, [f"{group.phrase()} {group.location}" for group in groups])


def bullets_caption(_: random.Random, objects: Sequence[DrawnObject]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {group.phrase()}" for group in grouped(objects))


def _verb(rng: random.Random, group: Group) -> str:
    several = len(group.items) > 1
    if group.noun in ALIVE:
        return rng.choice(("are", "stand") if several else ("is", "stands"))
    return rng.choice(("are", "lie") if several else ("is", "lies"))


def _related(group: Group, earlier: Sequence[Group], nouns: Sequence[str]) -> tuple[str, Group] | None:
    """A relation that clearly holds between a new object and one named before, whose noun is unique in the image."""
    if len(group.items) > 1:
        return None
    for other in reversed(earlier):
        if nouns.count(other.noun) == 1 and (kind := relation(group.items[0], other.items[0])):
            return kind, other
    return None


def sentences_caption(rng: random.Random, objects: Sequence[DrawnObject]) -> str:
    """Two to four sentences: relations and locations where they hold, colours as adjectives or predicates."""
    groups, nouns = grouped(objects), [item.noun for item in objects]
    parts = _split(groups, min(len(groups), rng.choice((2, 3, 3, 4))))
    sentences: list[str] = []
    earlier: list[Group] = []
    for part in parts:
        single = part[0] if len(part) == 1 else None
        late_colour = single is not None and single.items[0].colour and nouns.count(single.noun) == 1 and rng.random() < 0.5
        found = _related(single, earlier, nouns) if single else None
        if single and found and rng.random() < 0.8:
            kind, other = found
            sentences.append(f"{_capital(single.phrase(not late_colour))} {_verb(rng, single)} {kind} the {other.noun}.")
        elif single and single.location and rng.random() < 0.6:
            sentences.append(f"{_capital(single.phrase(not late_colour))} {_verb(rng, single)} {single.location}.")
        else:
            late_colour = late_colour and single is not None
            phrases = [group.phrase(not late_colour) for group in part]
            sentences.append(_lead(rng, MORE if earlier else LEADS, part, phrases))
        if late_colour and single:
            be = "is" if len(single.items) == 1 else "are"
            sentences.append(f"The {single.noun if be == 'is' else plural(single.noun)} {be} {single.items[0].colour}.")
        earlier += part
    return " ".join(sentences)


def _split(groups: Sequence[Group], parts: int) -> list[list[Group]]:
    """Consecutive parts of nearly equal size."""
    edges = [round(number * len(groups) / parts) for number in range(parts + 1)]
    return [list(groups[a:b]) for a, b in pairwise(edges)]


def scene_turn(rng: random.Random, image: DrawnImage) -> Turn:
    """A description of a whole scene; the prompt says which form is asked for, or leaves it open."""
    forms: tuple[tuple[tuple[str, ...], tuple[Callable[[random.Random, Sequence[DrawnObject]], str], ...], float], ...] = (
        (DESCRIBE, (list_caption, list_caption, sentences_caption), 0.45),
        (LIST, (list_caption,), 0.15),
        (LIST_BULLETS, (bullets_caption,), 0.08),
        (DETAIL, (located_caption,), 0.17),
        (SENTENCES, (sentences_caption,), 0.15),
    )
    prompts, writers, _ = rng.choices(forms, [form[2] for form in forms])[0]
    return Turn(rng.choice(prompts), rng.choice(writers)(rng, image.objects))


# ---------------------------------------------------------------------------------------------------- comic pages


def _panel_list(image: DrawnImage, panel: int) -> tuple[Group, str]:
    groups = grouped(image.in_panel(panel))
    return groups[0], listed([group.phrase() for group in groups])


def page_turn(rng: random.Random, image: DrawnImage) -> Turn:
    """A description of all panels, in reading order."""
    style, bullets = rng.random(), rng.random() < 0.12
    lines = []
    for panel in range(len(image.panels)):
        first, what = _panel_list(image, panel)
        if bullets:
            lines.append(f"- **Panel {panel + 1}:** {what}")
        elif style < 0.6:
            lines.append(f"In panel {ORDINALS[panel]} there {_be(first)} {what}.")
        elif style < 0.8:
            lines.append(f"The {RANKS[panel]} panel shows {what}.")
        else:
            lines.append(f"Panel {panel + 1} shows {what}.")
    return Turn(rng.choice(PANELS_BULLETS if bullets else PANELS), ("\n" if bullets else " ").join(lines))


def panel_turn(rng: random.Random, image: DrawnImage) -> Turn:
    """One panel, given by its number; or ``Describe a panel.``, where attention alone decides which."""
    panel = rng.randrange(len(image.panels))
    first, what = _panel_list(image, panel)
    prompts = (f"Describe panel {ORDINALS[panel]}.", f"What is in panel {ORDINALS[panel]}?", "Describe a panel.")
    return Turn(rng.choice(prompts), f"There {_be(first)} {what}.")


def any_order_turn(rng: random.Random, image: DrawnImage) -> Turn:
    """All panels in a random order, without their numbers."""
    order = rng.sample(range(len(image.panels)), len(image.panels))
    lines = [f"There {_be(first)} {what}." for first, what in (_panel_list(image, panel) for panel in order)]
    return Turn("Describe the panels in any order.", " ".join(lines))


# ---------------------------------------------------------------------------------------------------- questions


def absent_noun(rng: random.Random, image: DrawnImage, here: Sequence[DrawnObject]) -> str:
    """A noun that is not among ``here``: of the image's theme, drawn like a present one, elsewhere on the page, or any."""
    nouns = {item.noun for item in here}
    if image.style == "pictograph":
        theme = [noun for noun in NOUNS if noun not in THEME_OF or rng.random() < 0.05]
    else:
        theme = list(THEMES[image.theme])
    pools = [
        theme,
        [other for item in here for other in look_alikes(item.noun)],
        [item.noun for item in image.objects],
        list(NOUNS),
    ]
    for pool in rng.sample(pools[:3], 3) if rng.random() < 0.75 else ():
        if candidates := [noun for noun in pool if noun not in nouns]:
            return rng.choice(candidates)
    return rng.choice([noun for noun in NOUNS if noun not in nouns])


def _panel_of(rng: random.Random, image: DrawnImage, share: float = 0.5) -> tuple[tuple[DrawnObject, ...], str, int | None]:
    """The objects that a question is about: of one panel with its words, or of the whole image."""
    if image.panels and rng.random() < share:
        panel = rng.randrange(len(image.panels))
        return image.in_panel(panel), f" in panel {ORDINALS[panel]}", panel
    return image.objects, "", None


def yes_no_turn(rng: random.Random, image: DrawnImage) -> Turn:
    """``Is there a dog in the image?`` in POPE's form, as often true as not; sometimes with a colour or in a panel."""
    here, where, _ = _panel_of(rng, image)
    where = where or rng.choice((" in the image", " in the image", " in the picture", ""))
    item = rng.choice(here)
    noun, colour = item.noun, item.colour if rng.random() < 0.5 else None
    truth = rng.random() < 0.5
    if not truth:
        colours = {other.colour for other in here if other.noun == noun}
        if colour and None not in colours and rng.random() < 0.5:
            colour = rng.choice([name for name in COLOUR_NAMES if name not in colours])
        else:
            noun = absent_noun(rng, image, here)
    return Turn(f"Is there {a_phrase(*filter(None, (colour, noun)))}{where}?", "Yes." if truth else "No.")


def colour_turn(rng: random.Random, image: DrawnImage) -> Turn | None:
    """``What colour is the cup?`` of an object that was given a colour and whose noun is unique."""
    here, where, _ = _panel_of(rng, image, 1.0)
    nouns = [item.noun for item in here]
    items = [item for item in here if item.colour and nouns.count(item.noun) == 1]
    if not items:
        return None
    item = rng.choice(items)
    return Turn(f"What colour is the {item.noun}{where}?", f"The {item.noun} is {item.colour}.")


def where_turn(rng: random.Random, image: DrawnImage) -> Turn:
    """``Where is the dog?``: its location in a scene, its panel on a page; or that there is none."""
    item = rng.choice(image.objects)
    nouns = [other.noun for other in image.objects]
    if rng.random() < 0.2 or nouns.count(item.noun) > 1:
        noun = absent_noun(rng, image, image.objects)
        return Turn(f"Where is the {noun}?", f"There is no {noun}.")
    location = item.location or f"in panel {ORDINALS[item.panel or 0]}"
    return Turn(f"Where is the {item.noun}?", f"The {item.noun} is {location}.")


def at_location_turn(rng: random.Random, image: DrawnImage) -> Turn | None:
    """``What is on the left?``"""
    if image.panels:
        return None
    location = rng.choice(LOCATIONS) if rng.random() < 0.2 else rng.choice(image.objects).location
    groups = grouped([item for item in image.objects if item.location == location])
    return Turn(f"What is {location}?", _capital(listed([group.phrase() for group in groups])) + "." if groups else "Nothing.")


def relation_turn(rng: random.Random, image: DrawnImage) -> Turn | None:
    """``What is next to the cup?`` where exactly one object clearly is."""
    nouns = [(item.noun, item.panel) for item in image.objects]
    pairs = [
        (kind, a, b)
        for b in image.objects
        if nouns.count((b.noun, b.panel)) == 1 and (not image.panels or [noun for noun, _ in nouns].count(b.noun) == 1)
        for a in image.objects
        if (kind := relation(a, b))
    ]
    clear = [pair for pair in pairs if sum(other[0] == pair[0] and other[2] is pair[2] for other in pairs) == 1]
    if not clear:
        return None
    kind, a, b = rng.choice(clear)
    return Turn(f"What is {kind} the {b.noun}?", _capital(Group((a,)).phrase()) + ".")


def count_turn(rng: random.Random, image: DrawnImage) -> Turn:
    """``How many dogs are there?``"""
    here, where, _ = _panel_of(rng, image)
    nouns = [item.noun for item in here]
    repeated = [noun for noun in nouns if nouns.count(noun) > 1]
    noun = rng.choice(repeated) if repeated and rng.random() < 0.6 else rng.choice(nouns)
    if rng.random() < 0.2:
        noun = absent_noun(rng, image, here)
    count = nouns.count(noun)
    be, name = ("is", noun) if count == 1 else ("are", plural(noun))
    return Turn(f"How many {plural(noun)} are there{where}?", f"There {be} {NUMBERS[count]} {name}.")


def name_one_turn(rng: random.Random, image: DrawnImage) -> Turn:
    """Any one object; attention alone decides which."""
    return Turn("Name one object.", _capital(Group((rng.choice(image.objects),)).phrase()) + ".")


def question_turns(rng: random.Random, image: DrawnImage, count: int) -> list[Turn]:
    """``count`` different questions with short answers (fewer, if there is not so much to ask); a third are yes/no."""
    kinds = (
        yes_no_turn,
        yes_no_turn,
        yes_no_turn,
        colour_turn,
        where_turn,
        at_location_turn,
        relation_turn,
        count_turn,
        name_one_turn,
    )
    turns: dict[str, Turn] = {}
    for _ in range(4 * count):
        turn = rng.choice(kinds)(rng, image)
        if turn is not None and len(turns) < count:
            turns.setdefault(turn.prompt, turn)
    return list(turns.values())


def describe_turn(rng: random.Random, image: DrawnImage) -> Turn:
    """A description of the whole image."""
    return page_turn(rng, image) if image.panels else scene_turn(rng, image)


def lesson(rng: random.Random, image: DrawnImage) -> list[tuple[Turn, ...]]:
    """Conversations about one image that do not see each other: a description, panels, questions, now and then two turns."""
    conversations: list[tuple[Turn, ...]] = [(describe_turn(rng, image),)]
    if image.panels:
        conversations += [(panel_turn(rng, image),) for _ in range(2)]
        if rng.random() < 0.2:
            conversations.append((any_order_turn(rng, image),))
    questions = question_turns(rng, image, rng.randint(6, 9))
    if rng.random() < 0.3:
        conversations[0] = (*conversations[0], questions.pop())
    return conversations + [(turn,) for turn in questions]

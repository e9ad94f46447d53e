"""What is there to see? The drawn world of the lab: pictures with exact truth, and what its people say about them.

A *picture* is a square page of 144 x 144 pixels. A **strip** has one to six panels in two rows of three, read left to
right, top to bottom; slots past the last panel stay empty. A **scene** has one to eight things in free positions.

The world errs the way captions of photographs err:

* things come in pairs (a star usually comes with a moon), and who sees one expects the other;
* the captions that the model learns from name a missing partner sometimes, and more often the later in the caption, so
  that position becomes a confound, as it is in real data;
* a thing has a usual colour, and late mentions fall back on it;
* some things are faint, small or half hidden.

Everything is a function of ``(split, seed, index)`` through `random.Random`, whose streams are the same on every machine
and Python version. The ``shifted`` split breaks the pairs and the usual colours, nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image, ImageDraw

from gazeguard.heads.strips import COLOURS, MAX_PANELS, ORDINALS, PLACES, Box, a_phrase, glyph, join, panel_boxes

PAGE = 144  # pixels, both ways
CELL = 12  # pixels; things lie in slots of 2 x 2 cells, anywhere on the lattice
CELLS = PAGE // CELL  # per side
SPLITS = ("train", "validation", "test", "shifted")
Split = Literal["train", "validation", "test", "shifted"]

# (thing, usual colour), (its partner, usual colour)
PAIRS = (
    (("star", "yellow"), ("moon", "blue")),
    (("sun", "orange"), ("cloud", "blue")),
    (("umbrella", "purple"), ("bolt", "yellow")),
    (("snowman", "blue"), ("snowflake", "purple")),
    (("heart", "red"), ("flower", "orange")),
    (("cup", "green"), ("envelope", "yellow")),
    (("phone", "red"), ("pencil", "orange")),
    (("plane", "blue"), ("flag", "green")),
    (("anchor", "purple"), ("skull", "green")),
    (("clover", "red"), ("gear", "purple")),
    (("castle", "orange"), ("horse", "red")),
    (("note", "green"), ("crown", "yellow")),
)
USUAL_COLOUR = {noun: colour for pair in PAIRS for noun, colour in pair}
PARTNER = {a: b for (x, _), (y, _) in PAIRS for a, b in ((x, y), (y, x))}
NOUNS = tuple(USUAL_COLOUR)


@dataclass(frozen=True, slots=True)
class Thing:
    """One drawn thing and everything that is true of it."""

    noun: str
    colour: str
    box: Box
    panel: int | None  # 0-based in a strip, None in a scene
    place: str | None  # one of PLACES in a scene, None in a strip
    small: bool = False
    faint: bool = False
    hidden: Literal["", "left", "right", "top", "bottom"] = ""  # the half that is covered

    def __str__(self) -> str:
        return " ".join((*(("small",) if self.small else ()), self.colour, self.noun))


@dataclass(frozen=True, slots=True)
class Picture:
    """A strip or a scene: its things in reading order. ``panels`` is 0 for a scene."""

    things: tuple[Thing, ...]
    panels: int
    paper: tuple[int, int, int]

    def panel_box(self, panel: int) -> Box:
        """The pixels of a panel (0-based)."""
        return panel_boxes(MAX_PANELS, (PAGE, PAGE))[panel]

    def in_panel(self, panel: int) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.panel == panel)

    def draw(self) -> Image.Image:
        """The picture, RGB, PAGE x PAGE."""
        image = Image.new("RGB", (PAGE, PAGE), self.paper if not self.panels else (255, 255, 255))
        pen = ImageDraw.Draw(image)
        for panel in range(self.panels):
            x0, y0, x1, y1 = self.panel_box(panel)
            pen.rectangle((x0 + 1, y0 + 1, x1 - 2, y1 - 2), fill=self.paper, outline=(90, 90, 90))
        for thing in self.things:
            x0, y0, x1, y1 = thing.box
            mask = glyph(thing.noun, (x1 - x0, y1 - y0))
            if thing.faint:
                mask = mask.point(lambda value: value * 3 // 10)
            image.paste(COLOURS[thing.colour], thing.box, mask)
            middle_x, middle_y = (x0 + x1) // 2, (y0 + y1) // 2
            cover = {
                "left": (x0, y0, middle_x, y1),
                "right": (middle_x, y0, x1, y1),
                "top": (x0, y0, x1, middle_y),
                "bottom": (x0, middle_y, x1, y1),
            }.get(thing.hidden)
            if cover:
                pen.rectangle((cover[0], cover[1], cover[2] - 1, cover[3] - 1), fill=(160, 160, 160))
        return image


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and the answer that the model learns to give."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture, its truth and one conversation about it. ``id`` is unique over splits and seeds."""

    id: str
    picture: Picture
    turns: tuple[Turn, ...]

    @property
    def prompt(self) -> str:
        return self.turns[0].prompt

    @property
    def image(self) -> Image.Image:
        return self.picture.draw()


# ---------------------------------------------------------------------------------------------------- what there is


def _nouns(rng: random.Random, count: int, paired: bool) -> list[str]:
    """``count`` different nouns; in the paired world the partner of the last one follows it more often than not."""
    chosen: list[str] = []
    while len(chosen) < count:
        partner = PARTNER[chosen[-1]] if chosen else None
        if paired and partner and partner not in chosen and rng.random() < 0.55:
            chosen.append(partner)
        else:
            chosen.append(rng.choice([noun for noun in NOUNS if noun not in chosen]))
    rng.shuffle(chosen)
    return chosen


def _looks(rng: random.Random, noun: str, paired: bool) -> dict[str, object]:
    colour = USUAL_COLOUR[noun] if paired and rng.random() < 0.5 else rng.choice(list(COLOURS))
    return {
        "colour": colour,
        "small": rng.random() < 0.15,
        "faint": rng.random() < 0.12,
        "hidden": rng.choice(("left", "right", "top", "bottom")) if rng.random() < 0.12 else "",
    }


def _spot(rng: random.Random, column: int, row: int, small: bool) -> Box:
    """Where a thing is drawn whose slot of 2 x 2 cells begins at this cell: it fills the slot but for a pixel or two,
    a small thing one of its cells.
    """
    slot = CELL if small else 2 * CELL
    if small:
        column, row = column + rng.randint(0, 1), row + rng.randint(0, 1)
    size = slot - rng.randint(0, slot // 12)
    x, y = (cell * CELL + rng.randint(0, slot - size) for cell in (column, row))
    return (x, y, x + size, y + size)


def _strip(rng: random.Random, panels: int, paired: bool) -> list[Thing]:
    things = []
    for panel in range(panels):
        x0, y0, x1, y1 = (edge // CELL for edge in panel_boxes(MAX_PANELS, (PAGE, PAGE))[panel])
        names = _nouns(rng, rng.choice((1, 2, 2, 3)), paired)
        band = (y1 - y0) // len(names)
        for i, noun in enumerate(names):
            looks = _looks(rng, noun, paired)
            row = y0 + i * band + rng.randint(0, band - 2)
            box = _spot(rng, rng.randint(x0, x1 - 2), row, looks["small"])
            things.append(Thing(noun, box=box, panel=panel, place=None, **looks))
    return things


def _scene(rng: random.Random, count: int, paired: bool) -> list[Thing]:
    things: list[Thing] = []
    taken: set[tuple[int, int]] = set()
    for noun in _nouns(rng, count, paired):
        looks = _looks(rng, noun, paired)
        for _ in range(200):  # a free spot is found long before; a crowded page stays one thing shorter
            # A slot across the border between thirds would make the place a matter of taste.
            column, row = (rng.choice([c for c in range(CELLS - 1) if (c + 1) % (CELLS // 3)]) for _ in range(2))
            slot = {(column + i, row + j) for i in (0, 1) for j in (0, 1)}
            if not slot & taken:
                taken |= slot
                box = _spot(rng, column, row, looks["small"])
                place = PLACES[row * 3 // CELLS][column * 3 // CELLS]
                things.append(Thing(noun, box=box, panel=None, place=place, **looks))
                break
    rows = {place: y for y, row in enumerate(PLACES) for place in row}
    return sorted(things, key=lambda thing: (rows[thing.place], thing.box[0] + thing.box[2]))


def make_picture(rng: random.Random, kind: Literal["strip", "scene"], paired: bool, most: int = 8) -> Picture:
    """Draw lots for one picture; ``most`` bounds the panels of a strip and the things of a scene."""
    paper = tuple(rng.randint(232, 255) for _ in range(3))
    if kind == "strip":
        panels = rng.randint(1, min(most, MAX_PANELS))
        return Picture(tuple(_strip(rng, panels, paired)), panels, paper)
    return Picture(tuple(_scene(rng, rng.randint(1, most), paired)), 0, paper)


# ---------------------------------------------------------------------------------------------------- what is said


class Witness:
    """Says what is there, and, the longer it speaks, also what it expects to be there."""

    def __init__(self, rng: random.Random, honest: bool = False) -> None:
        self.rng, self.honest, self.said = rng, honest, 0

    def _mention(self, thing: Thing) -> str:
        rng, late, self.said = self.rng, self.said, self.said + 1
        noun, colour = thing.noun, thing.colour
        if not self.honest and rng.random() < min(0.08, 0.008 * late):
            noun = rng.choice(NOUNS)
        if not self.honest and rng.random() < min(0.35, 0.04 * late):
            colour = USUAL_COLOUR[noun]
        return a_phrase(*(("small",) if thing.small else ()), colour, noun)

    def tell(self, things: tuple[Thing, ...]) -> str:
        """One list of mentions: the things in order, then now and then the partner of one that has none."""
        there = {thing.noun for thing in things}
        items = [" ".join(filter(None, (self._mention(thing), thing.place))) for thing in things]
        lone = [PARTNER[thing.noun] for thing in things if PARTNER[thing.noun] not in there]
        if not self.honest and lone and self.rng.random() < min(0.8, 0.06 + 0.12 * self.said):
            noun = self.rng.choice(lone)
            colour = USUAL_COLOUR[noun] if self.rng.random() < 0.7 else self.rng.choice(list(COLOURS))
            place = self.rng.choice([p for row in PLACES for p in row]) if things[0].place else None
            items.append(" ".join(filter(None, (a_phrase(colour, noun), place))))
            self.said += 1
        return join(items)


def describe(picture: Picture, rng: random.Random, honest: bool = False) -> str:
    """A caption of the whole picture, as the training set has it; ``honest`` says only what is there."""
    witness = Witness(rng, honest)
    if not picture.panels:
        return f"There is {witness.tell(picture.things)}."
    return " ".join(
        f"In panel {ORDINALS[panel]} there is {witness.tell(picture.in_panel(panel))}." for panel in range(picture.panels)
    )


STRIP_PROMPTS = ("Describe all panels.", "Describe the picture.")
SCENE_PROMPTS = ("Describe the picture.", "Describe all objects.")


def _describe_turn(picture: Picture, rng: random.Random) -> Turn:
    return Turn(rng.choice(STRIP_PROMPTS if picture.panels else SCENE_PROMPTS), describe(picture, rng))


def _panel_turn(picture: Picture, rng: random.Random) -> Turn:
    """``Describe panel two.`` and the ambiguous ``Describe a panel.``, where the gaze alone decides which."""
    panel = rng.randrange(picture.panels)
    asked = "a panel" if rng.random() < 0.5 else f"panel {ORDINALS[panel]}"
    return Turn(f"Describe {asked}.", f"There is {Witness(rng, honest=True).tell(picture.in_panel(panel))}.")


def _any_order_turn(picture: Picture, rng: random.Random) -> Turn:
    order = rng.sample(range(picture.panels), picture.panels)
    witness = Witness(rng, honest=True)
    return Turn(
        "Describe the panels in any order.",
        " ".join(f"There is {witness.tell(picture.in_panel(panel))}." for panel in order),
    )


def _name_one_turn(picture: Picture, rng: random.Random) -> Turn:
    thing = rng.choice(picture.things)
    return Turn("Name one object.", f"{a_phrase(*str(thing).split()).capitalize()}.")


def ask(picture: Picture, rng: random.Random) -> Turn:
    """A yes/no question in POPE's form, as often true as not; false ones ask for a partner, a wrong colour or panel."""
    panel = rng.randrange(picture.panels) if picture.panels and rng.random() < 0.5 else None
    things = picture.things if panel is None else picture.in_panel(panel)
    there = [thing.noun for thing in things]  # in order: a set's order differs from process to process
    thing = rng.choice(things)
    noun, colour = thing.noun, thing.colour if rng.random() < 0.5 else None
    if rng.random() < 0.5:
        lies = [rng.choice([n for n in NOUNS if n not in there])]
        lies += [PARTNER[n] for n in there if PARTNER[n] not in there][:1]
        lies += [t.noun for t in picture.things if t.noun not in there][:1]
        if colour and rng.random() < 0.5:
            taken = {t.colour for t in things if t.noun == noun}
            colour = rng.choice([c for c in COLOURS if c not in taken])
        else:
            noun = rng.choice(lies)
    true = any(t.noun == noun and colour in (None, t.colour) for t in things)
    what = a_phrase(*filter(None, (colour, noun)))
    where = "" if panel is None else f" in panel {ORDINALS[panel]}"
    return Turn(f"Is there {what}{where}?", "Yes." if true else "No.")


def _colour_turn(picture: Picture, rng: random.Random) -> Turn:
    """``What colour is the star?``, with ``in panel two`` in a strip; now and then of something that is not there."""
    panel = rng.randrange(picture.panels) if picture.panels else None
    things = picture.things if panel is None else picture.in_panel(panel)
    where = "" if panel is None else f" in panel {ORDINALS[panel]}"
    thing = rng.choice(things)
    noun, answer = thing.noun, f"It is {thing.colour}."
    if rng.random() < 0.3:
        noun, answer = rng.choice([n for n in NOUNS if n not in [t.noun for t in things]]), "There is none."
    return Turn(f"What colour is the {noun}{where}?", answer)


def tales(seed: int, index: int, most: int = 8) -> Iterator[Sample]:
    """`lessons` without the questions: descriptions alone."""
    for sample in lessons(seed, index, most):
        if told := tuple(turn for turn in sample.turns if not turn.prompt.endswith("?")):
            yield replace(sample, turns=told)


def _questions(picture: Picture, rng: random.Random, count: int) -> list[Turn]:
    return [rng.choice((ask, ask, _colour_turn))(picture, rng) for _ in range(count)]


def _rng(split: str, seed: int, index: int | str) -> random.Random:
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}. The lab has {', '.join(SPLITS)}.")
    return random.Random(f"gazeguard-lab/{split}/{seed}/{index}")


def samples(split: Split, n: int, seed: int = 0, kind: Literal["strip", "scene", "both"] = "both") -> list[Sample]:
    """``n`` pictures with their truth and a prompt to describe all; ``both`` alternates strips and scenes.

    Raises `ValueError` for an unknown split.
    """
    made = []
    for index in range(n):
        rng = _rng(split, seed, index)
        this = ("strip", "scene")[index % 2] if kind == "both" else kind
        picture = make_picture(rng, this, paired=split != "shifted")
        made.append(Sample(f"{split}/{seed}/{this}/{index}", picture, (_describe_turn(picture, rng),)))
    return made


def lessons(seed: int, index: int, most: int = 8) -> Iterator[Sample]:
    """Endless training conversations from ``index`` on. ``most`` is the curriculum's bound on panels and things."""
    while True:
        rng = _rng("train", seed, f"lesson/{index}")
        kind = "strip" if rng.random() < 0.6 else "scene"
        picture = make_picture(rng, kind, paired=True, most=most)
        task = rng.random()
        if task < 0.50:
            turns = [_describe_turn(picture, rng), *_questions(picture, rng, rng.randint(1, 4))]
        elif task < 0.66 and picture.panels:
            turns = [_panel_turn(picture, rng) for _ in range(3)]
        elif task < 0.78 and picture.panels:
            turns = [_any_order_turn(picture, rng)]
        elif task < 0.58:
            turns = [_name_one_turn(picture, rng) for _ in range(3)]
        else:
            turns = _questions(picture, rng, rng.randint(8, 12))
        yield Sample(f"train/{seed}/lesson/{index}", picture, tuple(turns))
        index += 1

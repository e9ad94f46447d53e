"""The drawn world of the lab: images with exact truth, and captions of them.

A *drawing* is a square page of 144 x 144 pixels. A **strip** has one to six panels in two rows of three, read left to
right, top to bottom; slots past the last panel stay empty. A **scene** has one to eight objects in free positions.

The world leads to the errors that captions of photographs have:

* objects come in pairs (a star usually comes with a moon), so that one suggests the other;
* the captions that the model is trained on name a missing partner sometimes, and more often the later in the caption, so
  that position is a confound, as it is in real data;
* an object has a usual colour, and late mentions fall back on it;
* some objects are faint, small or half hidden.

Everything is a function of ``(split, seed, index)`` through `random.Random`, whose streams are the same on every machine
and Python version. The ``shifted`` split breaks the pairs and the usual colours, nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image, ImageDraw

from gazeguard.claims.english import listed
from gazeguard.heads.pictographs import COLOURS, glyph
from gazeguard.heads.strips import LOCATION_PHRASES, MAX_PANELS, ORDINALS, Box, a_phrase, panel_boxes

PAGE = 144  # pixels, both ways
PATCH = 12  # pixels; objects lie in slots of 2 x 2 patches, anywhere on the lattice
PATCHES = PAGE // PATCH  # per side
SPLITS = ("train", "validation", "test", "shifted")
Split = Literal["train", "validation", "test", "shifted"]

# (noun, usual colour), (its partner, usual colour)
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
class DrawnObject:
    """One drawn object and everything that is true of it."""

    noun: str
    colour: str
    box: Box
    panel: int | None  # 0-based in a strip, None in a scene
    location: str | None  # one of LOCATION_PHRASES in a scene, None in a strip
    small: bool = False
    faint: bool = False
    hidden: Literal["", "left", "right", "top", "bottom"] = ""  # the half that is covered

    def __str__(self) -> str:
        return " ".join((*(("small",) if self.small else ()), self.colour, self.noun))


@dataclass(frozen=True, slots=True)
class Drawing:
    """A strip or a scene with its objects in reading order. ``panels`` is 0 for a scene."""

    objects: tuple[DrawnObject, ...]
    panels: int
    paper: tuple[int, int, int]

    def panel_box(self, panel: int) -> Box:
        """The pixels of a panel (0-based)."""
        return panel_boxes(MAX_PANELS, (PAGE, PAGE))[panel]

    def in_panel(self, panel: int) -> tuple[DrawnObject, ...]:
        """The objects of a panel (0-based)."""
        return tuple(each for each in self.objects if each.panel == panel)

    def draw(self) -> Image.Image:
        """The image, RGB, PAGE x PAGE pixels."""
        image = Image.new("RGB", (PAGE, PAGE), self.paper if not self.panels else (255, 255, 255))
        pen = ImageDraw.Draw(image)
        for panel in range(self.panels):
            x0, y0, x1, y1 = self.panel_box(panel)
            pen.rectangle((x0 + 1, y0 + 1, x1 - 2, y1 - 2), fill=self.paper, outline=(90, 90, 90))
        for each in self.objects:
            x0, y0, x1, y1 = each.box
            mask = glyph(each.noun, (x1 - x0, y1 - y0))
            if each.faint:
                mask = mask.point(lambda value: value * 3 // 10)
            image.paste(COLOURS[each.colour], each.box, mask)
            middle_x, middle_y = (x0 + x1) // 2, (y0 + y1) // 2
            cover = {
                "left": (x0, y0, middle_x, y1),
                "right": (middle_x, y0, x1, y1),
                "top": (x0, y0, x1, middle_y),
                "bottom": (x0, middle_y, x1, y1),
            }.get(each.hidden)
            if cover:
                pen.rectangle((cover[0], cover[1], cover[2] - 1, cover[3] - 1), fill=(160, 160, 160))
        return image


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt and the answer that the model is trained on."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A drawing and one conversation about it. ``id`` is unique over splits and seeds."""

    id: str
    drawing: Drawing
    turns: tuple[Turn, ...]

    @property
    def prompt(self) -> str:
        """The prompt of the first turn."""
        return self.turns[0].prompt

    @property
    def image(self) -> Image.Image:
        """The drawing as an image, RGB, PAGE x PAGE pixels."""
        return self.drawing.draw()


# --------------------------------------------------------------------------------------------------------- drawings


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


def _appearance(rng: random.Random, noun: str, paired: bool) -> dict[str, Any]:
    colour = USUAL_COLOUR[noun] if paired and rng.random() < 0.5 else rng.choice(list(COLOURS))
    return {
        "colour": colour,
        "small": rng.random() < 0.15,
        "faint": rng.random() < 0.12,
        "hidden": rng.choice(("left", "right", "top", "bottom")) if rng.random() < 0.12 else "",
    }


def _random_box(rng: random.Random, column: int, row: int, small: bool) -> Box:
    """The box of an object whose slot of 2 x 2 patches begins at this patch.

    It fills the slot but for a pixel or two, a small object one of its patches.
    """
    slot = PATCH if small else 2 * PATCH
    if small:
        column, row = column + rng.randint(0, 1), row + rng.randint(0, 1)
    size = slot - rng.randint(0, slot // 12)
    x, y = (patch * PATCH + rng.randint(0, slot - size) for patch in (column, row))
    return (x, y, x + size, y + size)


def _strip(rng: random.Random, panels: int, paired: bool) -> list[DrawnObject]:
    objects = []
    for panel in range(panels):
        x0, y0, x1, y1 = (edge // PATCH for edge in panel_boxes(MAX_PANELS, (PAGE, PAGE))[panel])
        names = _nouns(rng, rng.choice((1, 2, 2, 3)), paired)
        band = (y1 - y0) // len(names)
        for i, noun in enumerate(names):
            appearance = _appearance(rng, noun, paired)
            row = y0 + i * band + rng.randint(0, band - 2)
            box = _random_box(rng, rng.randint(x0, x1 - 2), row, appearance["small"])
            objects.append(DrawnObject(noun, box=box, panel=panel, location=None, **appearance))
    return objects


def _scene(rng: random.Random, count: int, paired: bool) -> list[DrawnObject]:
    objects: list[DrawnObject] = []
    taken: set[tuple[int, int]] = set()
    for noun in _nouns(rng, count, paired):
        appearance = _appearance(rng, noun, paired)
        for _ in range(200):  # a free slot is found long before; a crowded page gets one object fewer
            # A slot across the border between thirds would make the location ambiguous.
            column, row = (rng.choice([c for c in range(PATCHES - 1) if (c + 1) % (PATCHES // 3)]) for _ in range(2))
            slot = {(column + i, row + j) for i in (0, 1) for j in (0, 1)}
            if not slot & taken:
                taken |= slot
                box = _random_box(rng, column, row, appearance["small"])
                location = LOCATION_PHRASES[row * 3 // PATCHES][column * 3 // PATCHES]
                objects.append(DrawnObject(noun, box=box, panel=None, location=location, **appearance))
                break
    rows: dict[str | None, int] = {location: y for y, row in enumerate(LOCATION_PHRASES) for location in row}
    return sorted(objects, key=lambda each: (rows[each.location], each.box[0] + each.box[2]))


def random_drawing(rng: random.Random, kind: str, paired: bool, most: int = 8) -> Drawing:
    """A random drawing of kind "strip" or "scene"; ``most`` bounds the panels of a strip and the objects of a scene."""
    red, green, blue = (rng.randint(232, 255) for _ in range(3))
    paper = (red, green, blue)
    if kind == "strip":
        panels = rng.randint(1, min(most, MAX_PANELS))
        return Drawing(tuple(_strip(rng, panels, paired)), panels, paper)
    return Drawing(tuple(_scene(rng, rng.randint(1, most), paired)), 0, paper)


# --------------------------------------------------------------------------------------------------------- captions


class Captioner:
    """Writer of captions that names what is there and, the longer the caption, also what it expects to be there."""

    def __init__(self, rng: random.Random, honest: bool = False) -> None:
        self.rng, self.honest, self.count = rng, honest, 0  # of mentions so far

    def _mention(self, each: DrawnObject) -> str:
        rng, late, self.count = self.rng, self.count, self.count + 1
        noun, colour = each.noun, each.colour
        if not self.honest and rng.random() < min(0.08, 0.008 * late):
            noun = rng.choice(NOUNS)
        if not self.honest and rng.random() < min(0.35, 0.04 * late):
            colour = USUAL_COLOUR[noun]
        return a_phrase(*(("small",) if each.small else ()), colour, noun)

    def list_objects(self, objects: tuple[DrawnObject, ...]) -> str:
        """The objects in order, then sometimes the missing partner of one of them."""
        there = {each.noun for each in objects}
        items = [" ".join(filter(None, (self._mention(each), each.location))) for each in objects]
        lone = [PARTNER[each.noun] for each in objects if PARTNER[each.noun] not in there]
        if not self.honest and lone and self.rng.random() < min(0.8, 0.06 + 0.12 * self.count):
            noun = self.rng.choice(lone)
            colour = USUAL_COLOUR[noun] if self.rng.random() < 0.7 else self.rng.choice(list(COLOURS))
            location = self.rng.choice([p for row in LOCATION_PHRASES for p in row]) if objects[0].location else None
            items.append(" ".join(filter(None, (a_phrase(colour, noun), location))))
            self.count += 1
        return listed(items)


def describe(drawing: Drawing, rng: random.Random, honest: bool = False) -> str:
    """A caption of the whole drawing as the training set has it; ``honest`` names only what is there."""
    captioner = Captioner(rng, honest)
    if not drawing.panels:
        return f"There is {captioner.list_objects(drawing.objects)}."
    return " ".join(
        f"In panel {ORDINALS[panel]} there is {captioner.list_objects(drawing.in_panel(panel))}."
        for panel in range(drawing.panels)
    )


STRIP_PROMPTS = ("Describe all panels.", "Describe the picture.")
SCENE_PROMPTS = ("Describe the picture.", "Describe all objects.")


def _describe_turn(drawing: Drawing, rng: random.Random) -> Turn:
    return Turn(rng.choice(STRIP_PROMPTS if drawing.panels else SCENE_PROMPTS), describe(drawing, rng))


def _panel_turn(drawing: Drawing, rng: random.Random) -> Turn:
    """``Describe panel two.`` and the ambiguous ``Describe a panel.``, where only attention decides which."""
    panel = rng.randrange(drawing.panels)
    asked = "a panel" if rng.random() < 0.5 else f"panel {ORDINALS[panel]}"
    return Turn(f"Describe {asked}.", f"There is {Captioner(rng, honest=True).list_objects(drawing.in_panel(panel))}.")


def _any_order_turn(drawing: Drawing, rng: random.Random) -> Turn:
    order = rng.sample(range(drawing.panels), drawing.panels)
    captioner = Captioner(rng, honest=True)
    return Turn(
        "Describe the panels in any order.",
        " ".join(f"There is {captioner.list_objects(drawing.in_panel(panel))}." for panel in order),
    )


def _name_one_turn(drawing: Drawing, rng: random.Random) -> Turn:
    chosen = rng.choice(drawing.objects)
    return Turn("Name one object.", f"{a_phrase(*str(chosen).split()).capitalize()}.")


def yes_no_question(drawing: Drawing, rng: random.Random) -> Turn:
    """A yes/no question in POPE's form, as often true as not; false ones name a partner, a wrong colour or panel."""
    panel = rng.randrange(drawing.panels) if drawing.panels and rng.random() < 0.5 else None
    objects = drawing.objects if panel is None else drawing.in_panel(panel)
    there = [each.noun for each in objects]  # in order: a set's order differs from process to process
    chosen = rng.choice(objects)
    noun, colour = chosen.noun, chosen.colour if rng.random() < 0.5 else None
    if rng.random() < 0.5:
        false_nouns = [rng.choice([n for n in NOUNS if n not in there])]
        false_nouns += [PARTNER[n] for n in there if PARTNER[n] not in there][:1]
        false_nouns += [t.noun for t in drawing.objects if t.noun not in there][:1]
        if colour and rng.random() < 0.5:
            taken = {t.colour for t in objects if t.noun == noun}
            colour = rng.choice([c for c in COLOURS if c not in taken])
        else:
            noun = rng.choice(false_nouns)
    true = any(t.noun == noun and colour in (None, t.colour) for t in objects)
    what = a_phrase(*filter(None, (colour, noun)))
    where = "" if panel is None else f" in panel {ORDINALS[panel]}"
    return Turn(f"Is there {what}{where}?", "Yes." if true else "No.")


def _colour_turn(drawing: Drawing, rng: random.Random) -> Turn:
    """``What colour is the star?``, with ``in panel two`` in a strip; sometimes of an object that is not there."""
    panel = rng.randrange(drawing.panels) if drawing.panels else None
    objects = drawing.objects if panel is None else drawing.in_panel(panel)
    where = "" if panel is None else f" in panel {ORDINALS[panel]}"
    chosen = rng.choice(objects)
    noun, answer = chosen.noun, f"It is {chosen.colour}."
    if rng.random() < 0.3:
        noun, answer = rng.choice([n for n in NOUNS if n not in [t.noun for t in objects]]), "There is none."
    return Turn(f"What colour is the {noun}{where}?", answer)


def descriptions(seed: int, index: int, most: int = 8) -> Iterator[Sample]:
    """`conversations` without the questions."""
    for sample in conversations(seed, index, most):
        if turns := tuple(turn for turn in sample.turns if not turn.prompt.endswith("?")):
            yield replace(sample, turns=turns)


def _questions(drawing: Drawing, rng: random.Random, count: int) -> list[Turn]:
    return [rng.choice((yes_no_question, yes_no_question, _colour_turn))(drawing, rng) for _ in range(count)]


def _rng(split: str, seed: int, index: int | str) -> random.Random:
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}; expected one of: {', '.join(SPLITS)}.")
    return random.Random(f"gazeguard-lab/{split}/{seed}/{index}")


def samples(split: Split, n: int, seed: int = 0, kind: Literal["strip", "scene", "both"] = "both") -> list[Sample]:
    """Drawings with their truth and a prompt to describe all of it.

    Args:
        split: "train", "validation", "test", or "shifted" (without pairs and usual colours).
        n: Number of samples.
        seed: Samples of different seeds differ.
        kind: "strip", "scene", or "both" in turn.

    Raises:
        ValueError: The split is unknown.
    """
    drawn = []
    for index in range(n):
        rng = _rng(split, seed, index)
        layout = ("strip", "scene")[index % 2] if kind == "both" else kind
        drawing = random_drawing(rng, layout, paired=split != "shifted")
        drawn.append(Sample(f"{split}/{seed}/{layout}/{index}", drawing, (_describe_turn(drawing, rng),)))
    return drawn


def conversations(seed: int, index: int, most: int = 8) -> Iterator[Sample]:
    """Endless training conversations from ``index`` on; ``most`` is the curriculum's bound on panels and objects."""
    while True:
        rng = _rng("train", seed, f"lesson/{index}")
        kind = "strip" if rng.random() < 0.6 else "scene"
        drawing = random_drawing(rng, kind, paired=True, most=most)
        task = rng.random()
        if task < 0.50:
            turns = [_describe_turn(drawing, rng), *_questions(drawing, rng, rng.randint(1, 4))]
        elif task < 0.66 and drawing.panels:
            turns = [_panel_turn(drawing, rng) for _ in range(3)]
        elif task < 0.78 and drawing.panels:
            turns = [_any_order_turn(drawing, rng)]
        elif task < 0.58:
            turns = [_name_one_turn(drawing, rng) for _ in range(3)]
        else:
            turns = _questions(drawing, rng, rng.randint(8, 12))
        yield Sample(f"train/{seed}/lesson/{index}", drawing, tuple(turns))
        index += 1

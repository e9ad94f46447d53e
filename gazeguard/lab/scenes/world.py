"""World of the scenes lab: drawn images of everyday objects with exact truth.

An *image* is a square of 160 x 160 pixels, 8 x 8 patches of 20. A **scene** has one to eight objects in free positions,
three in four of one theme; a **comic page** has two to six panels with one to three objects each. Objects are drawn in
OpenMoji's colours, now and then recoloured on purpose; in some images they are the tiny lab's coloured pictographs.

What makes a captioner err is in the world, not in its captions: objects are small, faint, blurred, overlapped or drawn
alike, and objects of one theme keep company. Every image is a function of ``(split, seed, index)``.

The split ``shifted`` mixes the themes; ``line`` draws black outlines instead of colours; both occur in no training image.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image, ImageDraw

from gazeguard.errors import InputError
from gazeguard.heads.strips import LOCATION_PHRASES, Box
from gazeguard.lab.scenes import drawing
from gazeguard.lab.scenes.vocabulary import COLOUR_NAMES, PICTOGRAPHS, THEMES

SIZE = 160  # pixels, both ways
PATCH = 20  # pixels
GRID = SIZE // PATCH  # patches per side
SPLITS = ("train", "validation", "test", "shifted", "line")
Split = Literal["train", "validation", "test", "shifted", "line"]
Kind = Literal["scene", "page"]

THEME_SHARE = 0.75  # of a scene's objects that come from its theme
RECOLOURED, SMALL, FAINT, BLURRED, OVERLAPPED, REPEATED = 0.25, 0.15, 0.12, 0.12, 0.3, 0.1  # shares of objects
COUNT_WEIGHTS = (8, 15, 18, 18, 15, 12, 8, 6)  # of one to eight objects in a scene
MAX_OBJECTS = len(COUNT_WEIGHTS)
MAX_OVERLAP = 0.3  # of the smaller object's box
BORDER = 6  # pixels: no object's centre lies so near to the border between two locations
LAYOUTS: dict[int, tuple[tuple[int, int], ...]] = {  # number of panels -> (columns, rows)
    2: ((3, 2), (2, 1), (1, 2)),
    3: ((3, 2), (3, 1), (2, 2)),
    4: ((3, 2), (2, 2), (4, 1)),
    5: ((3, 2),),
    6: ((3, 2), (2, 3)),
}


@dataclass(frozen=True, slots=True)
class DrawnObject:
    """One drawn object and everything that is true of it.

    box:      pixels x0, y0, x1, y1, right and bottom exclusive
    colour:   the colour that it was given on purpose, None for a drawing's own colours
    panel:    0-based on a comic page, None in a scene
    location: one of LOCATION_PHRASES in a scene, None on a comic page
    """

    noun: str
    box: Box
    colour: str | None = None
    panel: int | None = None
    location: str | None = None
    small: bool = False
    faint: bool = False
    blurred: bool = False

    @property
    def centre(self) -> tuple[float, float]:
        """x, y in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True, slots=True)
class DrawnImage:
    """A scene or a comic page: its objects in reading order. ``panels`` is empty for a scene."""

    objects: tuple[DrawnObject, ...]
    panels: tuple[Box, ...]
    style: drawing.DrawingStyle
    theme: str
    corners: tuple[tuple[int, int, int], tuple[int, int, int]]
    seed: int

    def in_panel(self, panel: int) -> tuple[DrawnObject, ...]:
        """The objects of a panel (0-based)."""
        return tuple(item for item in self.objects if item.panel == panel)

    def draw(self) -> Image.Image:
        """The image, RGB, SIZE x SIZE."""
        if self.panels:
            canvas = Image.new("RGB", (SIZE, SIZE), "white")
            pen = ImageDraw.Draw(canvas)
            for x0, y0, x1, y1 in self.panels:
                pen.rectangle((x0 + 1, y0 + 1, x1 - 2, y1 - 2), fill=self.corners[0], outline=(90, 90, 90))
        else:
            canvas = drawing.background(SIZE, self.corners, self.seed)
        for item in self.objects:
            drawing.paste(canvas, item.noun, item.box, self.style, item.colour, item.faint, item.blurred)
        return canvas


@dataclass(frozen=True, slots=True)
class Difficulty:
    """What a curriculum bounds: the number of objects, and whether they may be small, faint, blurred or overlapped."""

    most: int = MAX_OBJECTS
    hard: bool = True


def generator(split: str, seed: int, index: int | str) -> random.Random:
    """The random numbers of one image.

    Raises:
        InputError: The split is unknown.
    """
    if split not in SPLITS:
        raise InputError(f"Unknown split {split!r}; expected one of: {', '.join(SPLITS)}.")
    return random.Random(f"gazeguard-scenes/{split}/{seed}/{index}")


def make_image(rng: random.Random, kind: Kind, split: Split = "train", difficulty: Difficulty | None = None) -> DrawnImage:
    """Draw lots for one image of a split."""
    difficulty = difficulty or Difficulty()
    style: drawing.DrawingStyle = "line" if split == "line" else "colour"
    if split != "line" and rng.random() < (0.15 if kind == "scene" else 0.4):
        style = "pictograph"
    theme = rng.choice(list(THEMES))
    paper = _shade(rng, 225)
    other = _shade(rng, 170) if kind == "scene" and style != "pictograph" else paper
    panels: tuple[Box, ...] = ()
    if kind == "page":
        panels = _panels(rng, rng.randint(2, max(2, min(6, difficulty.most))))
        objects = _page_objects(rng, panels, style, theme, split, difficulty)
    else:
        objects = _scene_objects(rng, style, theme, split, difficulty)
    return DrawnImage(tuple(objects), panels, style, theme, (paper, other), rng.randrange(2**31))


def _shade(rng: random.Random, darkest: int) -> tuple[int, int, int]:
    """A light colour."""
    red, green, blue = (rng.randint(darkest, 255) for _ in range(3))
    return red, green, blue


def _panels(rng: random.Random, count: int) -> tuple[Box, ...]:
    columns, rows = rng.choice(LAYOUTS[count]) if rng.random() < 0.5 else (3, 2)
    width, height = SIZE // columns, SIZE // rows
    slots = (divmod(panel, columns) for panel in range(count))
    return tuple((c * width, r * height, (c + 1) * width, (r + 1) * height) for r, c in slots)


def draw_nouns(rng: random.Random, count: int, style: str, theme: str, split: str, without: Sequence[str] = ()) -> list[str]:
    """``count`` different nouns, three in four of the theme (of no theme in the shifted split)."""
    chosen: list[str] = []
    while len(chosen) < count:
        if style == "pictograph":
            noun = rng.choice(PICTOGRAPHS)
        else:
            own = rng.random() < THEME_SHARE and split != "shifted"
            names = list(THEMES[theme if own else rng.choice(list(THEMES))])
            noun = rng.choices(names, [1 / (1 + rank / 6) for rank in range(len(names))])[0]
        if noun not in chosen and noun not in without:
            chosen.append(noun)
    return chosen


def _traits(rng: random.Random, style: str, hard: bool) -> dict[str, Any]:
    coloured = style == "pictograph" or (style == "colour" and rng.random() < RECOLOURED)
    colour = rng.choice(COLOUR_NAMES)
    small, faint, blurred = rng.random() < SMALL, rng.random() < FAINT, rng.random() < BLURRED
    return {
        "colour": colour if coloured else None,
        "small": hard and small,
        "faint": hard and faint,
        "blurred": hard and blurred and not (small or faint),
    }


def _page_objects(
    rng: random.Random, panels: tuple[Box, ...], style: drawing.DrawingStyle, theme: str, split: str, difficulty: Difficulty
) -> list[DrawnObject]:
    objects = []
    nouns: list[str] = []
    for panel, (x0, y0, x1, y1) in enumerate(panels):
        count = rng.choice((1, 1, 2, 2, 3)) if difficulty.most > 2 else 1
        count = min(count, max(1, (y1 - y0) // 26))
        band = (y1 - y0 - 6) // count
        for row, noun in enumerate(draw_nouns(rng, count, style, theme, split, nouns[-6:])):
            traits = _traits(rng, style, difficulty.hard)
            room = min(x1 - x0 - 6, band)
            side = rng.randint(16, 21) if traits["small"] else rng.randint(min(24, room), min(room, 60))
            width, height = drawing.size_within(noun, style, min(side, room))
            x = rng.randint(x0 + 3, x1 - 3 - width)
            y = rng.randint(y0 + 3 + row * band, y0 + 3 + (row + 1) * band - height)
            objects.append(DrawnObject(noun, (x, y, x + width, y + height), panel=panel, **traits))
            nouns.append(noun)
    return objects


def _scene_objects(
    rng: random.Random, style: drawing.DrawingStyle, theme: str, split: str, difficulty: Difficulty
) -> list[DrawnObject]:
    count = rng.choices(range(1, difficulty.most + 1), COUNT_WEIGHTS[: difficulty.most])[0]
    nouns = draw_nouns(rng, count, style, theme, split)
    for position in range(1, count):
        if rng.random() < REPEATED:
            nouns[position] = nouns[position - 1]
    objects: list[DrawnObject] = []
    for noun in nouns:
        traits = _traits(rng, style, difficulty.hard)
        limit = MAX_OVERLAP if difficulty.hard and rng.random() < OVERLAPPED else 0.0
        item = _placed(rng, noun, style, traits, objects, limit, count)
        if item is not None:
            objects.append(item)
    rows: dict[str | None, int] = {name: number for number, row in enumerate(LOCATION_PHRASES) for name in row}
    return sorted(objects, key=lambda item: (rows[item.location], item.centre[0]))


def _placed(
    rng: random.Random,
    noun: str,
    style: drawing.DrawingStyle,
    traits: dict[str, Any],
    others: list[DrawnObject],
    limit: float,
    count: int,
) -> DrawnObject | None:
    """The object at a free position; smaller after every few vain tries, None when there is no room at all."""
    largest = 66 if count <= 4 else 50
    for attempt in range(80):
        side = rng.randint(16, 22) if traits["small"] else rng.randint(28, max(28, largest - attempt // 2))
        width, height = drawing.size_within(noun, style, side)
        x, y = rng.randint(1, SIZE - 1 - width), rng.randint(1, SIZE - 1 - height)
        box = (x, y, x + width, y + height)
        location = location_of(box)
        if location and all(overlap(box, other.box) <= limit for other in others):
            return DrawnObject(noun, box, location=location, **traits)
    return None


def location_of(box: Box) -> str | None:
    """The ninth of the image in which a box's centre lies; None near to a border between two of them."""
    third = SIZE / 3
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    if any(abs(value - third * border) < BORDER for value in centre for border in (1, 2)):
        return None
    return LOCATION_PHRASES[int(centre[1] // third)][int(centre[0] // third)]


def overlap(a: Box, b: Box) -> float:
    """The share of the smaller box that lies under the other one, 0 to 1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))


Relation = Literal["next to", "under", "above"]


def relation(a: DrawnObject, b: DrawnObject) -> Relation | None:
    """What is clearly true of two objects of one scene or panel: a is next to, under or above b; None otherwise."""
    if a.panel != b.panel or a is b:
        return None
    (ax, ay), (bx, by) = a.centre, b.centre
    gap_x = max(a.box[0], b.box[0]) - min(a.box[2], b.box[2])
    gap_y = max(a.box[1], b.box[1]) - min(a.box[3], b.box[3])
    heights, widths = (a.box[3] - a.box[1] + b.box[3] - b.box[1]) / 2, (a.box[2] - a.box[0] + b.box[2] - b.box[0]) / 2
    if abs(ay - by) < 0.4 * heights and -6 <= gap_x <= 24:
        return "next to"
    if abs(ax - bx) < 0.4 * widths and -6 <= gap_y <= 24:
        return "under" if ay > by else "above"
    return None
